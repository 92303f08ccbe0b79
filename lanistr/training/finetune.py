"""Fine-tuning on a number of labels, from a pretraining run or from scratch."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lanistr.config import Recipe
from lanistr.data.hiding import HidingDataset
from lanistr.data.loader import Collator
from lanistr.data.reader import GoldDataset, load_manifest, load_tokenizer_bytes, open_split
from lanistr.manifest import Manifest
from lanistr.metrics import find_metric
from lanistr.modalities import make_modalities
from lanistr.modalities.base import Modality
from lanistr.model.lanistr import build_model
from lanistr.tasks import Finetune
from lanistr.training import distributed
from lanistr.training.best import BestKeeper
from lanistr.training.ds_config import fill_config
from lanistr.training.engine import Engine, start
from lanistr.training.features import cache_features
from lanistr.training.loop import train
from lanistr.training.run import Resume, check_resume, check_run, describe_checkpoint, describe_run, train_loader
from lanistr.training.summary import write_summary
from lanistr.training.tracking import fill_trackers
from lanistr.training.transfer import LoadReport, pretrained_encoders, pretrained_weights, refuse_untrained, transfer

logger = logging.getLogger(__name__)


def finetune(
    recipe: Recipe,
    data: Path,
    run: Path,
    ds_config: Path,
    *,
    source: Path | None,
    labels: int | None,
    resume: Resume | None,
) -> bool:
    """Fine-tune on ``labels`` labelled train samples (None = all).

    Args:
        recipe: its ``finetune`` block counts.
        data: gold dataset.
        run: where the run goes.
        ds_config: ZeRO configuration.
        source: pretraining run; None = from scratch, then nothing may be frozen.
        labels: how many.
        resume: go on from the newest checkpoint, if there is one.

    Returns:
        Whether the run is finished (only then it has a summary); False where a signal ended it early.

    Raises:
        ValueError: anything that a user can put right.
    """
    config = recipe.finetune
    manifest = load_manifest(data, recipe.data)
    modalities = make_modalities(manifest, recipe.model.modalities)
    frozen = _check(recipe, manifest, list(modalities), source)
    resuming = check_run(run, resume)
    _, world, _ = distributed.world_from_environment()
    dataset, val = _open(data, recipe, modalities)
    collator = Collator(modalities, 1, config.seed, config.modality_dropout, config.alone(list(modalities)))
    positions = dataset.labelled(labels, config.seed)
    loader = train_loader(dataset, collator, recipe.data, config, positions)
    about = describe_checkpoint(recipe, "finetune", manifest)
    if resuming:
        check_resume(run, about, loader.state(0), resume == "force")
    joined = distributed.is_joined()
    device = start()
    filled = fill_config(ds_config, recipe.name, config, world)
    fill_trackers(filled, ds_config, run)
    task = make_task(recipe, manifest, device.type, config.precision)
    report = _take_over(task, source, modalities, config.transferred(list(modalities))) if source else None
    task.fit(dataset.label[positions], dataset.target[positions], config.class_weights)
    refuse_untrained(task, report, frozen)
    task.freeze(frozen)
    if config.cache:
        dataset, val = _cached(task, recipe, dataset, val, positions, run, device)
        collator = replace(collator, modalities=dataset.modalities)
        loader = train_loader(dataset, collator, recipe.data, config, positions)
    extra = {"task": "finetune", "from": str(source) if source else None, "n_labels": len(positions)}
    describe_run(run, recipe, manifest, filled, extra, load_tokenizer_bytes(data, recipe.data, manifest))
    shares = dict.fromkeys(pretrained_encoders(task, report), config.pretrained_lr)
    engine = Engine(task, filled, device, config.weight_decay, shares)
    keeper = BestKeeper(engine, val, config, loader.steps_per_epoch, run)
    finished = train(
        engine,
        loader,
        config,
        run,
        resuming=resuming,
        about=about,
        validation=keeper,
    )
    if finished and distributed.rank() == 0:
        write_summary(run, {"task": "finetune", "metric": keeper.metric, "best": keeper.best})
    if not joined:
        distributed.shutdown()
    return finished


def _open(data: Path, recipe: Recipe, modalities: dict[str, Modality[Any, Any]]) -> tuple[GoldDataset, GoldDataset]:
    """Train and val, with what the recipe hides hidden."""
    train, val = (open_split(data, split, modalities, recipe.data) for split in ("train", "val"))
    config = recipe.finetune
    if not config.hide:
        return train, val
    return HidingDataset(train, config.hide, config.seed), HidingDataset(val, config.hide, config.seed)


def _take_over(
    task: Finetune, source: Path, modalities: dict[str, Modality[Any, Any]], parts: list[str] | None
) -> LoadReport:
    """Copy the weights of a pretraining run into the task, and say which."""
    report = transfer(task, source, modalities, parts)
    if distributed.rank() == 0:
        logger.info("%s: %s", source, report)
    return report


def _cached(
    task: Finetune,
    recipe: Recipe,
    train: GoldDataset,
    val: GoldDataset,
    positions: np.ndarray,
    run: Path,
    device: torch.device,
) -> tuple[GoldDataset, GoldDataset]:
    """What is trained and validated on, with the outputs of the frozen encoders in the place of their inputs."""
    config = recipe.finetune
    frozen = config.frozen(list(train.modalities))
    shared = isinstance(config.cache, str)  # then it serves other draws of labels, too
    wanted = {"train": train.labelled(None, 0) if shared else positions, "val": val.labelled(None, 0)}
    splits = {"train": train, "val": val}
    cached = cache_features(task.model, config, frozen, splits, wanted, run, device, recipe.data.workers)
    return cached["train"], cached["val"]


def _check(recipe: Recipe, manifest: Manifest, modalities: list[str], source: Path | None) -> list[str]:
    """What is frozen. Raises ValueError for what would fail only after the heavy start."""
    if not manifest.labels:
        raise ValueError(f"dataset {manifest.name} has no labels")
    find_metric(manifest.target, recipe.finetune.metric)
    if recipe.finetune.hide and recipe.finetune.cache:
        raise ValueError("finetune.hide and finetune.cache: the cache holds samples as they are; leave one of them out")
    frozen = recipe.finetune.frozen(modalities)
    if source:
        pretrained_weights(source)
        return frozen
    untrained = [part for part in frozen if not recipe.model.modalities.get(part, {}).get("pretrained")]
    if untrained:
        raise ValueError(
            f"--from none with finetune.freeze={recipe.finetune.freeze} would freeze what was never trained: "
            f"{', '.join(untrained)}; give finetune.freeze=none, or a run"
        )
    return frozen


def make_task(recipe: Recipe, manifest: Manifest, device: str, precision: str = "float32") -> Finetune:
    """A fresh fine-tuning task for a dataset."""
    modalities = make_modalities(manifest, recipe.model.modalities)
    model = build_model(recipe.model, modalities, recipe.finetune.seed, device, precision)
    width, outputs = recipe.model.fusion.width, len(manifest.labels)
    return Finetune(model, width, outputs, recipe.finetune, recipe.finetune.seed, manifest.target)
