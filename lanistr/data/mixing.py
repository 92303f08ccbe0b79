"""Several datasets as one source for the plan, each seen as often per epoch as its weight says."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lanistr.data.plan import Facts
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import Fetched
from lanistr.manifest import Manifest
from lanistr.modalities.base import Modality


class MixedDataset:
    """Splits of the same schema, one after the other.

    Args:
        datasets: at least one; the first one's manifest speaks for all.
        weights: how often per epoch each sample of a dataset is seen: 1 = once, 0.1 = a random tenth, 2.5 = twice, and a
            random half a third time. Every time draws new masks.

    Raises:
        ValueError: datasets whose modalities, statistics, tokenizer or labels differ; a weight that is not positive.
    """

    def __init__(self, datasets: Sequence[GoldDataset], weights: Sequence[float]):
        self.datasets, self.weights = list(datasets), list(weights)
        for dataset, weight in zip(self.datasets, self.weights, strict=True):
            if not weight > 0:
                raise ValueError(f"{dataset.path}: weight {weight}; weights are above 0")
            _check_same_schema(self.datasets[0], dataset)
        self.shard_sizes = np.concatenate([dataset.shard_sizes for dataset in self.datasets])
        shards = [len(dataset.shards) for dataset in self.datasets]
        self.repeats = np.repeat(np.array(self.weights, dtype=float), shards)
        self._first_shard = np.concatenate([[0], np.cumsum(shards)])
        self._first = np.concatenate([[0], np.cumsum([dataset.n for dataset in self.datasets])])
        self.n = int(self._first[-1])

    @property
    def content_id(self) -> str:
        """Identity of the data and the weights."""
        parts = [f"{d.content_id}:{weight!r}" for d, weight in zip(self.datasets, self.weights, strict=True)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    @property
    def manifest(self) -> Manifest:
        """Of the first dataset."""
        return self.datasets[0].manifest

    @property
    def modalities(self) -> Mapping[str, Modality[Any, Any]]:
        """In use."""
        return self.datasets[0].modalities

    def facts(self, shard: int) -> Facts:
        """For the plan: each dataset has strata of its own, so that every step mixes them as a whole."""
        number = int(np.searchsorted(self._first_shard, shard, "right")) - 1
        facts = self.datasets[number].facts(shard - int(self._first_shard[number]))
        above_mask = number << len(self.manifest.modalities)
        return Facts(facts.strata_N + above_mask, facts.tokens_N, facts.lengths_N)

    def _locate(self, position: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._first, position, "right")) - 1
        return number, position - int(self._first[number])

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """As `GoldDataset.fetch_ahead`."""
        numbers = np.searchsorted(self._first_shard, shards, "right") - 1
        for number, dataset in enumerate(self.datasets):
            own = [shard for shard, of in zip(shards, numbers, strict=True) if of == number]
            dataset.fetch_ahead([shard - int(self._first_shard[number]) for shard in own])

    def fetch(self, position: int) -> Fetched:
        """As `GoldDataset.fetch`."""
        number, own = self._locate(position)
        return self.datasets[number].fetch(own)

    def substitutes(self, position: int, *rng_key: object) -> list[int]:
        """As `GoldDataset.substitutes`, from the same dataset."""
        number, own = self._locate(position)
        return [int(self._first[number]) + mate for mate in self.datasets[number].substitutes(own, *rng_key)]


def _check_same_schema(first: GoldDataset, other: GoldDataset) -> None:
    for what in ("modalities", "tokenizer", "labels"):
        if getattr(first.manifest, what) != getattr(other.manifest, what):
            raise ValueError(
                f"{first.path} and {other.path} cannot be mixed: their {what} differ; "
                f"build the second with `fit_from` of the first"
            )
