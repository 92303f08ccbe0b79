"""Pretraining: a recipe, a dataset and a ZeRO configuration become a run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lanistr.config import PretrainConfig, Recipe
from lanistr.data.loader import Collator
from lanistr.data.mixing import MixedDataset
from lanistr.data.reader import GoldDataset, load_manifest, load_tokenizer_bytes, open_split
from lanistr.data.streams import philox
from lanistr.modalities import make_modalities
from lanistr.modalities.base import Modality
from lanistr.model.lanistr import build_model
from lanistr.tasks import Pretrain
from lanistr.training import distributed
from lanistr.training.ds_config import fill_config
from lanistr.training.engine import Engine, start
from lanistr.training.features import cache_features
from lanistr.training.flops import Useful
from lanistr.training.loop import total_steps, train
from lanistr.training.run import Resume, check_resume, check_run, describe_checkpoint, describe_run, train_loader
from lanistr.training.summary import best_validation, write_summary
from lanistr.training.tracking import fill_trackers
from lanistr.training.transfer import pretrained_encoders
from lanistr.training.validation import Validator


def pretrain(recipe: Recipe, data: Path, run: Path, ds_config: Path, *, resume: Resume | None) -> bool:
    """Pretrain on the train split of a gold dataset.

    Args:
        recipe: its ``pretrain`` block counts.
        data: gold dataset.
        run: where the run goes.
        ds_config: ZeRO configuration.
        resume: go on from the newest checkpoint, if there is one.

    Returns:
        Whether the run is finished (only then it has a summary); False where a signal ended it early.

    Raises:
        ValueError: anything that a user can put right.
    """
    config = recipe.pretrain
    manifest = load_manifest(data, recipe.data)
    modalities = make_modalities(manifest, recipe.model.modalities)
    _check(recipe, list(modalities), manifest.n("val"))
    resuming = check_run(run, resume)
    _, world, _ = distributed.world_from_environment()
    dataset, positions = _open(data, recipe, modalities)
    collator = Collator(modalities, views=2, seed=config.seed, alone=tuple(recipe.objective.cross))
    loader = train_loader(dataset, collator, recipe.data, config, positions)
    about = describe_checkpoint(recipe, "pretrain", manifest)
    if resuming:
        check_resume(run, about, loader.state(0), resume == "force")
    joined = distributed.is_joined()
    device = start()
    filled = fill_config(ds_config, recipe.name, config, world)
    fill_trackers(filled, ds_config, run)
    model = build_model(recipe.model, modalities, config.seed, device.type, config.precision)
    task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, config.seed, config.freeze)
    val = open_split(data, "val", modalities, recipe.data) if manifest.n("val") else None
    if config.cache:
        assert val, "refused before"
        assert isinstance(dataset, GoldDataset), "refused before"
        dataset, val = _cached(task, recipe, dataset, val, positions, run, device)
        collator = replace(collator, modalities=dataset.modalities)
        loader = train_loader(dataset, collator, recipe.data, config, positions)
    describe_run(run, recipe, manifest, filled, {"task": "pretrain"}, load_tokenizer_bytes(data, recipe.data, manifest))
    shares = dict.fromkeys(pretrained_encoders(task), config.pretrained_lr)
    engine = Engine(task, filled, device, config.weight_decay, shares)
    total = total_steps(loader, config)
    validator = Validator(engine, val, collator, config, run, total) if config.eval_every and val else None
    finished = train(
        engine,
        loader,
        config,
        run,
        resuming=resuming,
        about=about,
        validation=validator,
        useful=None if config.cache else Useful(recipe, manifest.modalities),  # it counts encoders that do not run
        watch_collapse=True,
    )
    if finished and distributed.rank() == 0:
        write_summary(run, {"task": "pretrain", "best": best_validation(run, engine.weights)})
    if not joined:
        distributed.shutdown()
    return finished


def _open(
    data: Path, recipe: Recipe, modalities: dict[str, Modality[Any, Any]]
) -> tuple[GoldDataset | MixedDataset, np.ndarray | None]:
    """What is trained on, and the positions of it that are used (None = all)."""
    dataset = open_split(data, "train", modalities, recipe.data)
    positions = choose_samples(dataset, recipe.pretrain)
    if not recipe.data.mix:
        return dataset, positions
    if positions is not None:
        raise ValueError("pretrain.share and pretrain.complete_only choose samples of one dataset: give no data.mix")
    others = [open_split(path, "train", modalities, recipe.data) for path in recipe.data.mix]
    return MixedDataset([dataset, *others], [1.0, *recipe.data.mix.values()]), None


def _cached(
    task: Pretrain,
    recipe: Recipe,
    train: GoldDataset,
    val: GoldDataset,
    positions: np.ndarray | None,
    run: Path,
    device: torch.device,
) -> tuple[GoldDataset, GoldDataset]:
    """What is trained and validated on, with the outputs of the frozen encoders in the place of their inputs."""
    config = recipe.pretrain
    shared = isinstance(config.cache, str)  # then it serves other shares of train, too
    wanted = {
        "train": np.arange(train.n) if shared or positions is None else positions,
        "val": np.arange(min(val.n, config.eval_samples)),
    }
    splits = {"train": train, "val": val}
    cached = cache_features(task.model, config, config.freeze, splits, wanted, run, device, recipe.data.workers)
    return cached["train"], cached["val"]


def _check(recipe: Recipe, modalities: list[str], held_out: int) -> None:
    """Raises ValueError for frozen parts, or a cache of them, that make no sense."""
    config = recipe.pretrain
    for name in config.freeze:
        if name not in modalities:
            raise ValueError(f"pretrain.freeze: no modality {name!r}; there are {', '.join(modalities)}")
    published(recipe, config.freeze)
    if config.cache and recipe.data.mix:
        raise ValueError("pretrain.cache holds samples of one dataset: give no data.mix")
    if config.cache and not held_out:
        raise ValueError("pretrain.cache: the dataset has no val split")


def published(recipe: Recipe, frozen: Sequence[str]) -> list[str]:
    """The modalities that pretraining leaves as they are. Raises ValueError for one that was never trained."""
    for name in frozen:
        if not recipe.model.modalities[name].get("pretrained"):
            raise ValueError(f"pretrain.freeze: {name} was never trained; give model.modalities.{name}.pretrained")
    return list(frozen)


def choose_samples(dataset: GoldDataset, config: PretrainConfig) -> np.ndarray | None:
    """Positions that ``share`` and ``complete_only`` leave, ascending; None = all.

    Raises:
        ValueError: none is left.
    """
    if config.share == 1 and not config.complete_only:
        return None
    positions_N = np.arange(dataset.n)
    if config.complete_only:
        every = sum(dataset.index.bits.values())
        positions_N = positions_N[dataset.presence == every]
    order = philox("share", dataset.content_id, config.seed).permutation(len(positions_N))
    chosen = np.sort(positions_N[order[: round(config.share * len(order))]])
    if not len(chosen):
        raise ValueError(f"no sample of train is left by share {config.share}, complete_only {config.complete_only}")
    return chosen
