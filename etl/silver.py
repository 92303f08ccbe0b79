"""Silver: the canonical tables, cut into buckets by a stable hash of the group: one Parquet per split and bucket.

A bucket is what a task of the gold phase reads. Rows are sorted by key out of core (DuckDB), a slab of whole buckets at
a time, and cut in one pass, so that no bucket is ever held in memory, and equal rows give equal files.
"""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from etl.lake import whole_file
from etl.quarantine import literal
from etl.raw import RawTable
from etl.split import digest_modulo
from lanistr.manifest import SPLITS, Strict

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection

BUCKET_SIZE = 7_500  # samples that a bucket should hold: a task of seconds to a minute
SORTED_AT_ONCE = 1_000_000  # rows; whole buckets: a sort's memory grows with its runs, even where they are spilled
BATCH = 8_192
ROW_GROUP = 8_192
Part = tuple[str, int]  # split, bucket


class Task(Strict):
    """A unit of work of the gold phase: one bucket of one split. Small, picklable, the same on every machine.

    Attributes:
        n: samples.
        rows: Parquet with the samples, by key; relative to the silver folder, as ``series``.
        series: Parquet with their points, by key, time and variable; None where they have none.
        sha256: over both files.
    """

    split: str
    bucket: int
    n: int
    rows: str
    series: str | None
    sha256: str

    @property
    def name(self) -> str:
        """``train-b00007``."""
        return part_name((self.split, self.bucket))


def part_name(part: Part) -> str:
    """``train-b00007``."""
    split, bucket = part
    return f"{split}-b{bucket:05d}"


def choose_buckets(con: "DuckDBPyConnection") -> dict[str, int]:
    """Number of buckets per split, for a first build."""
    counts = dict(con.execute("select split, count(*) from samples group by 1").fetchall())
    return {split: max(1, round(counts.get(split, 0) / BUCKET_SIZE)) for split in SPLITS}


def write_tables(con: "DuckDBPyConnection", name: str, salt: str, buckets: dict[str, int], folder: Path) -> list[Task]:
    """Write ``samples/`` and ``series/`` into ``folder``; returns the tasks, by split and bucket.

    Args:
        con: has ``samples`` with ``split``, and ``series``.
        name: of the dataset, which keys depend on.
        salt: of the split rule.
        buckets: per split.
        folder: silver folder of the dataset.
    """
    salted = f"{literal(salt + ':bucket:')} || grp"
    bucket = " ".join(f"when {literal(split)} then {digest_modulo(salted, n)}" for split, n in buckets.items())
    con.execute(
        f"create view keyed as select *, (case split {bucket} end)::integer as bucket, "
        f"left(sha256({literal(name + '|')} || grp || '|' || row_id), 16) as key, "
        f"left(sha256({literal(name + '|')} || grp), 16) as group_hash from samples"
    )
    (largest,) = con.execute(
        "select greatest((select count(*) from samples), (select count(*) from series))"
    ).fetchall()[0]
    slabs = max(1, math.ceil(largest / SORTED_AT_ONCE))
    (threads,) = con.execute("select current_setting('threads')").fetchall()[0]
    con.execute("checkpoint")  # what is not yet in the file cannot leave memory
    con.execute("set threads = 1")  # each thread sorts in memory of its own; one is as fast per row, and never starved
    rows: dict[Part, int] = {}
    points: dict[Part, int] = {}
    for slab in range(slabs):
        con.execute(f"create view slab as select * from keyed where bucket % {slabs} = {slab}")
        samples = "select * from slab order by split, bucket, key, row_id"
        series = (
            "select slab.split, slab.bucket, slab.key, s.time, s.variable, s.value from series s join slab using (row_id) "
            "order by all"
        )
        rows |= write_parts(con.sql(samples).to_arrow_reader(BATCH), folder / "samples")
        points |= write_parts(con.sql(series).to_arrow_reader(BATCH), folder / "series")
        con.execute("drop view slab")
    con.execute("drop view keyed")
    con.execute(f"set threads = {threads}")
    order = sorted(rows, key=lambda part: (SPLITS.index(part[0]), part[1]))
    return [_task(folder, part, rows[part], part in points) for part in order]


def _task(folder: Path, part: Part, n: int, has_series: bool) -> Task:
    rows = f"samples/{part_name(part)}.parquet"
    series = f"series/{part_name(part)}.parquet" if has_series else None
    digests = [_sha256(folder / file) for file in (rows, series) if file]
    digest = hashlib.sha256("|".join(digests).encode()).hexdigest()
    return Task(split=part[0], bucket=part[1], n=n, rows=rows, series=series, sha256=digest)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_parts(reader: "pa.RecordBatchReader", folder: Path) -> dict[Part, int]:
    """Cut a stream sorted by (split, bucket, ...) into a Parquet per part; returns their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = itertools.groupby(_runs(reader), key=lambda run: run[0])
    return {
        part: _write_part(folder / f"{part_name(part)}.parquet", (batch for _, batch in runs), reader.schema)
        for part, runs in parts
    }


def _runs(batches: Iterable["pa.RecordBatch"]) -> Iterator[tuple[Part, "pa.RecordBatch"]]:
    """Slices of one part each."""
    import numpy as np

    for batch in batches:
        splits = batch["split"].dictionary_encode()
        codes = splits.indices.to_numpy(), batch["bucket"].to_numpy()
        change = np.flatnonzero((np.diff(codes[0]) != 0) | (np.diff(codes[1]) != 0)) + 1
        for start, end in itertools.pairwise([0, *change.tolist(), len(batch)]):
            if end > start:
                yield (splits[start].as_py(), int(codes[1][start])), batch.slice(start, end - start)


def _write_part(path: Path, batches: Iterable["pa.RecordBatch"], schema: "pa.Schema") -> int:
    """Row groups of a fixed size: the bytes depend on the rows only, not on how they came."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    waiting: list[pa.RecordBatch] = []
    n = total = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            rest = batch
            while n + len(rest) >= ROW_GROUP:
                writer.write_table(pa.Table.from_batches([*waiting, rest[: ROW_GROUP - n]]).combine_chunks())
                rest, waiting, n = rest[ROW_GROUP - n :], [], 0
            if len(rest):
                waiting.append(rest)
                n += len(rest)
            total += len(batch)
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting).combine_chunks())
    return total


def write_registered(tables: dict[str, RawTable], good: dict[str, int], folder: Path) -> None:
    """Bronze: write what is known of the raw files, with the number of ``good`` rows of each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    files = [file for table in tables.values() for file in table.files]
    rows = [asdict(file) | {"rows": good.get(file.name, 0)} for file in files]
    with whole_file(folder / "_files.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
