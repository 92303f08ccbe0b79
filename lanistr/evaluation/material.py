"""What is probed: samples' embeddings, plain statistics and columns, and the truth.

Shape suffixes: N samples (the labelled ones first, then unlabelled ones that only shape the features), F features.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lanistr.config import Recipe
from lanistr.data.reader import GoldDataset
from lanistr.evaluation.embed import embed
from lanistr.evaluation.plain import plain_features, read_contents
from lanistr.evaluation.probe import FOLDS, Truth
from lanistr.training.finetune import make_task
from lanistr.training.transfer import transfer

logger = logging.getLogger(__name__)
SHAPING = 2000  # samples in all that shape the features
BINS, MOST_CATEGORIES = (2, 3, 5, 10), 50


@dataclass(frozen=True)
class Material:
    """What the probe sees.

    Attributes:
        features: per modality (N, F) embeddings, anything where it is absent.
        plain: the same without an encoder, of the modalities that have such features.
        present: per modality (N,) bool.
        cells: per modality with named parts, per name (N, F) one-hot.
        fused: (N, F) embedding of all that is there.
        truth: of the labelled samples, the first of the N.
        classes: whether the target is one class.
    """

    features: dict[str, np.ndarray]
    plain: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    cells: dict[str, dict[str, np.ndarray]]
    fused: np.ndarray
    truth: Truth
    classes: bool


def gather(run: Path, recipe: Recipe, dataset: GoldDataset, labelled: np.ndarray, seed: int) -> Material:
    """Embed the labelled samples, and unlabelled ones up to `SHAPING` in all."""
    others = np.setdiff1d(np.arange(dataset.n), labelled)
    rng = np.random.default_rng([seed, 2])
    more = np.sort(rng.permutation(others)[: max(0, SHAPING - len(labelled))])
    positions = np.concatenate([labelled, more])
    task = make_task(recipe, dataset.manifest, "cpu")
    transfer(task, run, dataset.modalities)
    logger.info("embedding %d samples, %d of them labelled", len(positions), len(labelled))
    found = embed(task.model, dataset, positions)
    return Material(
        features=found.modalities,
        plain=plain_features(dataset, positions),
        present=found.present,
        cells=read_cells(dataset, positions),
        fused=found.fused_ND,
        truth=make_truth(dataset, labelled),
        classes=dataset.manifest.target == "class",
    )


def make_truth(dataset: GoldDataset, labelled: np.ndarray) -> Truth:
    """Of labelled samples; numbers standardised over them."""
    groups_N = dataset.group[labelled]
    if dataset.manifest.target == "class":
        label_N = dataset.label[labelled]
        values_NL = np.eye(len(dataset.manifest.labels))[label_N]
        return Truth(values_NL, np.ones_like(values_NL, dtype=bool), groups_N, label_N)
    values_NL = dataset.target[labelled].astype(np.float64)
    known_NL = np.isfinite(values_NL)
    if dataset.manifest.target == "regression":
        deviation_L = np.nan_to_num(np.nanstd(values_NL, axis=0))
        values_NL = (values_NL - np.nanmean(values_NL, axis=0)) / np.where(deviation_L > 0, deviation_L, 1)
    values_NL = np.nan_to_num(values_NL)
    edges = np.quantile(values_NL[:, 0], np.linspace(0, 1, FOLDS + 1)[1:-1])
    return Truth(values_NL, known_NL, groups_N, np.digitize(values_NL[:, 0], edges))


def read_cells(dataset: GoldDataset, positions: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Per modality whose contents have named parts, each part one-hot: numbers in bins, the most frequent categories."""
    found = {}
    for name, modality in dataset.modalities.items():
        columns = modality.cells(modality.example())
        if not columns or modality.items > 1:
            continue
        rows = [modality.cells(one[0]) if one else {} for one in read_contents(dataset, name, positions)]
        found[name] = {c: _one_hot([row.get(c) for row in rows], isinstance(columns[c], int)) for c in columns}
    return found


def _one_hot(cells: Sequence[float | int | None], categories: bool) -> np.ndarray:
    """(N, bins); a missing cell has a bin of its own, which the last one is."""
    if not categories:
        return _bins(np.array([np.nan if cell is None else cell for cell in cells], dtype=np.float64))
    ids_N = np.array([0 if cell is None else cell for cell in cells])
    values, counts = np.unique(ids_N[ids_N > 0], return_counts=True)
    kept = np.sort(values[np.argsort(-counts, kind="stable")[:MOST_CATEGORIES]])
    bin_N = np.where(ids_N == 0, len(kept) + 1, np.searchsorted(kept, ids_N))
    rare_N = (ids_N > 0) & ~np.isin(ids_N, kept)
    return np.eye(len(kept) + 2)[np.where(rare_N, len(kept), bin_N)]


def _bins(numbers_N: np.ndarray) -> np.ndarray:
    """(N, bins): the half, third, fifth and tenth that a number is in, so that near numbers are alike; the last: missing."""
    known_N = np.isfinite(numbers_N)
    if not known_N.any():
        return np.zeros((len(numbers_N), 1))
    blocks = []
    for bins in BINS:
        edges = np.unique(np.quantile(numbers_N[known_N], np.linspace(0, 1, bins + 1)[1:-1]))
        blocks.append(
            np.eye(len(edges) + 1)[np.searchsorted(edges, np.where(known_N, numbers_N, 0))] * known_N[:, None]
        )
    return np.concatenate([*blocks, ~known_N[:, None]], axis=1)
