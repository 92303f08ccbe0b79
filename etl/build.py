"""Bronze, silver, gold: one build of one recipe.

Everything is made in a hidden folder of the lake and moved into place at the end, gold last: a build that fails or is
killed leaves the earlier dataset as it was.
"""

import fcntl
import hashlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from etl import split
from etl.fit import TOKENIZER, Fit, make_fit
from etl.ingest import RawFile, connect, register
from etl.quarantine import Quarantine, column, literal
from etl.recipe import Recipe
from etl.shards import EncodedSample, Encoder, RawSample, encode_all, write_shard
from etl.sources.registry import SOURCES
from etl.sources.samples import Samples
from lanistr.manifest import SPLITS, Manifest, ModalitySchema, Shard, Tokenizer, sample_key
from lanistr.transforms import MEMBERS, Point

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def build(
    recipe: Recipe,
    raw: Path,
    lake: Path,
    *,
    refit: bool = False,
    workers: int = 1,
    max_bad: float = 1.0,
    memory: int | None = None,
    threads: int | None = None,
    tmp: Path | None = None,
) -> Path:
    """Build a gold dataset; returns its folder, ``lake/gold/<name>``.

    Args:
        recipe: what to build.
        raw: folder with the raw files, only read.
        lake: folder of bronze, silver, gold, quarantine, fit.
        refit: fit anew although an earlier build left a fit.
        workers: processes that encode; the bytes do not depend on it.
        max_bad: stop where more than this share of the raw records was set aside.
        memory: bytes that the build may use; what does not fit is spilled.
        threads: of DuckDB.
        tmp: folder to spill into, in a folder of its own; the lake's where absent.

    Raises:
        ValueError: anything that a user can put right. Where too much was set aside, ``lake/quarantine/<name>`` is
            written nevertheless: it says what.
    """
    source = recipe.source
    reader = SOURCES[source.kind]
    files = {name: register(raw, name) for name in reader.raw_files(source)}
    with _workspace(lake, recipe.name) as work, TemporaryDirectory(dir=tmp or work, prefix="spill-") as spill:
        con = connect(work, spill=Path(spill), memory=memory, threads=threads)
        quarantine = Quarantine(con)
        say(f"bronze: {len(files)} raw files registered")
        samples = reader.read(con, quarantine, files, recipe, raw)
        _stop_if_dirty(quarantine, max_bad, work, lake / "quarantine" / recipe.name)
        _split_and_require(con, recipe, samples)
        for name, count in samples.counts.items():
            say(f"silver: {name}: {count:,}")
        fit = make_fit(con, recipe, samples, raw, None if refit else lake / "fit" / recipe.name)
        _write_silver(con, work, files)
        if not recipe.fit_from:
            fit.save(work / "fit")
        gold = work / "gold"
        _write_gold(con, quarantine, recipe, samples, fit, raw, gold, workers, files)
        _stop_if_dirty(quarantine, max_bad, work, lake / "quarantine" / recipe.name)
        quarantine.write(work / "quarantine")
        con.close()
        for room in ("bronze", "silver", "quarantine", "fit", "gold"):
            _publish(work / room, lake / room / recipe.name)
    return lake / "gold" / recipe.name


def _stop_if_dirty(quarantine: Quarantine, max_bad: float, work: Path, target: Path) -> None:
    bad = quarantine.total()
    if bad <= max_bad * quarantine.records:
        return
    quarantine.write(work / "quarantine")
    _publish(work / "quarantine", target)
    most = ", ".join(f"{reason} ({n:,})" for reason, n in list(quarantine.by_reason().items())[:3])
    raise ValueError(
        f"{bad:,} of {quarantine.records:,} raw records are bad, more than --max-bad {max_bad:g}: {most}; see {target}"
    )


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _workspace(lake: Path, name: str) -> Iterator[Path]:
    """A hidden folder, under a lock that two builds of one dataset cannot share."""
    lake.mkdir(parents=True, exist_ok=True)
    with open(lake / f".{name}.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another build of {name} into {lake} is running; wait for it") from None
        work = lake / f".{name}.building"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _publish(made: Path, target: Path) -> None:
    """Move a folder into place; what was there goes first aside, then away."""
    if not made.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _split_and_require(con: "DuckDBPyConnection", recipe: Recipe, samples: Samples) -> None:
    con.execute("alter table samples add column split varchar")
    con.execute(f"update samples set split = {split.split_sql('grp', recipe.split)}")
    conditions = {
        "text": "text is not null",
        "image": "image is not null",
        "tabular": "true",
        "timeseries": "row_id in (select row_id from series)",
    }
    for name in recipe.require:
        con.execute(f"delete from samples where not ({conditions[name]})")
    if not con.execute("select count(*) from samples").fetchall()[0][0]:
        raise ValueError(f"no sample is left; rows read: {samples.counts}, required: {recipe.require or 'nothing'}")


def _write_silver(con: "DuckDBPyConnection", work: Path, files: dict[str, RawFile]) -> None:
    import polars as pl

    for room in ("bronze", "silver"):
        (work / room).mkdir()
    registered = [{k: str(v) if isinstance(v, Path) else v for k, v in asdict(f).items()} for f in files.values()]
    pl.DataFrame(registered).write_parquet(work / "bronze" / "_files.parquet")
    for name, order in (("samples", "row_id"), ("series", "row_id, time, variable")):
        target = literal(work / "silver" / f"{name}.parquet")
        con.execute(f"copy (select * from {name} order by {order}) to {target} (format parquet, compression zstd)")


def _raw_samples(con: "DuckDBPyConnection", name: str, recipe: Recipe, samples: Samples, which: str) -> list[RawSample]:
    """The samples of one split, by key."""
    tabular = [
        (c, column(f"{kind}:{c}")) for kind, cs in (("n", samples.numeric), ("c", samples.categorical)) for c in cs
    ]
    columns = ["row_id", "grp", "label", "text", "image", "_file", "_row", *(sql for _, sql in tabular)]
    rows = con.execute(
        f"select {', '.join(columns)} from samples where split = {literal(which)} order by row_id"
    ).fetchall()
    series: dict[str, list[Point]] = {}
    points = con.execute(
        f"select row_id, time, variable, value from series where row_id in (select row_id from samples where split = {literal(which)}) "
        "order by row_id, time, variable"
    )
    while chunk := points.fetchmany(100_000):
        for row_id, time, variable, value in chunk:
            series.setdefault(row_id, []).append((time, variable, value))
    ids = {label: i for i, label in enumerate(samples.labels)}
    made = [
        RawSample(
            key=sample_key(name, row[1], row[0]),
            group_hash=hashlib.sha256(f"{name}|{row[1]}".encode()).hexdigest()[:16],
            label=ids.get(row[2], -1),
            text=row[3],
            image=row[4],
            row={c: v for (c, _), v in zip(tabular, row[7:], strict=True)} if recipe.tabular else None,
            series=series.get(row[0], []),
            source_file=row[5],
            source_row=row[6],
        )
        for row in rows
    ]
    return sorted(made, key=lambda sample: sample.key)


def _write_gold(
    con: "DuckDBPyConnection",
    quarantine: Quarantine,
    recipe: Recipe,
    samples: Samples,
    fit: Fit,
    raw: Path,
    gold: Path,
    workers: int,
    files: dict[str, RawFile],
) -> None:
    gold.mkdir()
    tokenizer = None
    if fit.tokenizer:
        text = fit.tokenizer.to_str(pretty=True)
        (gold / TOKENIZER).write_text(text, encoding="utf-8")
        tokenizer = Tokenizer(file=TOKENIZER, sha256=hashlib.sha256(text.encode()).hexdigest())
    schemas = {
        name: ModalitySchema(kind=name, members=MEMBERS[name], spec=spec.model_dump())
        for name, spec in fit.specs.items()
    }
    max_chars = recipe.text.max_chars if recipe.text else None
    encoder = Encoder(fit.specs, raw, gold / TOKENIZER if tokenizer else None, max_chars)
    shards: list[Shard] = []
    for which in SPLITS:
        (gold / which).mkdir()
        raws = _raw_samples(con, recipe.name, recipe, samples, which)
        encoded = encode_all(raws, encoder, workers)
        shards += _write_split(con, quarantine, recipe, which, encoded, schemas, gold)
        say(f"gold: {which}: {sum(s.n for s in shards if s.split == which):,} samples")
    reasons = quarantine.by_reason()
    for reason, count in reasons.items():
        say(f"quarantine: {reason}: {count:,}")
    say(f"quarantine: {quarantine.total():,} records in all")
    manifest = Manifest(
        name=recipe.name,
        modalities=schemas,
        tokenizer=tokenizer,
        labels=samples.labels,
        split_rule=split.rule(recipe.split, samples.group),
        shards=shards,
        quarantine=reasons,
        counts=samples.counts,
        parents=[{"file": f.name, "sha256": f.sha256} for f in files.values()],
        created_by={name: version(name) for name in ("duckdb", "polars", "pillow", "tokenizers")},
    )
    manifest.content_id = manifest.compute_content_id()
    manifest.save(gold)


def _write_split(
    con: "DuckDBPyConnection",
    quarantine: Quarantine,
    recipe: Recipe,
    which: str,
    encoded: Iterator[EncodedSample],
    schemas: dict[str, ModalitySchema],
    gold: Path,
) -> list[Shard]:
    shards: list[Shard] = []
    waiting: list[EncodedSample] = []
    broken: list[tuple[Any, ...]] = []

    def flush() -> None:
        stem = f"{recipe.name}-{which}-{len(shards):05d}"
        shards.append(write_shard(gold, which, stem, waiting, schemas))
        waiting.clear()

    for sample in encoded:
        if sample.bad_image:
            broken.append((sample.raw.image, 0, sample.bad_image, sample.raw.key))
        if any(name not in sample.lengths or not sample.lengths[name] for name in recipe.require):
            continue
        waiting.append(sample)
        if len(waiting) == recipe.shard_size:
            flush()
    if waiting:
        flush()
    con.execute("create or replace temp table broken (file varchar, line bigint, reason varchar, raw varchar)")
    if broken:
        con.executemany("insert into broken values (?, ?, ?, ?)", broken)
    quarantine.add("images", "select file, line, reason, raw from broken")
    return shards
