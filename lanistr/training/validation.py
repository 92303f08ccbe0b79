"""Validation during pretraining: the same terms, over the same held-out samples and masks each time.

The training terms of a few steps are noisy: each step masks other cells of other samples. Here nothing but the weights
changes from one measurement to the next.
"""

import json
import logging
from pathlib import Path

import numpy as np
import torch

from lanistr.batch import to_device
from lanistr.config import PretrainConfig
from lanistr.data.loader import Collator, eval_batches
from lanistr.data.reader import GoldDataset
from lanistr.training import distributed
from lanistr.training.engine import Engine
from lanistr.training.monitor import cut_back

logger = logging.getLogger(__name__)
BATCH = 32


class Validator:
    """Measures at the beginning, every ``eval_every`` steps and at the end; rows go to ``<run>/validation.jsonl``.

    Args:
        engine: holds the task.
        val: the split; its first ``eval_samples`` samples are used.
        collator: of pretraining: two views.
        config: when and how much.
        run: run folder.
        total: steps of the whole run.
    """

    def __init__(
        self, engine: Engine, val: GoldDataset, collator: Collator, config: PretrainConfig, run: Path, total: int
    ):
        self.engine, self.val, self.collator, self.config, self.total = engine, val, collator, config, total
        self.positions = np.arange(min(val.n, config.eval_samples))
        self.path = run / "validation.jsonl"
        self.measured: tuple[int, float] | None = None

    def begin(self, step: int) -> None:
        """Call once, with the steps done: a resumed run drops the rows that it is about to repeat."""
        if step == 0:
            self.path.unlink(missing_ok=True)
            self.measure(0)
        elif distributed.rank() == 0:
            cut_back(self.path, step)

    def after_step(self, step: int) -> bool:
        """Measure if it is time; never ends the run."""
        assert self.config.eval_every
        if step % self.config.eval_every == 0 or step == self.total:
            self.measure(step)
        return False

    def score(self, step: int) -> float | None:
        """Minus the weighted sum of the terms after a step; None = not measured there."""
        return -self.measured[1] if self.measured and self.measured[0] == step else None

    def measure(self, step: int) -> dict[str, float]:
        """Mean of each term over the held-out samples of all ranks."""
        engine, task = self.engine, self.engine.module
        distributed.merge_batch_norm(task)
        ranks, rank = distributed.world_size(), distributed.rank()
        names = list(engine.weights)
        sums, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        task.eval()
        with torch.no_grad():
            for batch in eval_batches(
                self.val, self.collator, batch=BATCH, ranks=ranks, rank=rank, positions=self.positions
            ):
                for name, total in task(to_device(batch, engine.device)).items():
                    sums[name] += float(total)
                    counts[name] += batch.counts.get(name, 0.0)
        task.train()
        reduced = distributed.all_reduce_sum([*sums.values(), *counts.values()], engine.device)
        pairs = zip(names, reduced[: len(names)], reduced[len(names) :], strict=True)
        terms = {name: total / count for name, total, count in pairs if count}
        self.measured = step, sum(engine.weights[name] * value for name, value in terms.items())
        if rank == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "samples": len(self.positions), **terms}) + "\n")
            note = "" if step else "  (before training: batch norms know no data yet, what they feed may be huge)"
            logger.info("step %d: validation  %s%s", step, "  ".join(f"{n} {v:.4f}" for n, v in terms.items()), note)
        return terms
