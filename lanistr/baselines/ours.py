"""LANISTR itself: pretrained, and from scratch. Trained by the same functions as by the launchers."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from lanistr.baselines import Predict, Subset
from lanistr.config import Recipe, load_recipe
from lanistr.training import distributed
from lanistr.training.best import predict
from lanistr.training.checkpoint import WEIGHTS, load_weights
from lanistr.training.engine import start
from lanistr.training.finetune import finetune, make_task
from lanistr.training.pretrain import pretrain


@dataclass(frozen=True)
class Pretraining:
    """Pretraining runs that fine-tuning starts from, made when they are first asked for.

    Attributes:
        recipe: its ``pretrain`` block counts.
        data: what is pretrained on.
        folder: the runs go here; a finished one is used again, an unfinished one resumed.
        seeds: number of runs; fine-tuning with seed s starts from run s modulo ``seeds``.
        ds_config: ZeRO configuration.
    """

    recipe: Recipe
    data: Path
    folder: Path
    seeds: int
    ds_config: Path

    def run(self, seed: int) -> Path:
        """The run that fine-tuning with a seed starts from."""
        number = seed % self.seeds
        run = self.folder / f"pretrain-{number}"
        run.mkdir(parents=True, exist_ok=True)
        with FileLock(run / ".lock"):  # several processes may work on one comparison
            if not (run / "summary.json").is_file():
                config = self.recipe.pretrain.model_copy(update={"seed": number})
                recipe = self.recipe.model_copy(update={"pretrain": config})
                _join()
                _demand(pretrain(recipe, self.data, run, self.ds_config, resume="auto"), run)
        return run


@dataclass(frozen=True)
class LanistrMethod:
    """Fine-tuning from a pretraining run, or without one.

    Attributes:
        recipe: its ``finetune`` block counts; without a run only encoders with published weights stay frozen.
        work: folder for the run, which is removed once its best weights are in memory.
        ds_config: ZeRO configuration.
        source: where to start; None = from scratch.
    """

    recipe: Recipe
    work: Path
    ds_config: Path
    source: Pretraining | Path | None

    def pretrain(self, seed: int) -> None:
        """See `Pretrains`."""
        if isinstance(self.source, Pretraining):
            self.source.run(seed)

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        """See `Method`."""
        drawn = train.dataset.labelled(len(train), seed)
        assert np.array_equal(drawn, train.positions_N), "the draw that fine-tuning itself makes"
        changes: dict[str, Any] = {"seed": seed} | (_without_run(self.recipe) if self.source is None else {})
        tuned = self.recipe.model_copy(update={"finetune": self.recipe.finetune.model_copy(update=changes)})
        source = self.source.run(seed) if isinstance(self.source, Pretraining) else self.source
        run = self.work / f"run-{len(train)}-{seed}"
        _join()
        data, labels = Path(train.dataset.path), len(train)
        _demand(finetune(tuned, data, run, self.ds_config, source=source, labels=labels, resume="auto"), run)
        predict_subset = _load(run, train)
        shutil.rmtree(run)
        return predict_subset


def _without_run(recipe: Recipe) -> dict[str, Any]:
    """What stays frozen: of the encoders that the recipe freezes those with published weights; others know nothing yet."""
    blocks = recipe.model.modalities
    frozen = [name for name in recipe.finetune.frozen(list(blocks)) if blocks.get(name, {}).get("pretrained")]
    return {"freeze": frozen, "cache": recipe.finetune.cache if frozen else False}


def _demand(finished: bool, run: Path) -> None:
    """Half a training is no answer."""
    if not finished:
        raise ValueError(f"{run}: stopped by a signal, saved; the same command goes on")


def _join() -> None:
    """Be a world of one for all trainings of this process."""
    if not distributed.is_joined():
        start()


def _load(run: Path, train: Subset) -> Predict:
    """The best weights of a fine-tuning run."""
    if not (run / "best" / WEIGHTS).is_file():
        raise ValueError(f"{run}: fine-tuning never validated; finetune.eval_every is longer than the run")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = load_recipe(str(run / "recipe.yaml"))
    task = make_task(recipe, train.dataset.manifest, device.type).to(device)
    load_weights(task, run / "best" / WEIGHTS)
    names = list(task.model.encoders)
    return lambda subset: predict(task, subset.only(names).dataset, subset.positions_N, device)[0]
