"""What a gold dataset holds: splits, missingness pattern, labels, lengths, lineage. From the indices; no tar is read."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from lanistr.manifest import SPLITS, Manifest

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


def stats(gold: Path) -> str:
    """Tables as text.

    Raises:
        ValueError: not a gold dataset, or an index is missing.
    """
    manifest = Manifest.load(gold)
    samples = read_indices(gold, manifest)
    blocks = [
        f"{manifest.name}  {manifest.content_id[:16]}",
        _splits(samples, manifest),
        _patterns(samples, manifest),
        _labels(samples, manifest),
        _lengths(samples, manifest),
        table(["rows at each stage", "n"], [[name, f"{n:,}"] for name, n in manifest.counts.items()]),
        table(["quarantine", "n"], [[reason, f"{n:,}"] for reason, n in manifest.quarantine.items()] or [["-", "0"]]),
        table(["raw file", "sha256"], [[parent["file"], parent["sha256"][:16]] for parent in manifest.parents]),
    ]
    return "\n\n".join(block for block in blocks if block)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first = f"{row[0]:<{widths[0]}}"
        return "  ".join([first, *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])


def read_indices(gold: Path, manifest: Manifest) -> pl.DataFrame:
    """All index rows, with ``split`` and ``shard`` (the tar's path in the dataset).

    Raises:
        ValueError: an index is missing.
    """
    frames = []
    for shard in manifest.shards:
        if not (gold / shard.index).is_file():
            raise ValueError(f"{gold / shard.index}: missing, but the manifest names it")
        rows = pl.read_parquet(gold / shard.index).drop("tab")
        frames.append(rows.with_columns(split=pl.lit(shard.split), shard=pl.lit(shard.path)))
    return pl.concat(frames)


def share(n: int, of: int) -> str:
    """A percentage."""
    return f"{n / of:.1%}" if of else "-"


def _splits(samples: pl.DataFrame, manifest: Manifest) -> str:
    rows = []
    for split in SPLITS:
        part = samples.filter(pl.col("split") == split)
        shards = manifest.shards_of(split)
        size = sum(s.bytes for s in shards) / 2**20
        groups, labelled = part["group_hash"].n_unique(), part.filter(pl.col("label") >= 0).height
        rows.append([split, f"{part.height:,}", f"{groups:,}", f"{labelled:,}", f"{len(shards)}", f"{size:.1f}"])
    return table(["split", "samples", "groups", "labelled", "shards", "MiB"], rows)


def _patterns(samples: pl.DataFrame, manifest: Manifest) -> str:
    names = list(manifest.modalities)
    counts = samples.group_by("presence").len().sort(["len", "presence"], descending=[True, False])
    rows = []
    for mask, n in counts.iter_rows():
        marks = ["x" if mask & manifest.bit(name) else "." for name in names]
        rows.append(["pattern", *marks, f"{n:,}", share(n, samples.height)])
    present = [samples.filter((pl.col("presence") & manifest.bit(name)) != 0).height for name in names]
    rows.append(["missing", *(share(samples.height - n, samples.height) for n in present), "", ""])
    return table(["modalities", *names, "samples", "share"], rows)


def _labels(samples: pl.DataFrame, manifest: Manifest) -> str:
    if not manifest.labels:
        return ""
    rows = []
    for label, name in [*enumerate(manifest.labels), (-1, "(unlabelled)")]:
        row = [name]
        for split in SPLITS:
            part = samples.filter(pl.col("split") == split)
            n = part.filter(pl.col("label") == label).height
            row += [f"{n:,}", share(n, part.height)]
        rows.append(row)
    return table(["label", *(head for split in SPLITS for head in (split, ""))], rows)


def _lengths(samples: pl.DataFrame, manifest: Manifest) -> str:
    rows = []
    for name in manifest.modalities:
        lengths = samples[f"length/{name}"].filter(samples[f"length/{name}"] > 0)
        found = [lengths.quantile(q, interpolation="lower") for q in QUANTILES]
        rows.append([name, *("-" if value is None else f"{value:.0f}" for value in found)])
    return table(["length, where present", "min", "median", "90 %", "99 %", "max"], rows)
