"""Baselines that are fitted on what a fine-tuning run was given."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lanistr.baselines import Method, Pretrains, Subset
from lanistr.baselines.registry import Setting, make_methods
from lanistr.data.hiding import HidingDataset
from lanistr.data.reader import GoldDataset, open_split
from lanistr.evaluation.evaluate import load_tuned
from lanistr.evaluation.robustness import Rival


def fit_rivals(names: Sequence[str], run: Path, data: Path, work: Path, text_encoder: Path | None) -> Iterator[Rival]:
    """Methods on the run's labels, validation samples and modalities; what was hidden from it is hidden from them.

    Args:
        names: of `lanistr.baselines.registry.METHODS`; each is fitted when it is asked for.
        run: finished fine-tuning run.
        data: gold dataset that it was tuned on, and that methods pretrain on that do.
        work: folder for their runs.
        text_encoder: folder of a BERT for the probes; None = the package's.

    Raises:
        ValueError: not a fine-tuning run, a target that is no class, or a method that there is not or that does not fit.
    """
    tuned = load_tuned(run, data, "train")
    recipe, train = tuned.recipe, tuned.dataset
    if train.manifest.target != "class":
        raise ValueError(f"--methods are for classes, the target of {train.manifest.name} is {train.manifest.target}")
    if ours := [name for name in names if name.startswith("lanistr")]:
        raise ValueError(f"--methods {ours[0]}: give LANISTR as runs")
    kinds = {modality.kind for modality in train.modalities.values()}
    methods = make_methods(list(names), kinds, Setting(recipe, work, Path(), run, data, 1, text_encoder))
    val = open_split(data, "val", train.modalities, recipe.data)
    hide, seed = recipe.finetune.hide, recipe.finetune.seed
    if hide:
        train, val = HidingDataset(train, hide, seed), HidingDataset(val, hide, seed)
    drawn = Subset(train, train.labelled(tuned.identity["n_labels"], seed))
    checked = Subset(val, val.labelled(None, 0))
    return (_fit(name, method, drawn, checked, seed, hide) for name, method in methods.items())


def _fit(name: str, method: Method, train: Subset, val: Subset, seed: int, hide: dict[str, float]) -> Rival:
    if isinstance(method, Pretrains):
        method.pretrain(seed)
    predict = method.fit(train, val, seed)

    def answer(split: GoldDataset, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return predict(Subset(split, positions)), split.label[positions]

    return Rival(name, len(train), hide, answer)
