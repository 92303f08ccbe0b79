"""The first half of a build: raw files -> canonical tables, split, fit, silver cut into tasks, and a plan of them.

A build that was killed finds the plan and goes on with it, if nothing has changed that it depends on.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import lanistr.manifest
import lanistr.transforms
from etl import silver, split
from etl.encoder import RAW_TEXT
from etl.fit import TOKENIZER, Fit, make_fit
from etl.ingest import connect
from etl.lake import publish, say, whole_file, work_folder
from etl.plan import BUCKETS, Plan, load_plan
from etl.quarantine import Quarantine
from etl.raw import RawTable, register
from etl.recipe import Recipe
from etl.shards import FORMAT
from etl.sources.registry import SOURCES
from etl.sources.samples import Samples
from etl.tasks import fingerprint
from lanistr.manifest import ModalitySchema, Tokenizer
from lanistr.transforms import MEMBERS

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

READERS = ("duckdb", "polars")
WRITERS = ("numpy", "pillow", "pyarrow", "tokenizers")  # their versions are part of a task's id


@dataclass(frozen=True)
class Limits:
    """What DuckDB may use.

    Attributes:
        memory: bytes; what does not fit is spilled.
        threads: all cores where absent.
        tmp: folder to spill into, in a folder of its own; the lake's where absent.
    """

    memory: int | None = None
    threads: int | None = None
    tmp: Path | None = None


NO_LIMITS = Limits()


def prepare(
    recipe: Recipe,
    raw: Path,
    lake: Path,
    *,
    refit: bool = False,
    max_bad: float = 1.0,
    limits: Limits = NO_LIMITS,
    again: bool = False,
) -> Plan:
    """Make the plan of a build, or find the one that a killed build left.

    Args:
        recipe, raw, lake, refit, max_bad, limits: see `etl.build.build`.
        again: make it anew in any case.
    """
    work = work_folder(lake, recipe.name)
    names = SOURCES[recipe.source.kind].raw_files(recipe.source)
    files = {name: register(raw, name, salvage=recipe.salvage) for name in names}
    say(f"bronze: {sum(len(table.files) for table in files.values()):,} raw files registered")
    kept = None if refit else lake / "fit" / recipe.name
    identity = _identity(recipe, raw, files, kept)
    plan = None if again else load_plan(work)
    if plan and plan.identity == identity and plan.is_whole(lake):
        say(f"silver: prepared before, {len(plan.tasks):,} tasks")
        return plan

    def make(con: "DuckDBPyConnection") -> Plan:
        return _prepare(con, recipe, raw, lake, files, kept, identity, max_bad)

    for frugal in (True, False):
        plan = _attempt(work, limits, frugal, make)
        if plan:
            return plan
    given = f"--memory {limits.memory / 1e6:g}MB" if limits.memory else "this machine's memory"
    raise ValueError(f"out of memory with {given}: give more, or fewer --threads")


def _attempt(work: Path, limits: Limits, frugal: bool, make: Callable[["DuckDBPyConnection"], Plan]) -> Plan | None:
    """The plan, made in a new ``work`` folder; None where the memory did not suffice."""
    import duckdb

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        with TemporaryDirectory(dir=limits.tmp or work, prefix="spill-") as spill:
            con = connect(work, spill=Path(spill), memory=limits.memory, threads=limits.threads, frugal=frugal)
            with contextlib.closing(con):
                plan = make(con)
        for file in work.glob("build.duckdb*"):
            file.unlink()
        plan.save(work)
        return plan
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if not isinstance(error, duckdb.OutOfMemoryException):
            raise
        say(f"silver: DuckDB ran out of memory{'; once more, with all that it may have' if frugal else ''}")
        return None


def _identity(recipe: Recipe, raw: Path, files: Mapping[str, RawTable], kept: Path | None) -> str:
    tokenizer = recipe.text.tokenizer.path if recipe.text else None
    given = [raw / tokenizer] if tokenizer else []
    given += sorted(kept.iterdir()) if kept and kept.is_dir() else []
    given += [Path(recipe.fit_from) / "manifest.json"] if recipe.fit_from else []
    code = [*Path(__file__).parent.rglob("*.py"), *map(Path, (lanistr.manifest.__file__, lanistr.transforms.__file__))]
    return fingerprint(
        {
            "recipe": recipe.model_dump(mode="json"),
            "files": [[file.name, file.sha256] for table in files.values() for file in table.files],
            "given": [[path.name, _digest(path)] for path in given],
            "code": sorted(_digest(path) for path in code),
            "versions": [version(name) for name in (*READERS, *WRITERS)],
        }
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _prepare(
    con: "DuckDBPyConnection",
    recipe: Recipe,
    raw: Path,
    lake: Path,
    files: dict[str, RawTable],
    kept: Path | None,
    identity: str,
    max_bad: float,
) -> Plan:
    work = work_folder(lake, recipe.name)
    quarantine = Quarantine(con)
    samples = SOURCES[recipe.source.kind].read(con, quarantine, files, recipe, raw)
    reasons = quarantine.by_reason()
    quarantine.write(work / "quarantine")
    stop_if_dirty(reasons, quarantine.records, max_bad, work, lake / "quarantine" / recipe.name)
    _split_and_require(con, recipe, samples)
    for name, count in samples.counts.items():
        say(f"silver: {name}: {count:,}")
    fit = make_fit(con, recipe, samples, raw, kept)
    if not recipe.fit_from:
        fit.save(work / "fit")
    buckets = _buckets(con, work / "fit", kept)
    tasks = silver.write_tables(con, recipe.name, recipe.split.salt, buckets, work / "silver")
    silver.write_registered(files, quarantine.rows, work / "bronze")
    say(f"silver: {sum(task.n for task in tasks):,} samples in {len(tasks):,} tasks")
    schemas = _schemas(recipe, fit)
    tokenizer = _save_tokenizer(fit, lake / "gold" / recipe.name)
    return Plan(
        identity=identity,
        recipe=recipe.model_dump(mode="json"),
        modalities=schemas,
        tokenizer=tokenizer,
        labels=samples.labels,
        target=samples.target,
        numeric=samples.numeric,
        categorical=samples.categorical,
        split_rule=split.rule(recipe.split, samples.group),
        fit=fit.origin,
        counts=samples.counts,
        quarantine=reasons,
        records=quarantine.records,
        parents=[{"file": file.name, "sha256": file.sha256} for table in files.values() for file in table.files],
        created_by={name: version(name) for name in (*READERS, *WRITERS)},
        fingerprint=_fingerprint(recipe, schemas, tokenizer, samples),
        tasks=tasks,
    )


def stop_if_dirty(reasons: Mapping[str, int], records: int, max_bad: float, work: Path, target: Path) -> None:
    """Raise ValueError where more than the share ``max_bad`` of the records was set aside; what it was is published."""
    bad = sum(reasons.values())
    if bad <= max_bad * records:
        return
    publish(work / "quarantine", target)
    most = ", ".join(f"{reason} ({n:,})" for reason, n in list(reasons.items())[:3])
    raise ValueError(
        f"{bad:,} of {records:,} raw records are bad, more than --max-bad {max_bad:g}: {most}; see {target}"
    )


def _split_and_require(con: "DuckDBPyConnection", recipe: Recipe, samples: Samples) -> None:
    conditions = {
        "text": "text is not null",
        "image": "image is not null",
        "tabular": "true",
        "timeseries": "row_id in (select row_id from series)",
    }
    for name in recipe.require:
        con.execute(f"delete from samples where not ({conditions[name]})")
    samples.counts.update(split.assign(con, recipe.split, samples.group))
    if not con.execute("select count(*) from samples").fetchall()[0][0]:
        raise ValueError(f"no sample is left; rows read: {samples.counts}, required: {recipe.require or 'nothing'}")


def _buckets(con: "DuckDBPyConnection", fit: Path, kept: Path | None) -> dict[str, int]:
    """As many buckets as in the first build: else a new raw file would change every bucket."""
    if kept and (kept / BUCKETS).is_file():
        buckets = json.loads((kept / BUCKETS).read_text(encoding="utf-8"))
    else:
        buckets = silver.choose_buckets(con)
    fit.mkdir(exist_ok=True)
    (fit / BUCKETS).write_text(json.dumps(buckets) + "\n", encoding="utf-8")
    return buckets


def _schemas(recipe: Recipe, fit: Fit) -> dict[str, ModalitySchema]:
    extras = {"text": [RAW_TEXT]} if recipe.text and recipe.text.keep_raw else {}
    return {
        name: ModalitySchema(kind=name, members=MEMBERS[name], extras=extras.get(name, []), spec=spec.model_dump())
        for name, spec in fit.specs.items()
    }


def _save_tokenizer(fit: Fit, gold: Path) -> Tokenizer | None:
    """The name carries the hash: an earlier dataset keeps its own until the manifest is replaced."""
    gold.mkdir(parents=True, exist_ok=True)
    if not fit.tokenizer:
        return None
    text = fit.tokenizer.to_str(pretty=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file = f"{Path(TOKENIZER).stem}-{digest[:8]}.json"
    with whole_file(gold / file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Tokenizer(file=file, sha256=digest)


def _fingerprint(
    recipe: Recipe, schemas: dict[str, ModalitySchema], tokenizer: Tokenizer | None, samples: Samples
) -> str:
    return fingerprint(
        {
            "format": FORMAT,
            "name": recipe.name,
            "modalities": {name: schema.model_dump() for name, schema in schemas.items()},
            "tokenizer": tokenizer.sha256 if tokenizer else None,
            "labels": samples.labels,
            **({"target": samples.target} if samples.target != "class" else {}),
            "require": recipe.require,
            "shard_size": recipe.shard_size,
            "max_chars": recipe.text.max_chars if recipe.text else None,
            "versions": {name: version(name) for name in WRITERS},
        }
    )
