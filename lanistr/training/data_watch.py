"""Notices that training waits for data."""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence

from lanistr.batch import Loading


class DataWatch:
    """Notices that training waits for data, and says what to do about it.

    Args:
        workers: of the loader.
        clock: seconds.
    """

    STEPS = 10  # that must be slow; the first one, with all that starts up, does not count
    SHARE = 0.1  # of the time
    SILENCE = 1000  # steps until the next advice

    def __init__(self, workers: int, clock: Callable[[], float] = time.perf_counter):
        self.workers, self.clock = workers, clock
        self.recent: deque[tuple[float, float, Sequence[Loading]]] = deque(maxlen=self.STEPS)
        self.last: float | None = None
        self.silent = 0

    def note(self, waited: float, loadings: Sequence[Loading]) -> str | None:
        """Note the end of a step that waited so long for its batches; returns advice if it is time for it."""
        now = self.clock()
        if self.last is not None:
            self.recent.append((now - self.last, waited, loadings))
        self.last = now
        self.silent -= 1
        seconds = sum(step for step, _, _ in self.recent)
        share = sum(wait for _, wait, _ in self.recent) / seconds if seconds else 0.0
        if len(self.recent) < self.STEPS or share < self.SHARE or self.silent > 0:
            return None
        self.silent = self.SILENCE
        return self._advice(share)

    def _advice(self, share: float) -> str:
        every = [loading for _, _, loadings in self.recent for loading in loadings]
        stages = {
            "planning": sum(loading.plan_s for loading in every),
            "reading and decoding": sum(loading.read_s for loading in every),
            "collating": sum(loading.collate_s for loading in every),
        }
        parts = ", ".join(f"{1000 * seconds / len(self.recent):.0f} ms {name}" for name, seconds in stages.items())
        busiest = max(stages, key=lambda name: stages[name])
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        more = max(2, 2 * self.workers)
        advice = f"try data.workers={more} (now {self.workers}; {cores} cores)"
        if self.workers >= cores and busiest == "reading and decoding":
            advice = (
                f"all {cores} cores already load (data.workers={self.workers}): store images at the model's size, or put "
                "the shards on a faster disk"
            )
        return f"data is the bottleneck: {share:.0%} of the last {len(self.recent)} steps waited for it ({parts} per step); {advice}"
