"""Evaluation of a fine-tuned run on one split: metrics with intervals, by presence pattern, and what they are made of."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lanistr.config import Recipe, load_recipe
from lanistr.data.reader import GoldDataset, load_manifest, open_split
from lanistr.evaluation.statistics import estimate
from lanistr.metrics import METRICS, Metric
from lanistr.modalities import make_modalities
from lanistr.tasks import Finetune
from lanistr.training.best import predict
from lanistr.training.checkpoint import WEIGHTS, load_weights
from lanistr.training.finetune import make_task
from lanistr.training.run import read_run

FEWEST = 10  # samples of a presence pattern that metrics are worth showing for


@dataclass(frozen=True)
class Tuned:
    """A fine-tuning run with its best weights, and a split to use it on.

    Attributes:
        identity: ``run.json``.
        task: on ``device``.
    """

    identity: dict[str, Any]
    recipe: Recipe
    task: Finetune
    dataset: GoldDataset
    device: torch.device


def load_tuned(run: Path, data: Path, split: str) -> Tuned:
    """Load a run's best weights and open a split.

    Raises:
        ValueError: not a fine-tuning run, or a dataset with other labels.
    """
    identity = read_run(run)
    if identity["task"] != "finetune" or not (run / "best" / WEIGHTS).is_file():
        raise ValueError(f"{run}: no best weights; only a finished fine-tuning run can be evaluated")
    recipe = load_recipe(str(run / "recipe.yaml"))
    manifest = load_manifest(data, recipe.data)
    if (manifest.labels, manifest.target) != (identity["labels"], identity.get("target", "class")):
        raise ValueError(
            f"{data} has the {manifest.target} target {manifest.labels}, {run} was trained on {identity['labels']}"
        )
    modalities = make_modalities(manifest, recipe.model.modalities)
    dataset = open_split(data, split, modalities, recipe.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = make_task(recipe, manifest, device.type).to(device)
    report = load_weights(task, run / "best" / WEIGHTS)
    if report.new:
        raise ValueError(f"{run}: the best weights lack {', '.join(report.new[:3])}")
    return Tuned(identity, recipe, task, dataset, device)


def evaluate_run(run: Path, data: Path, split: str) -> dict[str, Any]:
    """Evaluate the best weights of a fine-tuning run.

    Writes ``<run>/metrics.json``, and outputs and truth of every sample to ``<run>/predictions-<split>.npz`` for paired
    tests.

    Raises:
        ValueError: not a fine-tuning run, or a dataset with other labels.
    """
    tuned = load_tuned(run, data, split)
    identity, manifest, dataset = tuned.identity, tuned.dataset.manifest, tuned.dataset
    positions = dataset.labelled(None, 0)
    outputs, truth = predict(tuned.task, dataset, positions, tuned.device)
    names = {manifest.bit(name): name for name in dataset.modalities}
    result = {
        "run": run.name,
        "split": split,
        "content_id": manifest.content_id,
        "target": manifest.target,
        "n": len(truth),
        "labels": identity["n_labels"],
        "from": identity["from"],
        "metrics": {name: estimate_metric(m, [outputs], truth) for name, m in METRICS[manifest.target].items()},
        "patterns": by_pattern(outputs, truth, dataset.presence[positions], names, METRICS[manifest.target]),
    }
    keys = np.array(dataset.keys, dtype=np.bytes_)[positions]
    save_predictions(run / f"predictions-{split}.npz", keys, dataset.presence[positions], outputs, truth)
    temporary = run / ".metrics.json.tmp"
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, run / "metrics.json")
    return result


def by_pattern(
    outputs: np.ndarray, truth: np.ndarray, presence_N: np.ndarray, names: dict[int, str], metrics: dict[str, Metric]
) -> list[dict[str, Any]]:
    """Metrics of the samples of each presence pattern, the most frequent first.

    Args:
        outputs, truth: of the samples, see `lanistr.metrics`.
        presence_N: bitmasks.
        names: modality per bit value.
        metrics: by name.

    Returns:
        Per pattern ``mask``, ``present``, ``n`` and, of at least `FEWEST` samples, ``metrics`` (None where one is undefined).
    """
    masks, counts = np.unique(presence_N, return_counts=True)
    rows = []
    for mask, n in sorted(zip(masks.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1]):
        own = presence_N == mask
        found = {name: _number(metric(outputs[own], truth[own])) for name, metric in metrics.items()}
        present = [name for bit, name in names.items() if mask & bit]
        rows.append({"mask": mask, "present": present, "n": n, "metrics": found if n >= FEWEST else {}})
    return rows


def save_predictions(
    path: Path, keys: np.ndarray, presence_N: np.ndarray, outputs: np.ndarray, truth: np.ndarray
) -> None:
    """Outputs and truth per sample, without pickles."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as file:
        np.savez_compressed(file, keys=keys, presence=presence_N, outputs=outputs, truth=truth)
    os.replace(temporary, path)


def estimate_metric(metric: Metric, outputs: Sequence[np.ndarray], truth: np.ndarray) -> dict[str, Any]:
    """``value`` and ``ci95`` as JSON has them, None = undefined; see `lanistr.evaluation.statistics.estimate`."""
    found = estimate(metric, outputs, truth)
    return {"value": _number(found.value), "ci95": [_number(found.low), _number(found.high)]}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
