"""Checkpoints: published atomically, so that ``latest`` always names a complete one.

``<run>/checkpoints/step-00000100/``:

* ``engine/``: DeepSpeed's files of all ranks, for a resume on the same layout.
* ``weights.safetensors``, ``moments.safetensors``: float32 parameters and buffers, and AdamW's moments: whole, without
  DeepSpeed and without pickle, for a resume on any other number of ranks, stage or precision.
* ``buffers/rank-0000.safetensors``: each rank's own batch-norm statistics; those in the other files are merged. A
  checkpoint changes nothing in the run that it is taken of.
* ``meta.json``, written last: step, layout, loader state, recipe, identity of the data, versions, and the size and
  sha256 of every file.

All of it is written into a hidden folder, synced, and renamed. Whatever else starts with a dot is debris.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lanistr.config import OptimizerConfig
from lanistr.data.loader import LoaderState
from lanistr.modalities.loading import LoadReport
from lanistr.training import distributed
from lanistr.training.durable import digest, sync, write_durably
from lanistr.training.engine import Engine
from lanistr.training.retention import Saved, surplus

logger = logging.getLogger(__name__)
WEIGHTS = "weights.safetensors"
MOMENTS = "moments.safetensors"


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
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.folder}: saved by another version of lanistr ({error}); start a new --run"
            ) from None

    def damage(self) -> str | None:
        """What is wrong with its files, or None; reads all of them."""
        for name, expected in self.meta.get("files", {}).items():
            path = self.folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if digest(path) != expected:
                return f"{name} has another sha256 than when it was saved"
        return None


def save_checkpoint(
    run: Path,
    engine: Engine,
    state: LoaderState,
    config: OptimizerConfig,
    about: dict[str, Any],
    score: float | None = None,
) -> str | None:
    """Write and publish a checkpoint after ``state.step`` steps. Every rank must call it.

    The run is not changed by it. Where a rank cannot write (a full disk, say), nothing is published, what was there
    before stays, and all ranks are told.

    Args:
        run: run folder.
        engine: to save.
        state: of the loader.
        config: which checkpoints stay.
        about: recipe, data and versions, for `lanistr.training.run.check_resume`.
        score: on validation, more is better; None = not measured after this step.

    Returns:
        None, or what went wrong, the same on every rank.
    """
    parent = run / "checkpoints"
    hidden = parent / f".step-{state.step:08d}"
    problem = _together(lambda: _make_room(hidden) if distributed.rank() == 0 else None)
    files: dict[str, Any] = {}
    if not problem:
        problem, files = _write(hidden, engine)
    meta = {
        "step": state.step,
        "time": time.time(),
        "score": score,
        "layout": engine.layout,
        "updates": engine.updates,
        "loader": asdict(state),
        **about,
        "files": files,
    }
    if not problem:
        problem = _together(lambda: _publish(hidden, meta, config) if distributed.rank() == 0 else None)
    if problem and distributed.rank() == 0:
        shutil.rmtree(hidden, ignore_errors=True)
        logger.error("step %d: checkpoint NOT saved: %s; the last good one stays", state.step, problem)
    return problem


def _together(work: Callable[[], None]) -> str | None:
    """Do this rank's part; None where every rank has succeeded, else what the first one says that has not."""
    try:
        work()
        said = None
    except Exception as error:  # whatever it is, no rank may be left waiting for this one
        said = f"{type(error).__name__}: {error}"
    return next((f"rank {rank}: {s}" for rank, s in enumerate(distributed.gather_objects(said)) if s), None)


def _make_room(hidden: Path) -> None:
    parent = hidden.parent
    parent.mkdir(parents=True, exist_ok=True)
    for debris in parent.glob(".step-*"):
        shutil.rmtree(debris)
    for folder in ("engine", "buffers"):
        (hidden / folder).mkdir(parents=True)


def _write(hidden: Path, engine: Engine) -> tuple[str | None, dict[str, Any]]:
    """All ranks' files; returns the problem, and size and checksum of each file by name."""
    own = engine.buffers()
    distributed.merge_batch_norm(engine.module)
    shards = engine.save(hidden)
    weights, moments = engine.full_weights(), engine.full_moments()
    engine.set_buffers(own)
    files: dict[str, Any] = {}

    def write() -> None:
        written = shards.finish()
        for name, tensors in ((buffers_file(distributed.rank()), own), (WEIGHTS, weights), (MOMENTS, moments)):
            if distributed.rank() == 0 or tensors is own:
                save_file(tensors, str(hidden / name))
                written.append(hidden / name)
        for path in written:
            sync(path)
            files[str(path.relative_to(hidden))] = digest(path)

    problem = _together(write)
    every: dict[str, Any] = {}
    for of_rank in distributed.gather_objects(files):
        every |= of_rank
    return problem, every


def buffers_file(rank: int) -> str:
    """Where a rank's own buffers are."""
    return f"buffers/rank-{rank:04d}.safetensors"


def _publish(hidden: Path, meta: dict[str, Any], config: OptimizerConfig) -> None:
    parent, final = hidden.parent, hidden.with_name(hidden.name[1:])
    write_durably(hidden / "meta.json", json.dumps(meta, indent=1))
    for folder in ("engine", "buffers"):
        sync(hidden / folder)
    if final.exists():  # of a run that went another way
        _discard(final)
    os.replace(hidden, final)
    sync(parent)
    write_durably(parent / "latest", final.name)
    saved = [Saved(c.step, c.meta["time"], c.meta["score"]) for c in find_all(parent.parent) if "time" in c.meta]
    for step in surplus(saved, config.keep, config.keep_best, config.keep_hours):
        _discard(parent / f"step-{step:08d}")


def _discard(folder: Path) -> None:
    """Hide, then remove: a kill in between leaves no half of a checkpoint that looks whole."""
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


def find_all(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, newest first."""
    found = []
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        if (folder / "meta.json").is_file():
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            found.append(Checkpoint(folder, meta["step"], meta))
    return found


def find_latest(run: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None."""
    return next(iter(find_all(run)), None)


def find_intact(run: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are as they were saved; those above it are set aside, and said so."""
    for found in find_all(run):
        damage = found.damage()
        if damage is None:
            write_durably(found.folder.parent / "latest", found.folder.name)
            return found
        aside = found.folder.with_name(f".damaged-{found.folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(found.folder, aside)
        logger.warning("%s is damaged: %s; set aside as %s; trying the one before", found.folder, damage, aside.name)
    return None


def resume(run: Path, engine: Engine) -> int:
    """Load the newest intact checkpoint; returns the step to go on with. Every rank must call it.

    On the layout that saved it (ranks, stage, offload, precision) DeepSpeed's files are used, and the run goes on
    bitwise; on any other the whole states.

    Raises:
        ValueError: no checkpoint.
    """
    chosen = None
    if distributed.rank() == 0:
        found = find_intact(run)
        chosen = found.folder.name if found else None
    chosen = distributed.gather_objects(chosen)[0]
    if chosen is None:
        raise ValueError(f"{run}: nothing to resume from: no complete and intact checkpoint; leave out --resume")
    folder = run / "checkpoints" / chosen
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["layout"] == engine.layout:
        engine.load(folder)
        engine.set_buffers(load_file(str(folder / buffers_file(distributed.rank()))))
    else:
        engine.restore(folder / WEIGHTS, folder / MOMENTS, meta["updates"])
    if distributed.rank() == 0:
        changed = [
            f"{name} {meta['layout'].get(name)} -> {now}"
            for name, now in engine.layout.items()
            if meta["layout"].get(name) != now
        ]
        logger.info("resumed after step %d from %s%s", meta["step"], folder, f" ({', '.join(changed)})" * bool(changed))
    return meta["step"]


def save_weights(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(weights, str(temporary))
    sync(temporary)
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
