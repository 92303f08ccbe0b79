"""Gold as tasks: one bucket in, its shards and a report out. Idempotent, and finished as soon as the report is there.

A task's id is a hash over everything that its bytes depend on: rows, image files, specs, tokenizer, how to encode, the
format, the versions of the libraries that write. File names carry it, so a task never overwrites another's files.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from etl.encoder import EncodedSample, Encoder, RawSample
from etl.lake import whole_file
from etl.shards import write_shards
from etl.silver import Task
from lanistr.manifest import ModalitySchema, Shard, Strict, Target
from lanistr.transforms import ImageSpec, Point

REPORTS = "reports"
BATCH = 512


class BrokenImage(Strict):
    """An image that could not be used: quarantine keyed by sample."""

    file: str
    reason: str
    key: str


class Report(Strict):
    """What a finished task wrote. The file holds no time and no host: a rerun gives the same bytes.

    Attributes:
        n: samples read; those that a required modality is missing from are not written.
        reused: the task had been finished before (not stored).
    """

    task: str
    split: str
    bucket: int
    n: int
    shards: list[Shard]
    broken_images: list[BrokenImage]
    reused: bool = Field(default=False, exclude=True)


@dataclass(frozen=True)
class Job:
    """What the tasks of a build have in common; picklable. The folders must be the same on every machine.

    Attributes:
        name: of the dataset.
        silver: folder that the paths of a task are relative to.
        gold: folder of the dataset.
        labels, target: of the manifest.
        numeric, categorical: tabular columns.
        require: modalities that a sample must have.
        shard_size: samples per shard.
        fingerprint: of all that the bytes depend on, but for the rows and images.
    """

    name: str
    silver: Path
    gold: Path
    encoder: Encoder
    schemas: dict[str, ModalitySchema]
    labels: tuple[str, ...]
    target: Target
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    require: tuple[str, ...]
    shard_size: int
    fingerprint: str


def run_task(job: Job, task: Task) -> Report:
    """Make the shards of one bucket, or find that they were made before."""
    identity = task_id(job, task)
    path = job.gold / REPORTS / f"{task.name}-{identity[:16]}.json"
    done = read_report(path)
    if done and done.task == identity and all(_is_there(job.gold, shard) for shard in done.shards):
        return done.model_copy(update={"reused": True})
    for folder in (path.parent, job.gold / task.split):
        folder.mkdir(parents=True, exist_ok=True)
    broken: list[BrokenImage] = []
    samples = _kept(job, task, broken)
    stem = f"{job.name}-{task.name}-{{}}-{identity[:8]}"
    shards = list(write_shards(job.gold, task.split, stem, samples, job.schemas, job.shard_size, job.target))
    report = Report(task=identity, split=task.split, bucket=task.bucket, n=task.n, shards=shards, broken_images=broken)
    with whole_file(path) as temporary:
        temporary.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return report


def task_id(job: Job, task: Task) -> str:
    """sha256 over all that the bytes of a task depend on."""
    images = hashlib.sha256()
    if any(isinstance(spec, ImageSpec) for spec in job.encoder.specs.values()):
        for (name,) in _rows(job.silver / task.rows, ["image"]):
            if name:
                images.update(job.encoder.image_digest(name).rjust(32, b"\0"))
    parts = [job.fingerprint, task.split, str(task.bucket), task.sha256, images.hexdigest()]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def read_report(path: Path) -> Report | None:
    """A report, or None where there is none that can be read."""
    try:
        return Report.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _is_there(gold: Path, shard: Shard) -> bool:
    tar, index = gold / shard.path, gold / shard.index
    return tar.is_file() and tar.stat().st_size == shard.bytes and index.is_file()


def _kept(job: Job, task: Task, broken: list[BrokenImage]) -> Iterator[EncodedSample]:
    """The encoded samples that have what the recipe requires; broken images are noted down."""
    for raw in read_samples(job, task):
        sample = job.encoder.encode(raw)
        if sample.bad_image:
            broken.append(BrokenImage(file=raw.image or "", reason=sample.bad_image, key=raw.key))
        if all(sample.lengths[name] for name in job.require):
            yield sample


def read_samples(job: Job, task: Task) -> Iterator[RawSample]:
    """The samples of a bucket by key, a few at a time."""
    ids = {label: i for i, label in enumerate(job.labels)}
    names = [*job.numeric, *job.categorical]
    tabular = [*(f"n:{c}" for c in job.numeric), *(f"c:{c}" for c in job.categorical)]
    columns = ["key", "group_hash", "label", "text", "image", "_file", "_row", *tabular]
    series = _series(job.silver / task.series) if task.series else iter(())
    pending = next(series, None)
    for key, group, label, text, image, file, line, *cells in _rows(job.silver / task.rows, columns):
        points: list[Point] = []
        if pending and pending[0] == key:
            points, pending = pending[1], next(series, None)
        yield RawSample(
            key=key,
            group_hash=group,
            label=ids.get(label, -1) if job.target == "class" else -1 + bool(label),
            text=text,
            image=image,
            row=dict(zip(names, cells, strict=True)) if "tabular" in job.schemas else None,
            series=points,
            source_file=file,
            source_row=line,
            target=tuple(json.loads(label)) if label and job.target != "class" else (),
        )
    assert pending is None, f"{task.name}: series of {pending[0]}, which is no sample"


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH, columns=columns):
            yield from zip(*(batch[name].to_pylist() for name in columns), strict=True)


def _series(path: Path) -> Iterator[tuple[str, list[Point]]]:
    """(key, its points) in the order of the file."""
    key, points = None, []
    for row in _rows(path, ["key", "time", "variable", "value"]):
        if row[0] != key:
            if key is not None:
                yield key, points
            key, points = row[0], []
        points.append(row[1:])
    if key is not None:
        yield key, points


def fingerprint(parts: dict[str, Any]) -> str:
    """sha256 over values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
