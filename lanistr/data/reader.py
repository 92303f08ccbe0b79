"""Random access into the tars of a gold dataset through its index: only the members that the recipe uses."""

import hashlib
import logging
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lanistr.config import DataConfig
from lanistr.data.index import ShardIndex, SplitIndex
from lanistr.data.plan import Facts
from lanistr.data.remote import Blob, Store, open_store
from lanistr.data.samples import CorruptSample, Fetched, Sample, intact, read_samples
from lanistr.data.streams import philox
from lanistr.manifest import Manifest
from lanistr.modalities.base import Modality

logger = logging.getLogger(__name__)
Crc = Literal["first", "always", "never"]
CACHED = ("keys", "presence", "label", "target", "group")  # not sent to worker processes
OPEN_FILES = 256
TRIES = 8  # replacements tried for one bad sample


class GoldDataset:
    """One split of a gold dataset, read member by member.

    Args:
        path: the dataset's folder, or an fsspec address.
        split: ``train``, ``val`` or ``test``.
        modalities: those in use; others are never read.
        crc: verify a member's crc32 the ``first`` time that this process reads it, ``always`` or ``never``.
        store: where the files are; None = found by ``path``, with the default cache.

    Raises:
        ValueError: no manifest, a missing shard or index, an empty split.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        modalities: Mapping[str, Modality[Any, Any]],
        crc: Crc = "first",
        store: Store | None = None,
    ):
        self.path, self.split = path, split
        self.crc: Crc = crc
        self.store = store or _default_store(path, DataConfig())
        self.manifest = Manifest.load(self.store.folder())
        self.modalities = dict(modalities)
        self.shards = self.manifest.shards_of(split)
        self.shard_sizes = np.array([shard.n for shard in self.shards], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._starts: list[int] = self.starts.tolist()  # a list is searched in a third of the time
        self.n = self._starts[-1]
        if not self.n:
            raise ValueError(f"{path}: split {split!r} is empty")
        for shard in self.shards:
            for file in (shard.path, shard.index):
                if not self.store.exists(file):
                    raise ValueError(f"{path}: {file} is missing, but the manifest names it; rebuild the dataset")
        self.index = SplitIndex(self.store, self.manifest, self.shards, self.modalities)
        self._blobs: OrderedDict[int, Blob] = OrderedDict()
        self._verified: dict[int, bytearray] = {}
        self._where = [f"{path}/{shard.path}" for shard in self.shards]

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in CACHED}
        return {**state, "_blobs": OrderedDict(), "_verified": {}}

    def only(self, names: Collection[str]) -> "GoldDataset":
        """The same split without its other modalities, which then need not be decoded."""
        kept = {name: modality for name, modality in self.modalities.items() if name in names}
        return GoldDataset(self.path, self.split, kept, self.crc, self.store)

    @property
    def content_id(self) -> str:
        """Identity of the data."""
        return self.manifest.content_id

    @property
    def view_id(self) -> str:
        """Identity of what is read of it; of a view that rewrites samples another one."""
        return self.content_id

    @property
    def repeats(self) -> np.ndarray:
        """Each shard once per epoch."""
        return np.ones(len(self.shards))

    def facts(self, shard: int) -> Facts:
        """For the plan (`lanistr.data.plan.Source`)."""
        return self.index[shard].facts

    @cached_property
    def keys(self) -> list[str]:
        """Of all samples: loads the whole index."""
        return [key.decode() for part in self._parts() for key in part.keys_N]

    @cached_property
    def presence(self) -> np.ndarray:
        """(n,) int64 bitmasks of the modalities in use: loads the whole index."""
        return np.concatenate([part.presence_N for part in self._parts()])

    @cached_property
    def label(self) -> np.ndarray:
        """(n,) int64, -1 = unlabelled: loads the whole index."""
        return np.concatenate([part.label_N for part in self._parts()])

    @cached_property
    def target(self) -> np.ndarray:
        """(n, L) float32 numbers, NaN = unknown; L is 0 where the target is a class: loads the whole index."""
        return np.concatenate([part.target_NL for part in self._parts()])

    @cached_property
    def group(self) -> np.ndarray:
        """(n,) hash of what a sample belongs to (a patient, a reviewer): loads the whole index."""
        return np.concatenate([self.index.column(shard, "group_hash") for shard in range(len(self.shards))])

    def facts_of(self, positions: np.ndarray) -> Facts:
        """For the plan of a subset: loads the whole index."""
        parts = [part.facts for part in self._parts()]
        columns = ("strata_N", "tokens_N", "lengths_N")
        return Facts(*(np.concatenate([getattr(facts, name) for facts in parts])[positions] for name in columns))

    def _parts(self) -> list[ShardIndex]:
        return [self.index[shard] for shard in range(len(self.shards))]

    def locate(self, position: int) -> tuple[int, int]:
        """Shard and row of a sample."""
        shard = bisect_right(self._starts, position) - 1
        return shard, position - self._starts[shard]

    def read(self, position: int) -> Sample:
        """Read and decode the sample at ``position``. Raises `CorruptSample`: its bytes are gone or damaged."""
        return intact(read_samples(self, [position]))[0]

    def fetch(self, position: int) -> Fetched:
        """The members in use of the sample at ``position``. Raises `CorruptSample`: its bytes are gone or damaged."""
        shard, row = self.locate(position)
        part = self.index[shard]
        key = part.keys_N.item(row).decode()
        where = self._where[shard]
        verify = self._must_verify(shard, row)
        members: dict[str, bytes] = {}
        try:
            blob = self._blob(shard)
            for (offset, size, crc), member in zip(part.places_NM3[row].tolist(), self.index.members, strict=True):
                if offset < 0:
                    continue
                members[member] = data = blob.read(offset, size)
                if len(data) != size:
                    raise CorruptSample(key, f"{where}: {key}.{member}: {len(data)} bytes of {size}; truncated shard?")
                if verify and zlib.crc32(data) != crc:
                    raise CorruptSample(key, f"{where}: {key}.{member}: crc32 differs from the index")
        except OSError as error:
            raise CorruptSample(key, f"{where}: {key}: cannot be read: {error}") from None
        if verify and self.crc == "first":
            self._verified[shard][row] = True
        target = part.target_NL[row] if self.index.targets else None
        return Fetched(key, part.presence_N.item(row), part.label_N.item(row), target, members, where)

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Begin to fetch remote shards that will be read soon."""
        described = [self.shards[shard] for shard in shards]
        self.store.fetch_ahead([(shard.path, shard.bytes, shard.sha256) for shard in described])

    def _must_verify(self, shard: int, row: int) -> bool:
        if self.crc != "first":
            return self.crc == "always"
        if shard not in self._verified:
            self._verified[shard] = bytearray(self.shards[shard].n)
        return not self._verified[shard][row]

    def _blob(self, shard: int) -> Blob:
        if shard not in self._blobs:
            described = self.shards[shard]
            blob = self._blobs[shard] = self.store.open(described.path, described.bytes, described.sha256)
            if blob.size != described.bytes:
                logger.warning(
                    "%s: %d bytes, the manifest says %d: samples that are damaged will be replaced",
                    described.path,
                    blob.size,
                    described.bytes,
                )
            if len(self._blobs) > OPEN_FILES:
                self._blobs.popitem(last=False)[1].close()
        else:
            self._blobs.move_to_end(shard)
        return self._blobs[shard]

    def substitutes(self, position: int, *rng_key: object) -> list[int]:
        """Positions of samples that may stand in for a bad one: same presence mask, not longer where there is such a one.

        A function of the sample and ``rng_key`` only. Each comes from another shard as far as there are shards: the own
        one may be gone as a whole.
        """
        shard, row = self.locate(position)
        part = self.index[shard]
        key, presence, tokens = part.keys_N[row], part.presence_N[row], part.facts.tokens_N[row]
        found = []
        for attempt in range(TRIES):
            other = (shard + attempt) % len(self.shards)
            mates = self.index[other].presence_N == presence
            if other == shard:
                mates[row] = False
            shorter = mates & (self.index[other].facts.tokens_N <= tokens)
            rows = np.flatnonzero(shorter if shorter.any() else mates)
            if len(rows):
                draw = int(philox("substitute", *rng_key, key.decode(), attempt).integers(len(rows)))
                found.append(int(self.starts[other]) + int(rows[draw]))
        return found

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


def _default_store(path: str | Path, config: DataConfig) -> Store:
    return open_store(path, config.cache, int(config.cache_gb * 1e9))


def load_manifest(path: str | Path, config: DataConfig) -> Manifest:
    """The manifest of a dataset, wherever it is. Raises ValueError where there is none."""
    return Manifest.load(_default_store(path, config).folder())


def load_tokenizer_bytes(path: str | Path, config: DataConfig, manifest: Manifest) -> bytes | None:
    """The tokenizer file that a manifest names; None = it names none.

    Raises:
        ValueError: it is gone, or another one than the manifest names.
    """
    if manifest.tokenizer is None:
        return None
    name, expected = manifest.tokenizer.file, manifest.tokenizer.sha256
    try:
        blob = _default_store(path, config).open(name, None, expected)
        try:
            data = blob.read(0, blob.size)
        finally:
            blob.close()
    except OSError as error:
        raise ValueError(f"{path}: tokenizer {name}: {error}; rebuild the dataset") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"{path}: tokenizer {name} is not the one that the manifest names; rebuild the dataset")
    return data


def open_split(
    path: str | Path, split: str, modalities: Mapping[str, Modality[Any, Any]], config: DataConfig
) -> GoldDataset:
    """A split, read as the recipe says. Raises ValueError as `GoldDataset` does."""
    return GoldDataset(path, split, modalities, config.crc, _default_store(path, config))
