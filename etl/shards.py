"""Samples -> USTAR tars and their index Parquets, byte-identical whatever makes them.

webdataset's own writer stores a float time in PAX headers: a third more bytes, and other bytes on each run.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from etl.encoder import EncodedSample
from etl.lake import whole_file
from lanistr.manifest import ModalitySchema, Shard, Target, index_columns
from lanistr.transforms import read_npy

FORMAT = 1  # raise it when the same samples would give other bytes: finished tasks are then made anew
BLOCK = 512
IMAGE_COST = 64.0  # relative cost of an image beside one text token or time step


def tar_header(name: str, size: int) -> bytes:
    """A USTAR header of a regular file: time, owner and group 0."""
    fields = [
        (name.encode("ascii"), 100),
        (b"0000644\0", 8),
        (b"0000000\0", 8),
        (b"0000000\0", 8),
        (b"%011o\0" % size, 12),
        (b"00000000000\0", 12),
        (b"        ", 8),
        (b"0", 1),
        (b"", 100),
        (b"ustar\x0000", 8),
    ]
    assert len(name) <= 100, name
    header = b"".join(value.ljust(width, b"\0") for value, width in fields).ljust(BLOCK, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def write_shards(
    gold: Path,
    split: str,
    stem: str,
    samples: Iterable[EncodedSample],
    schemas: dict[str, ModalitySchema],
    size: int,
    target: Target = "class",
) -> Iterator[Shard]:
    """Write a stream of samples as shards of ``size`` samples; no more than one sample is held at a time.

    Args:
        gold: folder of the dataset.
        split: subfolder.
        stem: file name with ``{}`` for the number of the shard.
        samples: in order.
        schemas: in bit order.
        size: samples per shard.
        target: of the manifest.
    """
    iterator = iter(samples)
    for number, first in enumerate(iterator):
        part = chain([first], islice(iterator, size - 1))
        yield write_shard(gold, split, stem.format(f"{number:05d}"), part, schemas, target)


def write_shard(
    gold: Path,
    split: str,
    stem: str,
    samples: Iterable[EncodedSample],
    schemas: dict[str, ModalitySchema],
    target: Target = "class",
) -> Shard:
    """Write one tar and its index, tar first; each appears whole or not at all."""
    path, index = f"{split}/{stem}.tar", f"{split}/{stem}.parquet"
    digest = hashlib.sha256()
    rows: list[dict[str, Any]] = []
    position = 0
    with whole_file(gold / path) as temporary, open(temporary, "wb") as file:
        for sample in samples:
            places = {}
            for member, data in sample.members.items():
                places[member] = (position + BLOCK, len(data), zlib.crc32(data))
                block = tar_header(f"{sample.raw.key}.{member}", len(data)) + data + b"\0" * (-len(data) % BLOCK)
                file.write(block)
                digest.update(block)
                position += len(block)
            rows.append(_index_row(sample, places, schemas))
        file.write(b"\0" * 2 * BLOCK)
        digest.update(b"\0" * 2 * BLOCK)
    masks = Counter(row["presence"] for row in rows)
    return Shard(
        split=split,
        path=path,
        index=index,
        n=len(rows),
        bytes=position + 2 * BLOCK,
        sha256=digest.hexdigest(),
        index_sha256=write_index(gold / index, rows, schemas, target),
        n_by_mask={str(mask): masks[mask] for mask in sorted(masks)},
    )


def write_index(
    path: Path, rows: list[dict[str, Any]], schemas: dict[str, ModalitySchema], target: Target = "class"
) -> str:
    """Write the index Parquet of a shard; returns its sha256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"string": pa.string(), "list<float32>": pa.list_(pa.float32())}
    fields = [(name, types.get(kind) or getattr(pa, kind)()) for name, kind in index_columns(schemas, target)]
    with whole_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), temporary, compression="zstd")
        return hashlib.sha256(temporary.read_bytes()).hexdigest()


def _index_row(
    sample: EncodedSample, places: dict[str, tuple[int, int, int]], schemas: dict[str, ModalitySchema]
) -> dict[str, Any]:
    raw = sample.raw
    mask = sum(1 << bit for bit, schema in enumerate(schemas.values()) if schema.members[0] in places)
    images = sum(bool(sample.lengths[name]) for name, schema in schemas.items() if schema.kind == "image")
    others = sum(sample.lengths[name] for name, schema in schemas.items() if schema.kind != "image")
    row: dict[str, Any] = {
        "key": raw.key,
        "group_hash": raw.group_hash,
        "presence": mask,
        "label": raw.label,
        "target": [float("nan") if value is None else value for value in raw.target],
        "cost": 1 + others + IMAGE_COST * images,
        "source_file": raw.source_file,
        "source_row": raw.source_row,
        "tab": read_npy(sample.members["tab.npy"]).tolist() if "tab.npy" in places else [],
    }
    members = ["json", *(member for schema in schemas.values() for member in schema.stored)]
    for member in members:
        offset, size, crc = places.get(member, (-1, 0, 0))
        row |= {f"offset/{member}": offset, f"size/{member}": size, f"crc32/{member}": crc}
    return row | {f"length/{name}": sample.lengths[name] for name in schemas}
