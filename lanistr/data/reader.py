"""Random access into the tars of a gold dataset through its index."""

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lanistr.data.plan import philox
from lanistr.manifest import Manifest
from lanistr.modalities.base import Modality


class CorruptSample(ValueError):
    """A member whose bytes are not what the index says, or cannot be decoded."""


@dataclass(frozen=True)
class Sample:
    """One decoded sample.

    Attributes:
        presence: bitmask of the modalities in use.
        label: -1 = unlabelled.
        contents: what `Modality.decode` returned, present modalities only.
    """

    key: str
    presence: int
    label: int
    contents: dict[str, Any]


class GoldDataset:
    """One split of a gold dataset, read member by member.

    Args:
        path: the dataset's folder.
        split: ``train``, ``val`` or ``test``.
        modalities: those in use; others are never read.
        crc: verify each member's crc32.

    Raises:
        ValueError: no manifest, a missing shard or index, an empty split.
    """

    def __init__(self, path: str | Path, split: str, modalities: Mapping[str, Modality[Any, Any]], crc: bool = True):
        self.path, self.split, self.crc = Path(path), split, crc
        self.manifest = Manifest.load(path)
        self.modalities = dict(modalities)
        members = [m for modality in modalities.values() for m in modality.members]
        columns = [f"{field}/{m}" for m in members for field in ("offset", "size", "crc32")]
        table = self._read_index(["key", "presence", "label", "cost", *columns])
        self.keys: list[str] = table["key"].to_pylist()
        self.n = len(self.keys)
        if not self.n:
            raise ValueError(f"{path}: split {split!r} is empty")
        used = sum(self.manifest.bit(name) for name in modalities)
        self.presence = table["presence"].to_numpy().astype(np.int64) & used
        self.label = table["label"].to_numpy().astype(np.int64)
        self.cost = table["cost"].to_numpy().astype(np.float64)
        self._places = {c: table[c].to_numpy() for c in columns}
        shards = self.manifest.shards_of(split)
        self._shard = np.repeat(np.arange(len(shards)), [s.n for s in shards])
        self._paths = [str(self.path / s.path) for s in shards]
        self._files: dict[int, int] = {}
        self._process = os.getpid()

    def _read_index(self, columns: list[str]) -> pa.Table:
        tables = []
        for shard in self.manifest.shards_of(self.split):
            for file in (shard.path, shard.index):
                if not (self.path / file).is_file():
                    raise ValueError(f"{self.path / file}: missing, but the manifest names it; rebuild the dataset")
            table = pq.read_table(self.path / shard.index, columns=columns)
            if table.num_rows != shard.n:
                raise ValueError(f"{shard.index}: {table.num_rows} rows, the manifest says {shard.n}")
            tables.append(table)
        if not tables:
            raise ValueError(f"{self.path}: no shards in split {self.split!r}")
        return pa.concat_tables(tables)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def read(self, position: int) -> Sample:
        """Read and decode the sample at ``position``. Raises `CorruptSample`."""
        contents: dict[str, Any] = {}
        for name, modality in self.modalities.items():
            if self.presence[position] & self.manifest.bit(name):
                members = {m: self._member(position, m) for m in modality.members}
                try:
                    contents[name] = modality.decode(members)
                except ValueError as error:
                    raise CorruptSample(f"{self._where(position)}: {error}") from None
        presence, label = int(self.presence[position]), int(self.label[position])
        return Sample(self.keys[position], presence, label, contents)

    def _member(self, position: int, member: str) -> bytes:
        offset, size, crc = (int(self._places[f"{field}/{member}"][position]) for field in ("offset", "size", "crc32"))
        data = os.pread(self._open(int(self._shard[position])), size, offset)
        if len(data) != size:
            raise CorruptSample(f"{self._where(position)}.{member}: {len(data)} bytes of {size}; truncated shard?")
        if self.crc and zlib.crc32(data) != crc:
            raise CorruptSample(f"{self._where(position)}.{member}: crc32 differs from the index")
        return data

    def _open(self, shard: int) -> int:
        if self._process != os.getpid():  # a forked worker opens its own files
            self._files, self._process = {}, os.getpid()
        if shard not in self._files:
            self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
        return self._files[shard]

    def _where(self, position: int) -> str:
        return f"{self._paths[int(self._shard[position])]}: {self.keys[position]}"

    def labelled(self, limit: int | None, seed: int) -> np.ndarray:
        """Positions of ``limit`` labelled samples (None = all), spread over the classes as in the split, ascending.

        Smaller draws are subsets of larger ones with the same seed, up to rounding by class.

        Raises:
            ValueError: fewer labelled samples than asked for.
        """
        labelled = np.flatnonzero(self.label >= 0)
        if limit is None:
            return labelled
        if limit > len(labelled):
            raise ValueError(f"{limit} labels asked for; split {self.split!r} has {len(labelled)}")
        order = labelled[philox("labels", self.manifest.content_id, seed).permutation(len(labelled))]
        classes = self.label[order]
        place = np.empty(len(order))
        for value in np.unique(classes):
            rows = np.flatnonzero(classes == value)
            place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        return np.sort(order[np.argsort(place, kind="stable")[:limit]])
