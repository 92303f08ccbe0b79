"""The feature cache on disk: outputs of frozen encoders, computed once, read through mmap.

``<folder>/cache.json`` (written last) says what the features were made with. Each rank that made them wrote a part: for a
split ``<split>-<part>-positions.npy`` and per modality and view ``<split>-<part>-<modality>-<view>.rows`` (rows of all its
samples, one after the other) and ``.ends.npy`` (where each sample's end).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lanistr.data.reader import GoldDataset
from lanistr.data.samples import Fetched
from lanistr.modalities.base import Modality
from lanistr.modalities.encoded import DTYPES, EncodedModality

CACHE = "cache.json"
FORMAT = 1


@dataclass(frozen=True)
class CacheMeta:
    """Contents of ``cache.json``.

    Attributes:
        identity: what the features depend on, and the samples that there are; compared key by key.
        hidden: width per modality.
        parts: number of parts.
    """

    identity: dict[str, Any]
    hidden: dict[str, int]
    parts: int

    @classmethod
    def load(cls, folder: Path) -> "CacheMeta | None":
        """None = nothing finished is there. Raises ValueError for a file of another kind."""
        path = folder / CACHE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not the description of a feature cache ({error}); remove {folder}") from None

    def check(self, identity: Mapping[str, Any], folder: Path) -> None:
        """Raises ValueError naming both values where the features were made with anything else."""
        for key in {**self.identity, **identity}:
            there, here = self.identity.get(key), identity.get(key)
            if there != here:
                raise ValueError(
                    f"{folder}: stale feature cache: it was made with {key} {there}, this run has {here}; remove it, or "
                    "give another finetune.cache"
                )


def part_path(folder: Path, split: str, part: int, modality: str, view: int) -> Path:
    """The rows of one modality and view; their ends lie beside them."""
    return folder / f"{split}-{part:05d}-{modality}-{view}.rows"


def positions_path(folder: Path, split: str, part: int) -> Path:
    """The samples of a part, ascending; those of the next part come after them."""
    return folder / f"{split}-{part:05d}-positions.npy"


class PartWriter:
    """Writes the rows of one modality and view of a part, sample after sample."""

    def __init__(self, path: Path):
        self.path, self.ends = path, [0]
        self.file = path.open("wb")

    def add(self, rows_RH: np.ndarray, counts_B: np.ndarray) -> None:
        """Rows of the next samples; 0 rows = the sample has none."""
        assert counts_B.sum() == len(rows_RH), "rows of other samples"
        self.file.write(np.ascontiguousarray(rows_RH).tobytes())
        self.ends += (self.ends[-1] + np.cumsum(counts_B)).tolist()

    def close(self) -> None:
        """Write where each sample ends."""
        self.file.close()
        np.save(self.path.with_suffix(".ends.npy"), np.array(self.ends, dtype=np.int64))


@dataclass
class _Part:
    rows_RH: np.ndarray
    ends: np.ndarray


class Features:
    """A finished cache, opened where it is read: worker processes map the files themselves.

    Args:
        folder: of the cache.
        split: which samples.
        meta: of the cache.
        dtype: of the rows.
        views: per modality.

    Raises:
        ValueError: files that are gone or cut short.
    """

    def __init__(self, folder: Path, split: str, meta: CacheMeta, dtype: str, views: Mapping[str, int]):
        self.folder, self.split, self.meta, self.dtype, self.views = folder, split, meta, dtype, dict(views)
        assert len(self._positions) == meta.parts, "a part per rank"
        for modality, count in self.views.items():
            for part in range(meta.parts):
                for view in range(count):
                    self._open(part, modality, view)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_positions", "_opened")}

    @cached_property
    def _opened(self) -> dict[tuple[int, str, int], _Part]:
        return {}

    @cached_property
    def _positions(self) -> list[np.ndarray]:
        try:
            return [np.load(positions_path(self.folder, self.split, part)) for part in range(self.meta.parts)]
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder}: damaged feature cache: {error}; remove it") from None

    def _open(self, part: int, modality: str, view: int) -> _Part:
        found = self._opened.get((part, modality, view))
        if found is None:
            path = part_path(self.folder, self.split, part, modality, view)
            hidden, dtype = self.meta.hidden[modality], DTYPES[self.dtype]
            try:
                ends = np.load(path.with_suffix(".ends.npy"))
                size = path.stat().st_size
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.folder}: damaged feature cache: {error}; remove it") from None
            if size != int(ends[-1]) * hidden * dtype.itemsize:
                raise ValueError(
                    f"{path}: {size} bytes, {ends[-1]} rows of {hidden} {self.dtype}: remove {self.folder}"
                )
            rows = np.memmap(path, dtype, "r", shape=(int(ends[-1]), hidden)) if size else np.zeros((0, hidden), dtype)
            found = self._opened[part, modality, view] = _Part(rows, ends)
        return found

    def find(self, position: int) -> tuple[int, int] | None:
        """Part and row of a sample; None = it is not in the cache."""
        for part, own in enumerate(self._positions):
            if len(own) and position <= own[-1]:
                row = int(own.searchsorted(position))
                return (part, row) if own[row] == position else None
        return None

    def rows(self, position: int, modality: str, view: int) -> np.ndarray | None:
        """(rows, H) of a sample that is in the cache; None where it lacks the modality."""
        found = self.find(position)
        assert found, "a sample that was not cached"
        part, row = found
        opened = self._open(part, modality, view)
        start, stop = opened.ends[row], opened.ends[row + 1]
        return opened.rows_RH[start:stop] if stop > start else None


class CachedDataset(GoldDataset):
    """A split of which some modalities are read from the cache; the others are read, and all is planned, as before.

    Args:
        dataset: the split.
        features: of these samples.
        modalities: the cached ones.
    """

    def __init__(self, dataset: GoldDataset, features: Features, modalities: Sequence[EncodedModality]):
        self.__dict__.update(dataset.__dict__)
        self.features = features
        cached = {modality.name: modality for modality in modalities}
        self.cached = list(cached.values())
        self.modalities: dict[str, Modality[Any, Any]] = {
            name: cached.get(name, m) for name, m in dataset.modalities.items()
        }
        others = {name: m for name, m in dataset.modalities.items() if name not in cached}
        self.others = dataset.only(others) if others else None

    def substitutes(self, position: int, *rng_key: object) -> list[int]:
        """As `GoldDataset.substitutes`, of the cached samples."""
        return [found for found in super().substitutes(position, *rng_key) if self.features.find(found)]

    def fetch(self, position: int) -> Fetched:
        """As `GoldDataset.fetch`, with rows of the cache among the members."""
        shard, row = self.locate(position)
        part = self.index[shard]
        fetched = self.others.fetch(position) if self.others else None
        members, presence = (dict(fetched.members), fetched.presence) if fetched else ({}, 0)
        for modality in self.cached:
            for view in range(modality.views):
                rows = self.features.rows(position, modality.name, view)
                if rows is not None:
                    presence |= self.index.bits[modality.name]
                    members[modality.view(view)] = rows.tobytes()
        return Fetched(
            key=part.keys_N[row].decode(),
            presence=presence,
            label=int(part.label_N[row]),
            target=part.target_NL[row] if self.index.targets else None,
            members=members,
            where=str(self.features.folder),
        )
