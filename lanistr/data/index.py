"""The index of a split, shard by shard: what the plan and the reader must know of a sample without opening a tar."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lanistr.data.plan import Facts
from lanistr.data.remote import Store
from lanistr.manifest import Manifest, Shard, item_members
from lanistr.modalities.base import Modality

MAX_ROWS = 1 << 19  # index rows in memory, about 150 bytes each; a window of the plan is half of it
LONGEST = 1 << 14  # lengths above count as this when samples are grouped by length


@dataclass(frozen=True)
class ShardIndex:
    """Index rows of one shard, for the modalities in use.

    Attributes:
        keys_N: as bytes.
        presence_N: bitmasks of the modalities in use.
        label_N: -1 = unlabelled.
        target_NL: float32, NaN = unknown; no columns where the target is a class.
        facts: for the plan; the stratum is the presence mask.
        places_NM3: offset, size and crc32 of each of `SplitIndex.members`; offset -1 = absent.
    """

    keys_N: np.ndarray
    presence_N: np.ndarray
    label_N: np.ndarray
    target_NL: np.ndarray
    facts: Facts
    places_NM3: np.ndarray


class SplitIndex:
    """Loads the index of a shard when it is asked for, and keeps the ones used last.

    Args:
        store: of the dataset.
        manifest: names shards and schema.
        shards: of the split.
        modalities: in use.
    """

    def __init__(
        self, store: Store, manifest: Manifest, shards: list[Shard], modalities: Mapping[str, Modality[Any, Any]]
    ):
        self.store, self.shards, self.modalities = store, shards, modalities
        self.targets = 0 if manifest.target == "class" else len(manifest.labels)
        self.bits = {name: manifest.bit(name) for name in modalities}
        self.members = [
            member for m in modalities.values() for i in range(m.items) for member in item_members(m.members, i)
        ]
        # Modality by modality in the order of how long they can get; those of one length do not tell samples apart.
        longest = {name: int(m.tokens(np.array([LONGEST]))[0]) for name, m in modalities.items()}
        varying = [name for name, m in modalities.items() if int(m.tokens(np.array([1]))[0]) != longest[name]]
        self._by_length = sorted(varying, key=lambda name: -longest[name])
        self._radix = longest
        self._loaded: OrderedDict[int, ShardIndex] = OrderedDict()
        self._rows = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": OrderedDict(), "_rows": 0}

    def __getitem__(self, shard: int) -> ShardIndex:
        """Raises ValueError where the index is missing, unreadable, or not the one that the manifest describes."""
        if shard in self._loaded:
            self._loaded.move_to_end(shard)
            return self._loaded[shard]
        loaded = self._loaded[shard] = self._load(self.shards[shard])
        self._rows += self.shards[shard].n
        while self._rows > MAX_ROWS and len(self._loaded) > 1:
            oldest, _ = self._loaded.popitem(last=False)
            self._rows -= self.shards[oldest].n
        return loaded

    def column(self, shard: int, name: str) -> np.ndarray:
        """One column of a shard's index. Raises ValueError as ``[]`` does."""
        return self._read(self.shards[shard], [name])[name].to_numpy()

    def _read(self, shard: Shard, columns: list[str]) -> pa.Table:
        try:
            blob = self.store.open(shard.index, None, shard.index_sha256)
            try:
                data = blob.read(0, blob.size)
            finally:
                blob.close()
            if hashlib.sha256(data).hexdigest() != shard.index_sha256:
                raise ValueError("its sha256 is not the manifest's")
            table = pq.read_table(pa.BufferReader(data), columns=columns)
            if table.num_rows != shard.n:
                raise ValueError(f"{table.num_rows} rows, the manifest says {shard.n}")
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise ValueError(
                f"index {shard.index} is missing, unreadable or stale: {error}; rebuild the dataset"
            ) from None
        return table

    def _load(self, shard: Shard) -> ShardIndex:
        names = [f"{field}/{m}" for m in self.members for field in ("offset", "size", "crc32")]
        columns = [
            "key",
            "presence",
            "label",
            *(["target"] if self.targets else []),
            *(f"length/{name}" for name in self.modalities),
            *names,
        ]
        table = self._read(shard, columns)
        array = {name: table[name].to_numpy() for name in columns if name not in ("key", "target")}
        presence_N = array["presence"].astype(np.int64) & sum(self.bits.values())
        places_NM3 = np.stack([array[name].astype(np.int64) for name in names], axis=1).reshape(shard.n, -1, 3)
        keys_N = np.array(table["key"].to_pylist(), dtype=np.bytes_)
        label_N = array["label"].astype(np.int64)
        target_NL = np.full((len(keys_N), self.targets), np.nan, dtype=np.float32)
        if self.targets:
            known = [(row, values) for row, values in enumerate(table["target"].to_pylist()) if values]
            target_NL[[row for row, _ in known]] = np.array([v for _, v in known], dtype=np.float32).reshape(
                len(known), -1
            )
        return ShardIndex(keys_N, presence_N, label_N, target_NL, self._facts(array, presence_N), places_NM3)

    def _facts(self, array: dict[str, np.ndarray], presence_N: np.ndarray) -> Facts:
        tokens = {}
        for name, modality in self.modalities.items():
            lengths_N = np.maximum(array[f"length/{name}"].astype(np.int64), 1)
            tokens[name] = np.where(presence_N & self.bits[name], modality.tokens(lengths_N), 0)
        lengths_N = np.zeros(len(presence_N), dtype=np.int64)
        for name in self._by_length:
            lengths_N = lengths_N * (self._radix[name] + 1) + np.minimum(tokens[name], self._radix[name])
        return Facts(presence_N, 1 + sum(tokens.values(), np.zeros_like(lengths_N)), lengths_N)
