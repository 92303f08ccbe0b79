"""Paired timing, peak memory in a fresh process, and result files (contract 5)."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

ROOT = Path(__file__).resolve().parents[1]


def paired_ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Interleaved rounds; ratio = theirs / ours of CPU seconds (above 1: ours wins).

    Returns:
        ``{"ratio": {"median", "min", "max", "rounds"}, "ours_s": median, "theirs_s": median}``.
    """
    for warm_up in (ours, theirs):
        warm_up()
    seconds = interleaved({"ours": ours, "theirs": theirs}, rounds)
    return {
        "ratio": spread(seconds["ours"], seconds["theirs"]),
        "ours_s": statistics.median(seconds["ours"]),
        "theirs_s": statistics.median(seconds["theirs"]),
    }


def interleaved(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every step in every round; the order is reversed every other round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds):
        for name in list(steps)[:: -1 if round_ % 2 else 1]:
            seconds[name].append(cpu_seconds(steps[name]))
    return seconds


def spread(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Contract 5's ratio: theirs / ours, round by round."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "rounds": len(ratios)}


def cpu_seconds(function: Callable[[], Any]) -> float:
    """CPU seconds of one call (on GPUs: wall seconds, synchronised)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    function()
    return time.process_time() - start


# torch counts its CUDA attention kernels but not the CPU's.
@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(
    grad: tuple[int, ...],
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    return sdpa_flop_count(query, key, value) * 5 // 2  # the scores are computed anew


def flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of one call, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_bytes(function: Callable[[], Any]) -> int:
    """Peak memory of one call above what was there before; call it in a fresh process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


def in_fresh_process(script: str, arguments: list[str]) -> dict[str, Any]:
    """Run ``python script arguments`` and read the JSON on its last line."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
    }


def write_result(out: Path, suite: str, rows: list[dict[str, Any]]) -> None:
    """Write a contract 5 file atomically."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    result = {
        "suite": suite,
        "command": "python " + " ".join([str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]),
        "revision": revision or "unknown",
        "environment": environment(),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out)
