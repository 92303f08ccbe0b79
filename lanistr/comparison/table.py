"""From cells to a table (Markdown) and a result file (contract 5)."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lanistr.baselines import Subset
from lanistr.comparison.cells import Answer, Cell, CellStore, label_name
from lanistr.evaluation.statistics import compare, estimate
from lanistr.metrics import METRICS


@dataclass(frozen=True)
class Truth:
    """Of the test samples.

    Attributes:
        labels_N: class ids.
        groups_N: samples of one group (a reviewer, a patient) are no independent witnesses: they are drawn together.
    """

    labels_N: np.ndarray
    groups_N: np.ndarray

    @classmethod
    def of(cls, test: Subset) -> "Truth":
        """Of a subset."""
        return cls(test.labels_N, test.dataset.group[test.positions_N])


def make_rows(
    cells: Sequence[Cell], store: CellStore, truth: Truth, metrics: Sequence[str], ours: str, dataset: str
) -> list[dict[str, Any]]:
    """A learning row of contract 5 per (metric, labels, method) that has an answer.

    The interval and the p-value come from a bootstrap over groups of test samples and seeds; a p-value is paired with
    ``ours`` over the seeds that both have.

    Args:
        cells: of the grid.
        store: has the answers.
        truth: of the test samples.
        metrics: names.
        ours: the method that the others are tested against.
        dataset: its name.
    """
    answers: dict[tuple[int | None, str], dict[int, Answer]] = {}
    for cell in cells:
        found = store.load(cell)
        if found is not None:
            answers.setdefault((cell.labels, cell.method), {})[cell.seed] = found
    return [
        _row(by_seed, answers.get((labels, ours), {}), truth, metric)
        | {"dataset": dataset, "labels": label_name(labels), "method": method}
        for metric in metrics
        for (labels, method), by_seed in answers.items()
    ]


def _row(by_seed: Mapping[int, Answer], ours: Mapping[int, Answer], truth: Truth, metric: str) -> dict[str, Any]:
    """One method's figures; ``ours`` is not tested against itself."""
    outputs = [by_seed[seed].probabilities_NC for seed in sorted(by_seed)]
    found = estimate(METRICS["class"][metric], outputs, truth.labels_N, groups_N=truth.groups_N)
    row: dict[str, Any] = {
        "metric": metric,
        "mean": found.value, "std": found.std, "ci95": [found.low, found.high], "seeds": len(outputs),
        "p_vs_ours": None,
        "seconds": float(np.mean([answer.seconds for answer in by_seed.values()])),
    }  # fmt: skip
    return row if by_seed is ours else row | _against(by_seed, ours, truth, metric)


def _against(theirs: Mapping[int, Answer], ours: Mapping[int, Answer], truth: Truth, metric: str) -> dict[str, Any]:
    """The paired test of ours against theirs; nothing where there is no pair."""
    seeds = sorted(theirs.keys() & ours.keys())
    if not seeds:
        return {}
    mine, other = ([of[seed].probabilities_NC for seed in seeds] for of in (ours, theirs))
    found = compare(METRICS["class"][metric], mine, other, truth.labels_N, groups_N=truth.groups_N)
    return {
        "p_vs_ours": found.p_bootstrap,
        "p_permutation": found.p_permutation,
        "ours_minus_this": {"mean": found.difference, "ci95": [found.low, found.high], "pairs": len(seeds)},
    }


def markdown(
    rows: Sequence[dict[str, Any]], about: Mapping[str, str], ours: str, unfit: Mapping[str, str] | None = None
) -> str:
    """A table per metric, with one line per method and two columns per number of labels.

    Args:
        rows: of `make_rows`.
        about: a line per method.
        ours: the method that p-values are against.
        unfit: why methods cannot be there, by name.
    """
    if not rows:
        return "no cell is finished\n"
    metrics = dict.fromkeys(row["metric"] for row in rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [line for metric in metrics for line in _table([row for row in rows if row["metric"] == metric], methods)]
    seeds = sorted({row["seeds"] for row in rows})
    lines += [
        f"Seeds per cell: {', '.join(map(str, seeds))}. p: paired bootstrap against `{ours}`, two-sided, not corrected "
        "for the number of comparisons. Seconds: fitting and predicting one model, pretraining not counted.",
        "",
        *(f"* `{method}`: {about[method]}" for method in methods if method in about),
        *(f"* `{method}` does not fit: {reason}" for method, reason in (unfit or {}).items()),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> list[str]:
    counts = list(dict.fromkeys(row["labels"] for row in rows))
    found = {(row["method"], row["labels"]): row for row in rows}
    lines = [
        f"Test {rows[0]['metric']} on {rows[0]['dataset']}: mean ± standard deviation over seeds "
        "[95 % interval over groups of test samples and seeds]",
        "",
        f"| method | {' | '.join(f'{count} labels | p' for count in counts)} | seconds |",
        "|---" * (2 + 2 * len(counts)) + "|",
    ]
    for method in methods:
        own = [found.get((method, count)) for count in counts]
        seconds = " / ".join(f"{row['seconds']:.1f}" if row else "-" for row in own)
        lines.append(f"| {method} | {' | '.join(_entry(row) for row in own)} | {seconds} |")
    return [*lines, ""]


def _entry(row: dict[str, Any] | None) -> str:
    if row is None:
        return "- | -"
    low, high = row["ci95"]
    p = "-" if row["p_vs_ours"] is None else f"{row['p_vs_ours']:.3f}"
    return f"{row['mean']:.3f} ± {row['std']:.3f} [{low:.3f}, {high:.3f}] | {p}"


def write_results(folder: Path, suite: str, rows: Sequence[dict[str, Any]], text: str, more: dict[str, Any]) -> None:
    """Write ``table.md`` and ``result.json``, atomically.

    Args:
        folder: of the comparison.
        suite: name.
        rows: of `make_rows`.
        text: of `markdown`.
        more: further keys beside the rows: what the figures depend on.
    """
    import torch

    result = {
        "suite": suite,
        "command": " ".join(["python -m lanistr", *sys.argv[1:]]),
        "revision": _revision(),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        **more,
        "rows": list(rows),
    }
    for name, data in (("table.md", text), ("result.json", json.dumps(result, indent=1) + "\n")):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(data, encoding="utf-8")
        os.replace(temporary, folder / name)


def _revision() -> str:
    """Of the source tree; ``unknown`` for an installed package."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
