"""What an operator sees: the progress line and ``metrics.jsonl``, both on rank 0 only."""

import json
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from lanistr.batch import Batch, Loading
from lanistr.training import distributed
from lanistr.training.engine import StepResult


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


class Monitor:
    """Collects the steps of an interval and reports them together.

    Args:
        run: run folder; ``metrics.jsonl`` is appended to, and cut back to ``start`` steps at a resume.
        start: steps already done.
        total: steps of the run.
        every: steps per report.
        modalities: bits to report presence of, by name.
        workers: of the loader, for its advice.
    """

    def __init__(self, run: Path, start: int, total: int, every: int, modalities: dict[str, int], workers: int = 0):
        self.data_watch = DataWatch(workers)
        self.total, self.every, self.modalities = total, every, modalities
        self.path = run / "metrics.jsonl"
        self.active = distributed.rank() == 0
        self.file: TextIO | None = None
        if self.active:
            cut_back(self.path, start)
            self.file = self.path.open("a", encoding="utf-8")
        self._reset()

    def _reset(self) -> None:
        self.results: list[StepResult] = []
        self.samples = self.tokens = 0
        self.waited = 0.0
        self.present = dict.fromkeys(self.modalities, 0)
        self.started = time.perf_counter()

    def record(self, step: int, lr: float, result: StepResult, batches: Sequence[Batch], waited: float) -> None:
        """Note a step (0-based) that took ``waited`` seconds to get its data."""
        if not self.active:
            return
        self.results.append(result)
        self.waited += waited
        advice = self.data_watch.note(waited, [batch.loading for batch in batches])
        if advice:
            print(f"step {step + 1}/{self.total}  {advice}", file=sys.stderr, flush=True)
        for batch in batches:
            self.samples += batch.size
            self.tokens += len(batch.fusion.token_weight_T)
            for name, bit in self.modalities.items():
                self.present[name] += int((batch.presence_B & bit).bool().sum())
        if (step + 1) % self.every == 0 or step + 1 == self.total:
            self._report(step + 1, lr)
            self._reset()

    def _report(self, step: int, lr: float) -> None:
        seconds = time.perf_counter() - self.started
        world = distributed.world_size()
        row: dict[str, Any] = {"step": step, "loss": _mean([r.loss for r in self.results])}
        row |= {name: _mean([r.terms[name] for r in self.results]) for name in self.results[0].terms}
        row |= {
            "lr": lr,
            "grad_norm": _mean([r.grad_norm for r in self.results]),
            "samples_per_s": self.samples * world / seconds,
            "tokens_per_s": self.tokens * world / seconds,
            "data_wait": self.waited / seconds,
            "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **{f"present_{name}": n / max(1, self.samples) for name, n in self.present.items()},
        }
        assert self.file is not None
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        terms = "  ".join(f"{n} {row[n]:.4f}" for n in self.results[0].terms if row[n] is not None)
        print(
            f"step {step}/{self.total}  loss {row['loss']:.4f}  {terms}  lr {lr:.2e}  "
            f"{row['samples_per_s']:.1f} samples/s  {row['tokens_per_s']:.0f} tokens/s  data wait {row['data_wait']:.1%}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Close the file."""
        if self.file:
            self.file.close()


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def cut_back(path: Path, steps: int) -> None:
    """Drop the rows after ``steps`` (they are about to be repeated), and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= steps:
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
