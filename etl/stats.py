"""`etl stats`: what a gold dataset holds, as tables. No tar is read, except a few hundred series and the leak probe's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from etl.summary import Categories, Numbers, Summary, in_full
from lanistr.manifest import SPLITS

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
LONG_TAIL = 5.0


def stats(gold: Path, redact: bool | None = None) -> str:
    """Tables as text.

    Args:
        gold: dataset.
        redact: see `etl.summary.Summary`.

    Raises:
        ValueError: not a gold dataset, or an index is missing.
    """
    summary = Summary(gold, redact)
    manifest = summary.manifest
    blocks = [
        f"{manifest.name}  {manifest.content_id[:16]}" + ("  (redacted)" if summary.redact else ""),
        _splits(summary),
        _patterns(summary),
        _labels(summary),
        _lengths(summary),
        _numbers([column for column in summary.columns if isinstance(column, Numbers)]),
        _categories([column for column in summary.columns if isinstance(column, Categories)]),
        table(["rows at each stage", "n"], [[name, f"{n:,}"] for name, n in manifest.counts.items()]),
        table(["quarantine", "n"], [[reason, f"{n:,}"] for reason, n in manifest.quarantine.items()] or [["-", "0"]]),
        "\n".join(["predicts the label by itself", "----------------------------", *_leaks(summary)]),
        "\n".join(["lineage", "-------", *(f"{what}: {value}" for what, value in summary.lineage)]),
    ]
    return "\n\n".join(block for block in blocks if block)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first = f"{row[0]:<{widths[0]}}"
        return "  ".join([first, *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])


def share(n: float, of: float) -> str:
    """A percentage."""
    return f"{n / of:.1%}" if of else "-"


def _splits(summary: Summary) -> str:
    rows = []
    for split in SPLITS:
        part = summary.per_sample.filter(pl.col("split") == split)
        shards = summary.manifest.shards_of(split)
        size = sum(s.bytes for s in shards) / 2**20
        groups, labelled = part["group_hash"].n_unique(), part.filter(pl.col("label") >= 0).height
        rows.append([split, f"{part.height:,}", f"{groups:,}", f"{labelled:,}", f"{len(shards)}", f"{size:.1f}"])
    return table(["split", "samples", "groups", "labelled", "shards", "MiB"], rows)


def _patterns(summary: Summary) -> str:
    names = list(summary.manifest.modalities)
    rows = []
    for mask, n in summary.patterns:
        marks = ["x" if mask & summary.manifest.bit(name) else "." for name in names]
        rows.append(["pattern", *marks, f"{n:,}", share(n, summary.n)])
    rows.append(["missing", *(share(summary.n - summary.present(name), summary.n) for name in names), "", ""])
    return table(["modalities", *names, "samples", "share"], rows)


def _labels(summary: Summary) -> str:
    if not summary.manifest.labels:
        return ""
    totals = [sum(counts[i] for _, counts in summary.labels) for i in range(len(SPLITS))]
    rows = []
    for name, counts in summary.labels:
        rows.append([name, *(cell for n, of in zip(counts, totals, strict=True) for cell in (f"{n:,}", share(n, of)))])
    return table(["label", *(head for split in SPLITS for head in (split, ""))], rows)


def _lengths(summary: Summary) -> str:
    rows = []
    for name in summary.manifest.modalities:
        lengths = summary.lengths(name)
        found = np.quantile(lengths, QUANTILES, method="lower") if len(lengths) else []
        rows.append([name, *(f"{value:.0f}" for value in found)] if len(found) else [name, *"-----"])
    return table(["length, where present", "min", "median", "90 %", "99 %", "max"], rows)


def _numbers(columns: Sequence[Numbers]) -> str:
    rows = []
    for column in columns:
        found = np.quantile(column.values, (0, 0.5, 1)) if len(column.values) else []
        shown = [*map(in_full, found), f"{column.skew:.1f}"] if len(found) else [*"----"]
        rows.append([column.name, share(column.missing, 1), *shown])
    if not rows:
        return ""
    lines = [table(["numbers", "missing", "min", "median", "max", "skew"], rows)]
    if any(abs(column.skew) > LONG_TAIL for column in columns):
        lines.append(
            f"a skew beyond {LONG_TAIL:.0f}: standardised, nearly all values of a column are one number to a model; of a table's "
            "columns `model.modalities.<name>.numbers: quantile` gives it their ranks"
        )
    return "\n".join(lines)


def _categories(columns: Sequence[Categories]) -> str:
    rows = []
    for column in columns:
        top = ", ".join(f"{value[:24]} {part:.0%}" for value, part in column.top[:3])
        known = f"{column.known:,}" + (f" + {column.buckets:,}" if column.buckets else "")
        rows.append([column.name, share(column.missing, 1), share(column.unseen, 1), known, top])
    return table(["categories", "missing", "unseen", "values", "most frequent"], rows) if rows else ""


def _leaks(summary: Summary) -> list[str]:
    return [str(leak.redacted() if summary.redact else leak) for leak in summary.leaks] or ["nothing suspicious"]
