"""Samples -> USTAR tars and their index Parquets, byte-identical whatever the number of workers.

webdataset's own writer stores a float time in PAX headers: a third more bytes, and other bytes on each run.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lanistr.manifest import ModalitySchema, Shard, index_columns
from lanistr.transforms import (
    ImageSpec,
    Point,
    SeriesSpec,
    TabularEncoder,
    TabularSpec,
    TextSpec,
    encode_image,
    encode_points,
    encode_text,
    load_tokenizer,
    read_npy,
)

BLOCK = 512
IMAGE_COST = 64.0  # relative cost of an image beside one text token or time step
CHUNK = 64


@dataclass(frozen=True)
class RawSample:
    """A row of the silver tables.

    Attributes:
        label: class id, -1 = unlabelled.
        row: tabular values by column.
        series: points (time, variable, value), by time.
    """

    key: str
    group_hash: str
    label: int
    text: str | None
    image: str | None
    row: dict[str, Any] | None
    series: list[Point]
    source_file: str
    source_row: int


@dataclass(frozen=True)
class EncodedSample:
    """Members in the order of the tar, and what was wrong with the image, if anything."""

    raw: RawSample
    members: dict[str, bytes]
    lengths: dict[str, int]
    bad_image: str | None = None


@dataclass(frozen=True)
class Encoder:
    """What a worker needs to encode samples; picklable.

    Attributes:
        specs: of each modality, in bit order.
        raw: raw folder; no image outside of it is read.
        tokenizer: its file.
    """

    specs: dict[str, Any]
    raw: Path
    tokenizer: Path | None
    max_chars: int | None
    _cache: dict[str, Any] = field(default_factory=dict, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def encode(self, raw: RawSample) -> EncodedSample:
        """All members of a sample; a missing modality has none."""
        found: dict[str, dict[str, bytes]] = {}
        lengths: dict[str, int] = {}
        bad_image = None
        for name, spec in self.specs.items():
            members: dict[str, bytes] = {}
            if isinstance(spec, TextSpec) and raw.text:
                members = encode_text(raw.text[: self.max_chars], self._tokenizer(), spec)
            elif isinstance(spec, ImageSpec) and raw.image:
                members, bad_image = self._image(raw.image, spec)
            elif isinstance(spec, TabularSpec) and raw.row is not None:
                members = self._tabular(spec).encode(raw.row)
            elif isinstance(spec, SeriesSpec) and raw.series:
                members = encode_points(raw.series, spec)
            found[name] = members
            lengths[name] = _length(members)
        present = [name for name, members in found.items() if members]
        header = {"label": raw.label, "group": raw.group_hash, "modalities": present}
        members = {
            "json": json.dumps(header).encode(),
            **{m: b for f in found.values() for m, b in f.items()},
        }
        return EncodedSample(raw, members, lengths, bad_image)

    def encode_many(self, raws: Sequence[RawSample]) -> list[EncodedSample]:
        """A worker's unit of work."""
        return [self.encode(raw) for raw in raws]

    def _tokenizer(self) -> Any:
        if "tokenizer" not in self._cache:
            assert self.tokenizer is not None
            self._cache["tokenizer"] = load_tokenizer(self.tokenizer)
        return self._cache["tokenizer"]

    def _tabular(self, spec: TabularSpec) -> TabularEncoder:
        if "tabular" not in self._cache:
            self._cache["tabular"] = TabularEncoder(spec)
        return self._cache["tabular"]

    def _image(self, name: str, spec: ImageSpec) -> tuple[dict[str, bytes], str | None]:
        path = (self.raw / name).resolve()
        if not path.is_relative_to(self.raw.resolve()):
            return {}, "image outside of the raw folder"
        if not path.is_file():
            return {}, None
        try:
            return encode_image(path.read_bytes(), spec), None
        except ValueError:
            return {}, "broken image"


def _length(members: dict[str, bytes]) -> int:
    """Tokens or steps; 1 for an image or a row; 0 where absent."""
    for name, data in members.items():
        if name in ("tok.npy", "ts.npy"):
            return len(read_npy(data))
    return int(bool(members))


def encode_all(raws: Iterable[RawSample], encoder: Encoder, workers: int) -> Iterator[EncodedSample]:
    """Encode in order, in this process or in a pool."""
    if workers <= 1:
        yield from map(encoder.encode, raws)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        chunks = _chunks(raws)
        pending = [pool.submit(encoder.encode_many, chunk) for chunk in islice(chunks, 2 * workers)]
        while pending:
            yield from pending.pop(0).result()
            pending += [pool.submit(encoder.encode_many, chunk) for chunk in islice(chunks, 1)]


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


def write_shard(
    folder: Path, split: str, stem: str, samples: Sequence[EncodedSample], schemas: dict[str, ModalitySchema]
) -> Shard:
    """Write one tar and its index, tar first, each synced to disk.

    Args:
        folder: of the dataset.
        split: subfolder.
        stem: file name without suffix.
        samples: in order.
        schemas: in bit order.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, index = f"{split}/{stem}.tar", f"{split}/{stem}.parquet"
    digest = hashlib.sha256()
    rows: list[dict[str, Any]] = []
    position = 0
    with open(folder / path, "wb") as file:
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
        file.flush()
        os.fsync(file.fileno())
    types = {"string": pa.string(), "list<float32>": pa.list_(pa.float32())}
    fields = [(name, types.get(kind) or getattr(pa, kind)()) for name, kind in index_columns(schemas)]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), folder / index, compression="zstd")
    masks = [row["presence"] for row in rows]
    return Shard(
        split=split,
        path=path,
        index=index,
        n=len(rows),
        bytes=position + 2 * BLOCK,
        sha256=digest.hexdigest(),
        index_sha256=hashlib.sha256((folder / index).read_bytes()).hexdigest(),
        n_by_mask={str(mask): masks.count(mask) for mask in sorted(set(masks))},
    )


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
        "cost": 1 + others + IMAGE_COST * images,
        "source_file": raw.source_file,
        "source_row": raw.source_row,
        "tab": read_npy(sample.members["tab.npy"]).tolist() if "tab.npy" in places else [],
    }
    members = ["json", *(member for schema in schemas.values() for member in schema.members)]
    for member in members:
        offset, size, crc = places.get(member, (-1, 0, 0))
        row |= {f"offset/{member}": offset, f"size/{member}": size, f"crc32/{member}": crc}
    return row | {f"length/{name}": sample.lengths[name] for name in schemas}


def _chunks(raws: Iterable[RawSample]) -> Iterator[tuple[RawSample, ...]]:
    iterator = iter(raws)
    while chunk := tuple(islice(iterator, CHUNK)):
        yield chunk
