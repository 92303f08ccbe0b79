"""Checkpoints: published atomically, so that ``latest`` always names a complete one.

``<run>/checkpoints/step-00000100/``: ``engine/`` (DeepSpeed's files of all ranks), ``weights.safetensors`` (float32
parameters and buffers, readable without DeepSpeed) and ``meta.json``, written last. A folder that a kill left behind
has a name that starts with a dot.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lanistr.data.loader import LoaderState
from lanistr.modalities.loading import LoadReport
from lanistr.training import distributed
from lanistr.training.engine import Engine

WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk: its folder, the steps done, and its ``meta.json``."""

    folder: Path
    step: int
    meta: dict[str, Any]

    @property
    def loader_state(self) -> LoaderState:
        """Where the data was. Raises ValueError for a checkpoint of another version."""
        try:
            return LoaderState(**self.meta["loader"])
        except TypeError as error:
            raise ValueError(
                f"{self.folder}: saved by another version of lanistr ({error}); start a new --run"
            ) from None


def save_checkpoint(run: Path, engine: Engine, state: LoaderState, keep: int) -> None:
    """Write and publish a checkpoint after ``state.step`` steps. Every rank must call it.

    Args:
        run: run folder.
        engine: to save; batch-norm statistics are merged across ranks first.
        state: of the loader.
        keep: how many checkpoints stay.
    """
    parent = run / "checkpoints"
    name = f"step-{state.step:08d}"
    hidden = parent / f".{name}"
    if distributed.rank() == 0:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
    distributed.barrier()
    distributed.merge_batch_norm(engine.module)
    engine.save(hidden)
    weights = engine.full_weights()
    distributed.barrier()
    if distributed.rank() == 0:
        save_file(weights, str(hidden / WEIGHTS))
        meta = {"step": state.step, "world": distributed.world_size(), "loader": asdict(state)}
        _write_durably(hidden / "meta.json", json.dumps(meta, indent=1))
        for file in hidden.rglob("*"):
            if file.is_file():
                _sync(file)
        shutil.rmtree(parent / name, ignore_errors=True)
        os.replace(hidden, parent / name)
        _sync(parent)
        _write_durably(parent / "latest", name)
        for old in sorted(parent.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_latest(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        if (folder / "meta.json").is_file():
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            return Checkpoint(folder, meta["step"], meta)
    return None


def resume(run: Path, engine: Engine, state: LoaderState) -> int:
    """Load the newest checkpoint; returns the step to go on with.

    Raises:
        ValueError: no checkpoint; another dataset, plan or number of ranks.
    """
    found = find_latest(run)
    if found is None:
        raise ValueError(f"{run}: nothing to resume from: no complete checkpoint; leave out --resume")
    found.loader_state.check(state)
    world = distributed.world_size()
    if found.meta["world"] != world:
        raise ValueError(f"{found.folder}: saved by {found.meta['world']} ranks, this run has {world}; use as many")
    engine.load(found.folder)
    return found.step


def save_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(weights, str(temporary))
    _sync(temporary)
    os.replace(temporary, path)


def load_weights(module: nn.Module, path: Path) -> LoadReport:
    """Copy every tensor of the same name from a safetensors file into the module.

    Raises:
        ValueError: a tensor of the same name and another shape (another recipe, or another dataset's schema).
    """
    return copy_weights(module, load_file(str(path)), str(path), [])


@torch.no_grad()
def copy_weights(module: nn.Module, stored: dict[str, torch.Tensor], origin: str, notes: list[str]) -> LoadReport:
    """As `load_weights`, from tensors that come from ``origin``; ``notes`` go into the report."""
    targets = named_tensors(module)
    loaded = [name for name in targets if name in stored]
    for name in loaded:
        if targets[name].shape != stored[name].shape:
            raise ValueError(
                f"{origin}: {name} has shape {tuple(stored[name].shape)}, the model {tuple(targets[name].shape)}; "
                "same recipe and dataset schema (`fit_from`)?"
            )
        targets[name].copy_(stored[name])
    new, left_out = [n for n in targets if n not in stored], [n for n in stored if n not in targets]
    return LoadReport(loaded, new, left_out, notes)


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own parameters and persistent buffers."""
    kept = module.state_dict().keys()
    return dict(module.named_parameters()) | {n: b for n, b in module.named_buffers() if n in kept}
