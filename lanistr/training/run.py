"""What pretraining and fine-tuning share: the run folder, and a model for a dataset."""

import json
import logging
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from lanistr.config import DataConfig, OptimizerConfig, Recipe
from lanistr.data.loader import Collator, LoaderState, TrainLoader
from lanistr.data.mixing import MixedDataset
from lanistr.data.reader import GoldDataset
from lanistr.manifest import Manifest
from lanistr.training import distributed
from lanistr.training.checkpoint import find_latest
from lanistr.training.transfer import save_schema

logger = logging.getLogger(__name__)
# What a resumed run may change: it decides how the work is done, watched and kept, not what is learnt.
MAY_CHANGE = {
    "data": {"path", "workers", "crc", "max_bad", "cache", "cache_gb"},
    "model": {"attention", "compile", "checkpoint_activations"},
    "task": {
        "micro_batch", "save_every", "log_every", "keep", "keep_best", "keep_hours", "eval_every", "eval_samples",
        "on_nonfinite", "check_every", "hang_after", "patience", "health_every", "peak_tflops",
    },
}  # fmt: skip
TOKENIZER = "tokenizer.json"
PACKAGES = ("lanistr", "torch", "deepspeed", "transformers", "numpy")


Resume = Literal["auto", "force"]


def check_run(run: Path, resume: Resume | None) -> bool:
    """Whether to resume.

    Args:
        run: run folder.
        resume: what the user asked for.

    Returns:
        True where there is a checkpoint to go on from.

    Raises:
        ValueError: a folder with checkpoints and no ``--resume``.
    """
    found = find_latest(run)
    if found and not resume:
        raise ValueError(f"{run} has a checkpoint of step {found.step}: give --resume auto, or another --run")
    return found is not None


def describe_checkpoint(recipe: Recipe, task: Literal["pretrain", "finetune"], manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint says about the run that it is of."""
    return {
        "task": task,
        "recipe": recipe.model_dump(mode="json"),
        "dataset": manifest.name,
        "content_id": manifest.content_id,
        "tokenizer": manifest.tokenizer.sha256 if manifest.tokenizer else None,
        "versions": _versions(),
    }


def check_resume(run: Path, about: dict[str, Any], state: LoaderState, force: bool) -> None:
    """Whether this run may go on from the newest checkpoint.

    Args:
        run: run folder with a checkpoint.
        about: of this run, from `describe_checkpoint`.
        state: of this run's loader.
        force: go on, and say what differs.

    Raises:
        ValueError: another task, dataset, tokenizer, recipe or order of the data, naming both values and the override.
    """
    found = find_latest(run)
    assert found is not None, "check_run comes first"
    then = found.loader_state
    if "recipe" not in found.meta:
        raise ValueError(f"{found.folder}: saved by another version of lanistr; start a new --run")
    differences = _differences(found.meta, about)
    differences += [difference for difference in then.differences(state) if difference not in differences]
    if not differences:
        return
    said = "; ".join(f"{name} was {then}, is {now}" for name, then, now in differences[:3])
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    if not force:
        raise ValueError(f"{found.folder} is of another run: {said}{more}; --resume force goes on all the same")
    if os.environ.get("RANK", "0") == "0":
        logger.warning("resumed by force: %s%s", said, more)


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = ("task", "content_id", "tokenizer")
    found = [(name, then.get(name), now[name]) for name in names if then.get(name) != now[name]]
    for block, free in (("data", "data"), ("model", "model"), ("objective", "objective"), (now["task"], "task")):
        old, new = (_flatten(about["recipe"].get(block, {}), block) for about in (then, now))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name) and name.split(".")[1] not in MAY_CHANGE.get(free, ()):
                found.append((name, old.get(name), new.get(name)))
    return found


def _flatten(tree: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {name: leaf for key, node in tree.items() for name, leaf in _flatten(node, f"{prefix}.{key}").items()}


def train_loader(
    dataset: GoldDataset | MixedDataset,
    collator: Collator,
    data: DataConfig,
    config: OptimizerConfig,
    positions: np.ndarray | None = None,
) -> TrainLoader:
    """This rank's loader, as the recipe says.

    Args:
        dataset: the train split, or a mix of several.
        collator: makes batches.
        data, config: blocks of the recipe.
        positions: a subset of the split (None = all of it).

    Raises:
        ValueError: as `TrainLoader` does.
    """
    rank, world, _ = distributed.world_from_environment()
    return TrainLoader(
        dataset,
        collator,
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        max_tokens=config.max_tokens,
        ranks=world,
        rank=rank,
        seed=config.seed,
        grouping=data.grouping,
        workers=data.workers,
        window=data.window,
        max_bad=data.max_bad,
        positions=positions,
    )


def describe_run(
    run: Path,
    recipe: Recipe,
    manifest: Manifest,
    ds_config: dict[str, Any],
    extra: dict[str, Any],
    tokenizer: bytes | None = None,
) -> None:
    """Write all that a run is, but for its weights (rank 0; the others wait).

    That is ``recipe.yaml``, ``schema.json``, ``tokenizer.json``, ``ds_config.json`` and ``run.json``.
    """
    if distributed.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text(
            yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
        )
        save_schema(run, manifest)
        if tokenizer:
            (run / TOKENIZER).write_bytes(tokenizer)
        (run / "ds_config.json").write_text(json.dumps(ds_config, indent=1), encoding="utf-8")
        identity = {
            "dataset": manifest.name,
            "content_id": manifest.content_id,
            "tokenizer": manifest.tokenizer.sha256 if manifest.tokenizer else None,
            "labels": manifest.labels,
            "target": manifest.target,
            "fit": manifest.fit,
            "ranks": distributed.world_size(),
            "versions": _versions(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            **extra,
        }
        (run / "run.json").write_text(json.dumps(identity, indent=1), encoding="utf-8")
    distributed.barrier()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a clone without an install
            found[package] = "source"
    return found


def read_run(run: Path) -> dict[str, Any]:
    """``run.json``. Raises ValueError where there is none."""
    path = run / "run.json"
    if not path.is_file():
        raise ValueError(f"{run}: no run.json; this is not a run folder")
    return json.loads(path.read_text(encoding="utf-8"))
