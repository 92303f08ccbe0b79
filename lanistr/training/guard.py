"""Never silently wrong: what is looked at in every step, and what happens then.

Incidents go to ``<run>/incidents/rank-<r>.jsonl``: each rank writes the keys of its own samples.
"""

import json
import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from lanistr.batch import Batch
from lanistr.training import distributed
from lanistr.training.engine import StepResult

logger = logging.getLogger(__name__)


class SpikeWatch:
    """Notices a loss far above those of the steps before.

    Far: ten times their median absolute deviation (which single spikes do not move) above their median.
    """

    STEPS = 64  # that are looked back on
    LEAST = 16  # before which nothing is said
    FAR = 10.0

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=self.STEPS)

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss is a spike; it then counts as one of the steps before."""
        usual = list(self.recent)
        self.recent.append(loss)
        if len(usual) < self.LEAST:
            return False
        median = statistics.median(usual)
        spread = statistics.median(abs(value - median) for value in usual)
        return loss > median + self.FAR * max(spread, 1e-3 * abs(median))


class Guard:
    """Judges each step's result by policy.

    Args:
        run: run folder.
        policy: ``stop`` or ``skip`` where a step is not finite.
    """

    IN_A_ROW = 10  # skipped steps, after which the run ends whatever the policy

    def __init__(self, run: Path, policy: str):
        self.path = run / "incidents" / f"rank-{distributed.rank()}.jsonl"
        self.policy, self.spikes, self.skipped = policy, SpikeWatch(), 0

    def check(self, step: int, result: StepResult, batches: Sequence[Batch]) -> None:
        """Judge a step (0-based).

        Raises:
            ValueError: on every rank, where the step was not finite and the policy is ``stop``, or too many were skipped.
        """
        if result.skipped or not math.isfinite(result.loss):
            self.skipped += 1
            self._report(step, "not finite", result, batches)
            self._stop_or_skip(step, result)
            return
        self.skipped = 0
        if self.spikes.is_spike(result.loss):
            self._report(step, "spike", result, batches)
            if distributed.rank() == 0:
                usual = statistics.median(self.spikes.recent)
                logger.warning(
                    "step %d: the loss jumped to %.4f (median before: %.4f); its samples are in %s",
                    step + 1, result.loss, usual, self.path.parent,
                )  # fmt: skip

    def _stop_or_skip(self, step: int, result: StepResult) -> None:
        said = f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}: not finite"
        where = f"its samples are in {self.path.parent}"
        if self.policy == "stop":
            raise ValueError(f"{said}; {where}; on_nonfinite=skip would go on without such steps")
        if self.skipped >= self.IN_A_ROW:
            raise ValueError(f"{said}, as the {self.IN_A_ROW - 1} before; {where}; try a lower lr or clip")
        if distributed.rank() == 0:
            logger.warning("%s; skipped; %s", said, where)

    def _report(self, step: int, what: str, result: StepResult, batches: Sequence[Batch]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {
            "step": step + 1,
            "what": what,
            "loss": result.loss,
            "terms": result.terms,
            "grad_norm": result.grad_norm,
            "keys": [key for batch in batches for key in batch.keys],
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def check_agreement(module: nn.Module, step: int) -> None:
    """Every rank must have bitwise the same parameters.

    Raises:
        ValueError: on every rank, naming the first parameter that differs, and where.
    """
    found = distributed.first_disagreement(dict(module.named_parameters()))
    if found:
        name, ranks = found
        raise ValueError(
            f"after step {step}: parameters differ between ranks; the first is {name}, on rank "
            f"{', '.join(map(str, ranks))}: nothing learnt since the last check can be trusted; go on from a checkpoint "
            "before it, and suspect memory, the network or an operator that is not deterministic"
        )
