"""The training loop. Read it first: pretraining and fine-tuning are this loop with another task."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from lanistr.batch import Batch
from lanistr.config import OptimizerConfig
from lanistr.data.loader import TrainLoader
from lanistr.training import distributed
from lanistr.training.checkpoint import resume, save_checkpoint
from lanistr.training.engine import Engine
from lanistr.training.flops import Useful
from lanistr.training.guard import Guard, check_agreement
from lanistr.training.monitor import Monitor
from lanistr.training.preemption import StopRequest
from lanistr.training.schedule import lr_at
from lanistr.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Validation(Protocol):
    """What looks at the model while it trains. All of it is called on every rank."""

    def begin(self, step: int) -> None:
        """Called with the steps done before the first one of this process."""
        ...

    def after_step(self, step: int) -> bool:
        """Called with the number of steps done; True ends the run."""
        ...

    def score(self, step: int) -> float | None:
        """After that many steps, more is better; None = not measured then."""
        ...


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
    about: dict[str, Any] | None = None,
    validation: Validation | None = None,
    useful: Useful | None = None,
    watch_collapse: bool = False,
) -> bool:
    """Train to the end of the run, or until a signal asks for a checkpoint and an early end.

    Args:
        engine: holds the task.
        loader: of this rank.
        config: schedule, checkpoints, seed.
        run: run folder.
        resuming: go on from the newest checkpoint.
        about: goes into every checkpoint: recipe, data, versions.
        validation: looks at the model after every step, may end the run, and scores checkpoints.
        useful: counts useful operations, for the log.
        watch_collapse: warn where embeddings collapse (pretraining).

    Returns:
        Whether the run is finished; False where a signal ended it early.

    Raises:
        ValueError: nothing to resume from; a step that is not finite; ranks that disagree; no room for the last
            checkpoint.
    """
    total = total_steps(loader, config)
    step = resume(run, engine) if resuming else 0
    monitor = Monitor(run, engine, loader, config, step, total, useful, watch_collapse=watch_collapse)
    guard = Guard(run, config.on_nonfinite)
    batches = loader.steps(step, total, engine.device)
    engine.module.train()
    if config.check_every:
        check_agreement(engine.module, step)
    if validation:
        validation.begin(step)
    finished = step >= total
    with StopRequest() as request, Watchdog(run, config.hang_after) as watchdog:
        while step < total:
            watchdog.note(step, "waiting for data")
            micro_batches, waited = _timed(batches)
            # Dropout is a function of (seed, step, rank), so that a resumed run repeats it.
            torch.manual_seed(hash((config.seed, step, distributed.rank())))
            lr = lr_at(step, total, config.lr, config.warmup, config.final_lr)
            watchdog.note(step, "training")
            monitor.begin(step)
            result = engine.train_step(micro_batches, lr, monitor.before_update)
            guard.check(step, result, micro_batches)
            monitor.record(step, lr, result, micro_batches, waited)
            step += 1
            if config.check_every and step % config.check_every == 0:
                check_agreement(engine.module, step)
            watchdog.note(step, "validating")
            finished = (validation.after_step(step) if validation else False) or step == total
            stop = request.agreed(engine.device)
            if step % config.save_every == 0 or finished or stop:
                watchdog.note(step, "saving")
                score = validation.score(step) if validation else None
                problem = save_checkpoint(run, engine, loader.state(step), config, about or {}, score)
                if problem and (finished or stop):
                    raise ValueError(f"step {step}: the last checkpoint could not be saved: {problem}")
            if finished or stop:
                break
    monitor.close()
    _report_end(step, total, request, loader, engine)
    return finished


def _timed(batches: Iterator[list[Batch]]) -> tuple[list[Batch], float]:
    """The micro-batches of the next step, and the seconds that they were waited for."""
    asked = time.perf_counter()
    return next(batches), time.perf_counter() - asked


def _report_end(step: int, total: int, request: StopRequest, loader: TrainLoader, engine: Engine) -> None:
    replaced = int(distributed.all_reduce_sum([len(loader.bad)], engine.device)[0])
    if distributed.rank() != 0:
        return
    if replaced:
        logger.warning(
            "%d bad samples were replaced on all ranks; their keys and reasons are in the log above", replaced
        )
    if step < total and request.acted:
        logger.info(
            "stopped by %s after step %d of %d, saved; --resume auto goes on",
            request.received or "a signal to another rank", step, total,
        )  # fmt: skip
