"""What an operator sees: one line per interval and ``metrics.jsonl`` on rank 0, about all ranks.

Sums (samples, tokens, presence) are over ranks; waits and memory are the largest of any rank, because the others wait for it.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from lanistr.batch import Batch
from lanistr.config import OptimizerConfig
from lanistr.data.loader import TrainLoader
from lanistr.training import distributed
from lanistr.training.data_watch import DataWatch
from lanistr.training.engine import Engine, StepResult
from lanistr.training.flops import Useful, measured_peak
from lanistr.training.health import CollapseWatch, Health


class Monitor:
    """Collects the steps of an interval and reports them together. Every rank must call every method in every step.

    An interval also ends at each checkpoint, so that the rows of a resumed run are those of one that never stopped.

    Args:
        run: run folder; ``metrics.jsonl`` is appended to, and cut back to ``start`` steps at a resume.
        engine, loader, config: of the run.
        start, total: steps already done, and of the whole run.
        useful: counts the useful operations, for the utilisation; None = not reported.
        watch_collapse: say so where embeddings collapse: right for pretraining only, since a classifier is meant to pull
            the samples of a class together.
    """

    def __init__(
        self,
        run: Path,
        engine: Engine,
        loader: TrainLoader,
        config: OptimizerConfig,
        start: int,
        total: int,
        useful: Useful | None = None,
        *,
        watch_collapse: bool = False,
    ):
        self.engine, self.config, self.total, self.useful = engine, config, total, useful
        manifest = loader.dataset.manifest
        self.bits = {name: manifest.bit(name) for name in loader.dataset.modalities}
        self.data_watch, self.health = DataWatch(loader.workers), Health(engine, config.health_every)
        self.path = run / "metrics.jsonl"
        self.active = distributed.rank() == 0
        self.file: TextIO | None = None
        self.step, self.lr = start, 0.0
        self.flops_per_token = self.peak = 0.0
        self.collapse_watch: CollapseWatch | None = None
        if self.active:
            earlier = cut_back(self.path, start)
            self.collapse_watch = CollapseWatch(earlier) if watch_collapse else None
            self.file = self.path.open("a", encoding="utf-8")
        self._reset()

    def _reset(self) -> None:
        self.results: list[StepResult] = []
        self.samples = self.tokens = 0
        self.waited = self.health_s = 0.0
        self.figures: dict[str, float] = {}
        self.present = dict.fromkeys(self.bits, 0)
        self.started = time.perf_counter()

    def begin(self, step: int) -> None:
        """Before step ``step`` (0-based)."""
        self.health.begin(step)

    @property
    def before_update(self) -> Callable[[], None]:
        """For `Engine.train_step`."""
        return self.health.before_update

    def record(self, step: int, lr: float, result: StepResult, batches: Sequence[Batch], waited: float) -> None:
        """Note a step (0-based) that took ``waited`` seconds to get its data."""
        self.step, self.lr = step + 1, lr
        self.results.append(result)
        self.waited += waited
        for batch in batches:
            self.samples += batch.size
            self.tokens += len(batch.fusion.token_weight_T)
            for name, bit in self.bits.items():
                self.present[name] += int((batch.presence_B & bit).bool().sum())
        self._look(batches)
        if self.active:
            self._say(self.data_watch.note(waited, [batch.loading for batch in batches]))
        if self.step % self.config.log_every == 0 or self.step % self.config.save_every == 0 or self.step == self.total:
            self._report()

    def _look(self, batches: Sequence[Batch]) -> None:
        figures = self.health.end()
        if not figures:
            return
        self.figures, seconds = figures, self.health.seconds
        if self.active:
            started = time.perf_counter()
            if self.useful:
                self.flops_per_token = self.useful.per_token(batches[0])
            self._say(self.collapse_watch.note(self.step, figures) if self.collapse_watch else None)
            seconds += time.perf_counter() - started
        self.health_s += seconds

    def _say(self, advice: str | None) -> None:
        if advice:
            print(f"step {self.step}/{self.total}  {advice}", file=sys.stderr, flush=True)

    def _report(self) -> None:
        seconds = time.perf_counter() - self.started
        sums = distributed.all_reduce_sum([self.samples, self.tokens, *self.present.values()], self.engine.device)
        most = distributed.all_reduce_max([self.waited, *peak_memory_mib(self.engine.device)], self.engine.device)
        if self.active:
            row = self._row(seconds, sums, most)
            clean = {name: None if _is_bad(value) else value for name, value in row.items()}
            assert self.file is not None
            self.file.write(json.dumps(clean) + "\n")
            self.file.flush()
            self.engine.track(
                self.step, {name: value for name, value in clean.items() if name != "step" and value is not None}
            )
            print(console_line(clean, self.total, list(self.results[0].terms)), file=sys.stderr, flush=True)
        self._reset()

    def _row(self, seconds: float, sums: Sequence[float], most: Sequence[float]) -> dict[str, Any]:
        samples, tokens, *present = sums
        terms = {name: _mean([r.terms[name] for r in self.results]) for name in self.results[0].terms}
        row: dict[str, Any] = {"step": self.step, "loss": _mean([r.loss for r in self.results]), **terms}
        row |= {
            "lr": self.lr,
            "grad_norm": _mean([r.grad_norm for r in self.results]),
            "samples": int(samples),
            "seconds": seconds,
            "samples_per_s": samples / seconds,
            "tokens_per_s": tokens / seconds,
            "data_wait": most[0] / seconds,
            "memory_mib": most[1],
            **{f"present/{name}": n / max(1, samples) for name, n in zip(self.present, present, strict=True)},
        }
        if self.engine.device.type == "cuda":
            row["gpu_memory_mib"] = most[2]
        if self.flops_per_token:
            row["useful_tflops"] = self.flops_per_token * row["tokens_per_s"] / distributed.world_size() / 1e12
            row["utilisation"] = row["useful_tflops"] / self._peak_tflops()
        if self.figures:
            row |= {**self.figures, "health_cost": self.health_s / seconds}
        return row

    def _peak_tflops(self) -> float:
        if not self.peak:
            dtype = torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32
            self.peak = self.config.peak_tflops or measured_peak(self.engine.device, dtype) / 1e12
        return self.peak

    def close(self) -> None:
        """Report what is left of the last interval, and close the file."""
        if self.results:
            self._report()
        if self.file:
            self.file.close()


def console_line(row: dict[str, Any], total: int, terms: Sequence[str]) -> str:
    """A row of ``metrics.jsonl`` in one line; details stay in the file."""
    parts = [f"step {row['step']}/{total}  loss {'-' if row['loss'] is None else format(row['loss'], '.4f')}"]
    parts += [f"{name} {row[name]:.4f}" for name in terms if row[name] is not None]
    parts += [f"lr {row['lr']:.2e}", f"{row['samples_per_s']:.1f} samples/s", f"{row['tokens_per_s']:.0f} tokens/s"]
    parts.append(f"data wait {row['data_wait']:.1%}")
    if "utilisation" in row:
        parts.append(f"useful {row['utilisation']:.0%} of peak")
    parts.append(f"{row.get('gpu_memory_mib', row['memory_mib']) / 1024:.2f} GiB")
    if "rank/fused" in row:
        parts.append(
            f"rank {row['rank/fused']:.1f} of {row['health_samples']:.0f} samples, spread {row['spread/fused']:.0%}"
        )
    norms = [f"{k.partition('/')[2]} {_short(v)}" for k, v in row.items() if k.startswith("grad_norm/")]
    if norms:
        parts.append(f"gradient {' '.join(norms)}")
    return "  ".join(parts)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _is_bad(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def peak_memory_mib(device: torch.device) -> tuple[float, float]:
    """Largest memory of this process so far (VmHWM), and of PyTorch's on the GPU."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    host = next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0.0)
    gpu = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    return host, gpu


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def cut_back(path: Path, steps: int) -> list[dict[str, Any]]:
    """Drop the rows after ``steps`` (they are about to be repeated), and a half-written last line; returns the rest."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= steps:
            kept.append(row)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)
    return kept
