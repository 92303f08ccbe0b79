"""Prediction from a file of raw records, or a gold dataset, into a Parquet file."""

import csv
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lanistr.manifest import MANIFEST_NAME
from lanistr.predict import Prediction, Predictor, Record

CHUNK = 512


@dataclass(frozen=True)
class Outcome:
    """What `write_predictions` did.

    Attributes:
        answered, failed: records.
        ignored: columns of the input that the model does not know.
        first_error: of the records that failed.
    """

    answered: int
    failed: int
    ignored: tuple[str, ...]
    first_error: str | None


def write_predictions(
    predictor: Predictor,
    source: Path,
    out: Path,
    *,
    split: str = "test",
    identifier: str | None = None,
    embeddings: bool = False,
) -> Outcome:
    """Answer every record of ``source``, in order, a few hundred at a time; ``out`` appears whole or not at all.

    Columns: ``row`` (or ``key``, of a gold dataset; and the identifier), ``prediction``, ``p/<class or label>``,
    ``value/<column>``, ``embedding/<name>``, ``error``.

    Args:
        predictor: the model.
        source: ``.jsonl``, ``.csv`` (empty = missing) or ``.parquet`` with a record per row, or a gold dataset. Paths of
            images are relative to the file.
        out: Parquet file.
        split: of a gold dataset.
        identifier: a column that is copied.
        embeddings: write them, too.

    Raises:
        ValueError: the source cannot be read, or the model has nothing to say about it.
    """
    if source.is_dir() and not (source / MANIFEST_NAME).is_file():
        raise ValueError(f"{source}: a folder without {MANIFEST_NAME}; give a file or a gold dataset")
    ignored: dict[str, None] = {}
    if source.is_dir():
        keyed = predictor.predict_gold(source, split, embeddings=embeddings)
        answers: Iterator[tuple[dict[str, Any], Prediction]] = (({"key": key}, one) for key, one in keyed)
    else:
        answers = _answers(predictor, source, identifier, embeddings, ignored)
    schema = _schema(predictor, source.is_dir(), identifier, embeddings)
    temporary = out.with_name(f".{out.name}.tmp")
    answered = failed = 0
    first_error = None
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            while chunk := list(itertools.islice(answers, CHUNK)):
                errors = [one.error for _, one in chunk if one.error is not None]
                first_error = first_error or (errors[0] if errors else None)
                answered, failed = answered + len(chunk) - len(errors), failed + len(errors)
                rows = [about | _row(one) for about, one in chunk]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return Outcome(answered, failed, tuple(ignored), first_error)


def _schema(predictor: Predictor, gold: bool, identifier: str | None, embeddings: bool) -> pa.Schema:
    config = predictor.config
    fields = [("key", pa.string())] if gold else [("row", pa.int64())]
    fields += [(identifier, pa.string())] if identifier and not gold else []
    if predictor.task and config.target == "class":
        fields.append(("prediction", pa.string()))
    elif predictor.task and config.target == "multilabel":
        fields.append(("prediction", pa.list_(pa.string())))
    prefix = "value" if config.target == "regression" else "p"
    fields += [(f"{prefix}/{name}", pa.float64()) for name in config.labels]
    if embeddings:
        names = ["fused", "cls", *predictor.modalities]
        fields += [(f"embedding/{name}", pa.list_(pa.float32())) for name in names]
    return pa.schema([*fields, ("error", pa.string())])


def _row(one: Prediction) -> dict[str, Any]:
    return {
        "prediction": one.label if one.label is not None or one.error else one.labels,
        **{f"p/{name}": p for name, p in one.probabilities.items()},
        **{f"value/{name}": value for name, value in one.values.items()},
        **{f"embedding/{name}": values for name, values in one.embeddings.items()},
        "error": one.error,
    }


def _answers(
    predictor: Predictor, source: Path, identifier: str | None, embeddings: bool, ignored: dict[str, None]
) -> Iterator[tuple[dict[str, Any], Prediction]]:
    predictor.context = replace(predictor.context, folder=source.parent)
    known = set(predictor.keys)
    rows = enumerate(read_records(source))
    while chunk := list(itertools.islice(rows, CHUNK)):
        records: list[Any] = []
        for _, record in chunk:
            if isinstance(record, dict):
                ignored |= dict.fromkeys(key for key in record if key not in known and key != identifier)
            records.append({k: v for k, v in record.items() if k in known} if isinstance(record, dict) else record)
        answers = predictor.predict(records, embeddings=embeddings)
        for (row, record), one in zip(chunk, answers, strict=True):
            if isinstance(record, str):  # the line could not be read, and says why
                one = Prediction(error=record)
            about: dict[str, Any] = {"row": row}
            if identifier:
                found = record.get(identifier) if isinstance(record, dict) else None
                about[identifier] = None if found is None else str(found)
            yield about, one


def read_records(source: Path) -> Iterator[Record | str]:
    """The records of a file; in the place of one that cannot be read, what is wrong with it.

    Raises:
        ValueError: no such file, or of another kind.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    if source.suffix not in readers:
        raise ValueError(f"{source}: give {', '.join(readers)}, or a gold dataset")
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    try:
        yield from readers[source.suffix](source)
    except (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: cannot be read: {str(error).splitlines()[0]}") from None


def _json_lines(source: Path) -> Iterator[Record | str]:
    with source.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                try:
                    found = json.loads(line)
                except ValueError as error:
                    found = f"not JSON: {error}"
                yield found if isinstance(found, dict | str) else f"not a JSON object: {line.strip()[:40]}"


def _csv(source: Path) -> Iterator[Record | str]:
    with source.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            if None in row:
                yield f"{len(row[None])} cells too many"
            else:
                yield {key: value or None for key, value in row.items()}


def _parquet(source: Path) -> Iterator[Record | str]:
    with pq.ParquetFile(source) as file:
        for batch in file.iter_batches(CHUNK):
            yield from batch.to_pylist()


def latency(predictor: Predictor, records: Sequence[Record], repeats: int) -> dict[str, float]:
    """Milliseconds that one record takes, from raw values to the answer: p50, p95, and how many were timed.

    Args:
        predictor: the model.
        records: each is answered alone, in turn.
        repeats: how often all of them are; one round before is not timed.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("no records to time")
    times = []
    for turn in range(repeats + 1):
        for record in records:
            start = time.perf_counter()
            predictor.predict(record, embeddings=predictor.task is None)
            if turn:
                times.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(times, [50, 95])
    return {"p50_ms": round(float(p50), 3), "p95_ms": round(float(p95), 3), "n": len(times)}
