"""What pretraining and fine-tuning share: the run folder, and a model for a dataset."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lanistr.config import DataConfig, OptimizerConfig, Recipe
from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.mixing import MixedDataset
from lanistr.data.reader import GoldDataset
from lanistr.manifest import Manifest
from lanistr.training import distributed
from lanistr.training.checkpoint import find_latest
from lanistr.training.transfer import save_schema

PACKAGES = ("lanistr", "torch", "deepspeed", "transformers", "numpy")


def check_run(run: Path, resuming: bool) -> bool:
    """Whether to resume.

    Args:
        run: run folder.
        resuming: what the user asked for.

    Returns:
        True where there is a checkpoint to go on from.

    Raises:
        ValueError: a folder with checkpoints and no ``--resume``.
    """
    found = find_latest(run)
    if found and not resuming:
        raise ValueError(f"{run} has a checkpoint of step {found.step}: give --resume auto, or another --run")
    return found is not None


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
    run: Path, recipe: Recipe, manifest: Manifest, ds_config: dict[str, Any], extra: dict[str, Any]
) -> None:
    """Write ``recipe.yaml``, ``schema.json``, ``ds_config.json`` and ``run.json`` (rank 0; the others wait)."""
    if distributed.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text(
            yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
        )
        save_schema(run, manifest)
        (run / "ds_config.json").write_text(json.dumps(ds_config, indent=1), encoding="utf-8")
        identity = {
            "dataset": manifest.name,
            "content_id": manifest.content_id,
            "labels": manifest.labels,
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
