"""The training loop. Read it first: pretraining and fine-tuning are this loop with another task."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lanistr.batch import Batch
from lanistr.config import OptimizerConfig
from lanistr.data.loader import TrainLoader
from lanistr.training import distributed
from lanistr.training.checkpoint import resume, save_checkpoint
from lanistr.training.engine import Engine, StepResult
from lanistr.training.monitor import Monitor
from lanistr.training.schedule import lr_at

logger = logging.getLogger(__name__)


def total_steps(loader: TrainLoader, config: OptimizerConfig) -> int:
    """Steps of the whole run: ``epochs`` or ``max_steps``, whichever comes first."""
    steps = loader.steps_per_epoch * config.epochs
    return min(steps, config.max_steps) if config.max_steps else steps


def train(
    engine: Engine,
    loader: TrainLoader,
    config: OptimizerConfig,
    run: Path,
    *,
    resuming: bool,
    begin: Callable[[int], None] | None = None,
    after_step: Callable[[int], bool] | None = None,
) -> int:
    """Train to the end of the run.

    Args:
        engine: holds the task.
        loader: of this rank.
        config: schedule, checkpoints, seed.
        run: run folder.
        resuming: go on from the newest checkpoint.
        begin: called on every rank with the steps done before the first one of this process.
        after_step: called on every rank with the number of steps done; True ends the run.

    Returns:
        Steps done.

    Raises:
        ValueError: nothing to resume from, or it does not fit; a loss that is not finite.
    """
    total = total_steps(loader, config)
    step = resume(run, engine, loader.state(0)) if resuming else 0
    manifest = loader.dataset.manifest
    bits = {name: manifest.bit(name) for name in loader.dataset.modalities}
    monitor = Monitor(run, step, total, config.log_every, bits, loader.workers)
    batches = loader.steps(step, total, engine.device)
    engine.module.train()
    if begin:
        begin(step)
    while step < total:
        asked = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - asked
        # Dropout is a function of (seed, step, rank), so that a resumed run repeats it.
        torch.manual_seed(hash((config.seed, step, distributed.rank())))
        lr = lr_at(step, total, config.lr, config.warmup, config.final_lr)
        result = engine.train_step(micro_batches, lr)
        _stop_if_not_finite(step, result, micro_batches)
        monitor.record(step, lr, result, micro_batches, waited)
        step += 1
        stop = after_step(step) if after_step else False
        if step % config.save_every == 0 or step == total or stop:
            save_checkpoint(run, engine, loader.state(step), config.keep)
        if stop:
            break
    monitor.close()
    replaced = int(distributed.all_reduce_sum([len(loader.bad)], engine.device)[0])
    if replaced and distributed.rank() == 0:
        logger.warning(
            "%d bad samples were replaced on all ranks; their keys and reasons are in the log above", replaced
        )
    return step


def _stop_if_not_finite(step: int, result: StepResult, micro_batches: Sequence[Batch]) -> None:
    if not abs(result.loss) < float("inf"):
        keys = ", ".join(key for batch in micro_batches for key in batch.keys)
        raise ValueError(f"step {step}: loss is {result.loss}; terms {result.terms}; samples of this rank: {keys}")
