"""Read members of a gold dataset by their place in the index."""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lanistr.transforms import read_npy


class Members:
    """Members of the shards of one dataset; each tar is mapped once and closed at the end of a ``with`` block."""

    def __init__(self, gold: Path):
        self.gold = gold
        self._maps: dict[str, mmap.mmap] = {}

    def __enter__(self) -> "Members":
        return self

    def __exit__(self, *_: object) -> None:
        for tar in self._maps.values():
            tar.close()
        self._maps.clear()

    def read(self, row: Mapping[str, Any], member: str) -> bytes:
        """The bytes of a member of an index row (of `etl.summary.read_indices`).

        Raises:
            ValueError: the tar is missing, or shorter than the index says.
        """
        start, size = row[f"offset/{member}"], row[f"size/{member}"]
        tar = self._tar(row["shard"])
        if start < 0 or start + size > len(tar):
            raise ValueError(f"{self.gold / row['shard']}: no member {row['key']}.{member} where the index says")
        return tar[start : start + size]

    def array(self, row: Mapping[str, Any], member: str) -> np.ndarray:
        """A ``.npy`` member."""
        return read_npy(self.read(row, member))

    def _tar(self, shard: str) -> mmap.mmap:
        if shard not in self._maps:
            path = self.gold / shard
            if not path.is_file():
                raise ValueError(f"{path}: missing, but the manifest names it")
            with open(path, "rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]
