"""Baselines that are fitted on what fine-tuning runs were given."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lanistr.baselines import Method, Pretrains, Subset
from lanistr.baselines.registry import Setting, make_methods
from lanistr.config import FinetuneConfig
from lanistr.data.hiding import HidingDataset
from lanistr.data.reader import GoldDataset, open_split
from lanistr.evaluation.evaluate import Tuned, load_tuned
from lanistr.evaluation.robustness import Rival


def fit_rivals(
    names: Sequence[str], runs: Sequence[Path], data: Path, work: Path, text_encoder: Path | None
) -> Iterator[Rival]:
    """Methods on the labels, validation samples and modalities of each run; what was hidden from it is hidden from them.

    Runs that were given the same share their rivals. Where runs were given different things, a rival is named after the
    first one that was given the same: ``trees as RUN``.

    Args:
        names: of `lanistr.baselines.registry.METHODS`; each is fitted when it is asked for.
        runs: finished fine-tuning runs.
        data: gold dataset that they were tuned on, and that methods pretrain on that do.
        work: folder for their runs.
        text_encoder: folder of a BERT for the probes; None = the package's.

    Raises:
        ValueError: not a fine-tuning run, a target that is no class, or a method that there is not or that does not fit.
    """
    if ours := [name for name in names if name.startswith("lanistr")]:
        raise ValueError(f"--methods {ours[0]}: give LANISTR as runs")
    tuned: dict[str, tuple[Path, Tuned]] = {}
    for run in runs:
        found = load_tuned(run, data, "train")
        config = found.recipe.finetune
        given = [sorted(found.dataset.modalities), found.identity["n_labels"], config.seed, sorted(config.hide.items())]
        tuned.setdefault(str(given), (run, found))
    opened = [_open(names, run, found, data, work, text_encoder) for run, found in tuned.values()]
    return (
        _fit(f"{name} as {one.run.name}" if len(opened) > 1 else name, method, one)
        for one in opened
        for name, method in one.methods.items()
    )


class _Given(NamedTuple):
    """What a run was given, and the methods that get it, too."""

    run: Path
    config: FinetuneConfig
    methods: Mapping[str, Method]
    train: Subset
    val: Subset


def _open(names: Sequence[str], run: Path, tuned: Tuned, data: Path, work: Path, text_encoder: Path | None) -> _Given:
    recipe, train = tuned.recipe, tuned.dataset
    if train.manifest.target != "class":
        raise ValueError(f"--methods are for classes, the target of {train.manifest.name} is {train.manifest.target}")
    kinds = {modality.kind for modality in train.modalities.values()}
    methods = make_methods(list(names), kinds, Setting(recipe, work, Path(), run, data, 1, text_encoder))
    val = open_split(data, "val", train.modalities, recipe.data)
    hide, seed = recipe.finetune.hide, recipe.finetune.seed
    if hide:
        train, val = HidingDataset(train, hide, seed), HidingDataset(val, hide, seed)
    drawn = Subset(train, train.labelled(tuned.identity["n_labels"], seed))
    return _Given(run, recipe.finetune, methods, drawn, Subset(val, val.labelled(None, 0)))


def _fit(name: str, method: Method, given: _Given) -> Rival:
    seed = given.config.seed
    if isinstance(method, Pretrains):
        method.pretrain(seed)
    predict = method.fit(given.train, given.val, seed)

    def answer(split: GoldDataset, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return predict(Subset(split, positions)), split.label[positions]

    return Rival(name, len(given.train), given.config.hide, answer)
