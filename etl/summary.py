"""What a gold dataset holds, for `etl stats` (as tables) and `etl preview` (as a page).

Counts are exact, from the manifest and single columns of the indices. Values are those of at most `SAMPLE` rows, the
first of every shard: shards are sorted by key, and keys are hashes. So the cost hardly grows with the dataset.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from etl.leaks import Leak, probe
from etl.members import Members
from lanistr.manifest import SPLITS, Manifest
from lanistr.transforms import MISSING_ID, UNSEEN_ID, SeriesSpec, TabularSpec

SAMPLE = 20_000
SERIES = 300  # series whose values are looked at
CHANNELS = 24  # channels shown
IDENTIFYING = 50  # a categorical column of more values than this may name people


@dataclass(frozen=True)
class Numbers:
    """A numeric column or a channel: its values where present, and the share that is missing."""

    name: str
    values: np.ndarray
    missing: float

    @property
    def skew(self) -> float:
        """The third standardised moment: 0 of a symmetric column, 2 of an exponential one, above 5 of a long tail."""
        values = self.values.astype(np.float64)
        std = values.std() if len(values) else 0.0
        return float(((values - values.mean()) ** 3).mean() / std**3) if std > 0 else 0.0


@dataclass(frozen=True)
class Categories:
    """A categorical column.

    Attributes:
        top: (value, share of the rows), most frequent first.
        known: values with an id of their own; ``buckets`` share the others.
        missing, unseen: shares of the rows.
    """

    name: str
    top: list[tuple[str, float]]
    known: int
    buckets: int
    missing: float
    unseen: float


class Summary:
    """Reads lazily and once.

    Args:
        gold: dataset.
        redact: hide what may name a person: texts, images, phrases, values of columns with many of them. None: as the
            manifest says.

    Raises:
        ValueError: not a gold dataset, or an index is missing.
    """

    def __init__(self, gold: Path, redact: bool | None = None):
        self.gold = gold
        self.manifest = Manifest.load(gold)
        self.redact = self.manifest.private if redact is None else redact
        self.n = sum(shard.n for shard in self.manifest.shards)

    @cached_property
    def sample(self) -> pl.DataFrame:
        """Index rows, with ``split`` and ``shard``."""
        return read_indices(self.gold, self.manifest, SAMPLE)

    @cached_property
    def per_sample(self) -> pl.DataFrame:
        """Label, group and lengths of every sample, with its split."""
        target = ["target"] if self.manifest.target != "class" else []
        columns = ["label", *target, "group_hash", *(f"length/{name}" for name in self.manifest.modalities)]
        return read_indices(self.gold, self.manifest, columns=columns)

    @cached_property
    def patterns(self) -> list[tuple[int, int]]:
        """(presence mask, samples), the most frequent first."""
        counts: dict[int, int] = {}
        for shard in self.manifest.shards:
            for mask, n in shard.n_by_mask.items():
                counts[int(mask)] = counts.get(int(mask), 0) + n
        return sorted(counts.items(), key=lambda item: (-item[1], item[0]))

    def present(self, name: str) -> int:
        """Samples that have a modality."""
        return sum(n for mask, n in self.patterns if mask & self.manifest.bit(name))

    @cached_property
    def labels(self) -> list[tuple[str, list[int]]]:
        """(class, samples in each split), unlabelled last; of numbers how many are there, of labels how many hold."""
        if self.manifest.target != "class":
            return self._targets()
        counts = self.per_sample.group_by("split", "label").len()
        found = {(split, label): n for split, label, n in counts.iter_rows()}
        names = [*enumerate(self.manifest.labels), (-1, "(unlabelled)")]
        return [(name, [found.get((split, label), 0) for split in SPLITS]) for label, name in names]

    def _targets(self) -> list[tuple[str, list[int]]]:
        parts = [self.per_sample.filter(pl.col("split") == split) for split in SPLITS]
        cells = [pl.col("target").list.get(i, null_on_oob=True) for i in range(len(self.manifest.labels))]
        counted = [cell == 1 if self.manifest.target == "multilabel" else cell.is_not_nan() for cell in cells]
        rows = [
            (name, [part.filter(c).height for part in parts])
            for name, c in zip(self.manifest.labels, counted, strict=True)
        ]
        return [*rows, ("(unlabelled)", [part.filter(pl.col("label") < 0).height for part in parts])]

    def lengths(self, name: str) -> np.ndarray:
        """Tokens, steps or rows of the samples that have the modality."""
        lengths = self.per_sample[f"length/{name}"].to_numpy()
        return lengths[lengths > 0]

    @cached_property
    def columns(self) -> list[Numbers | Categories]:
        """Tabular columns, then channels."""
        found: list[Numbers | Categories] = []
        for name, schema in self.manifest.modalities.items():
            rows = self.sample.filter((pl.col("presence") & self.manifest.bit(name)) != 0)
            if schema.kind == "tabular" and rows.height:
                found += self._tabular(TabularSpec.model_validate(schema.spec), rows)
            elif schema.kind == "timeseries" and rows.height:
                found += self._series(SeriesSpec.model_validate(schema.spec), rows.head(SERIES))
        return found

    def _tabular(self, spec: TabularSpec, rows: pl.DataFrame) -> list[Numbers | Categories]:
        width = len(spec.numeric) + len(spec.categorical)
        table = rows["tab"].explode().to_numpy().reshape(-1, width)
        found: list[Numbers | Categories] = []
        for i, column in enumerate(spec.numeric):
            here = np.isfinite(table[:, i])
            found.append(Numbers(column.name, table[here, i], 1 - here.mean()))
        for i, column in enumerate(spec.categorical, len(spec.numeric)):
            ids, counts = np.unique(np.nan_to_num(table[:, i], nan=MISSING_ID).astype(int), return_counts=True)
            shares = dict(zip(ids.tolist(), (counts / len(table)).tolist(), strict=True))
            missing, unseen = shares.pop(MISSING_ID, 0.0), shares.pop(UNSEEN_ID, 0.0)
            order = sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:5]
            hide = self.redact and column.cardinality > IDENTIFYING
            top = [("(redacted)" if hide else column.name_of(id_), share) for id_, share in order]
            found.append(Categories(column.name, top, len(column.values), column.buckets, missing, unseen))
        return found

    def _series(self, spec: SeriesSpec, rows: pl.DataFrame) -> list[Numbers]:
        channels = [group[0] for group in spec.groups if len(group) == 2] if spec.grid else range(len(spec.variables))
        with Members(self.gold) as members:
            series = [(members.array(r, "ts.npy"), members.array(r, "tsmask.npy")) for r in rows.iter_rows(named=True)]
        values = np.concatenate([v for v, _ in series])
        observed = np.concatenate([o for _, o in series]) == 1
        return [
            Numbers(spec.variables[c], values[observed[:, c], c], 1 - observed[:, c].mean())
            for c in list(channels)[:CHANNELS]
        ]

    @cached_property
    def leaks(self) -> list[Leak]:
        """What the leak probe finds in the sample."""
        return probe(self.gold, self.manifest, self.sample)

    @cached_property
    def lineage(self) -> list[tuple[str, str]]:
        """What the dataset was made from and by, as (what, value)."""
        manifest = self.manifest
        rows = [(parent["file"], f"sha256 {parent['sha256']}") for parent in manifest.parents]
        rows.append(("split", ", ".join(f"{key} {value}" for key, value in manifest.split_rule.items())))
        if manifest.tokenizer:
            rows.append((manifest.tokenizer.file, f"sha256 {manifest.tokenizer.sha256}"))
        rows += [("fit", ", ".join(f"{key} {value}" for key, value in manifest.fit.items()) or "unknown")]
        rows += [("made by", ", ".join(f"{name} {version}" for name, version in manifest.created_by.items()))]
        return [*rows, ("content", manifest.content_id)]


def in_full(value: float) -> str:
    """A number for people: whole ones in full (a timestamp is no 1.5e+09)."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.6g}"


def read_indices(
    gold: Path, manifest: Manifest, limit: int | None = None, columns: list[str] | None = None
) -> pl.DataFrame:
    """Index rows, with ``split`` and ``shard`` (the tar's path in the dataset).

    Args:
        gold: dataset.
        manifest: its manifest.
        limit: about so many rows, the first of every shard; None = all.
        columns: None = all.

    Raises:
        ValueError: an index is missing.
    """
    total = sum(shard.n for shard in manifest.shards)
    share = 1.0 if limit is None or limit >= total else limit / total
    frames = []
    for shard in manifest.shards:
        if not (gold / shard.index).is_file():
            raise ValueError(f"{gold / shard.index}: missing, but the manifest names it")
        rows = pl.read_parquet(gold / shard.index, columns=columns, n_rows=max(1, round(shard.n * share)))
        frames.append(rows.with_columns(split=pl.lit(shard.split), shard=pl.lit(shard.path)))
    return pl.concat(frames)
