"""``summary.json``: a run in a few numbers, made from the rows that it wrote.

A resumed run goes on with the same files, cut back to its checkpoint, so that steps that were done twice count once.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lanistr.training.durable import write_durably


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file, without a half-written last one; none where there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def summarise(run: Path) -> dict[str, Any]:
    """Steps, samples, time, throughput, memory and last terms of a run.

    Returns:
        ``wall_s`` is what the steps took, with the validation and saving between them, without start-up; medians are
        over intervals; ``data_wait`` is the share of ``wall_s``; peaks are of the largest rank. Keys whose rows are
        missing are left out.
    """
    rows = read_rows(run / "metrics.jsonl")
    if not rows:
        return {"steps": 0}
    wall = sum(row["seconds"] for row in rows)
    summary: dict[str, Any] = {
        "steps": rows[-1]["step"],
        "samples": sum(row["samples"] for row in rows),
        "wall_s": wall,
        "loss": rows[-1]["loss"],
        "terms": _terms(rows[-1]),
        "data_wait": sum(row["data_wait"] * row["seconds"] for row in rows) / wall,
    }
    for name in ("samples_per_s", "tokens_per_s", "useful_tflops", "utilisation"):
        summary |= _over(rows, name, statistics.median)
    for name in ("memory_mib", "gpu_memory_mib"):
        summary |= _over(rows, name, max)
    return summary


def _terms(row: Mapping[str, Any]) -> dict[str, float]:
    """The loss terms stand between the loss and the learning rate."""
    names = list(row)
    return {name: row[name] for name in names[names.index("loss") + 1 : names.index("lr")]}


def _over(rows: Sequence[Mapping[str, Any]], name: str, function: Any) -> dict[str, float]:
    values = [row[name] for row in rows if row.get(name) is not None]
    return {name: function(values)} if values else {}


def best_validation(run: Path, weights: Mapping[str, float]) -> dict[str, float] | None:
    """The row of ``validation.jsonl`` with the smallest weighted sum of terms, and that sum; the start does not count."""
    rows = [row for row in read_rows(run / "validation.jsonl") if row["step"] > 0]
    scored = [{"loss": sum(w * row[n] for n, w in weights.items() if n in row), **row} for row in rows]
    return min(scored, key=lambda row: row["loss"]) if scored else None


def write_summary(run: Path, extra: Mapping[str, Any]) -> None:
    """Write ``<run>/summary.json``; ``extra`` goes first and wins."""
    found = {name: value for name, value in summarise(run).items() if name not in extra}
    write_durably(run / "summary.json", json.dumps({**extra, **found}, indent=1))
