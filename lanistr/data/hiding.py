"""A split in which modalities are hidden at random, as if they were missing."""

from collections.abc import Collection, Mapping

from lanistr.data.reader import GoldDataset
from lanistr.data.samples import Fetched
from lanistr.data.streams import philox
from lanistr.manifest import item_members


class HidingDataset(GoldDataset):
    """The same samples, some without some of their modalities.

    Whether a modality of a sample is hidden is a function of (seed, key, modality): what is hidden at a rate is hidden at
    every higher one. All of a sample may be hidden. Plans still count what the index says.

    Args:
        dataset: the split.
        rates: share of the samples whose modality is hidden, by modality; others are as they are.
        seed: of the draw.

    Raises:
        ValueError: a modality that is not in use, or a rate outside [0, 1].
    """

    def __init__(self, dataset: GoldDataset, rates: Mapping[str, float], seed: int):
        self.__dict__.update(dataset.__dict__)
        for name, rate in rates.items():
            if name not in dataset.modalities:
                raise ValueError(f"hide {name}: no such modality; there are {', '.join(dataset.modalities)}")
            if not 0 <= rate <= 1:
                raise ValueError(f"hide {name}: rate {rate}; it must be in [0, 1]")
        self.inner, self.rates, self.hide_seed = dataset, dict(rates), seed

    def only(self, names: Collection[str]) -> "HidingDataset":
        """What is hidden stays hidden."""
        rates = {name: rate for name, rate in self.rates.items() if name in names}
        return HidingDataset(self.inner.only(names), rates, self.hide_seed)

    def fetch(self, position: int) -> Fetched:
        """As `GoldDataset.fetch`, less what is hidden."""
        fetched = self.inner.fetch(position)
        members, presence = dict(fetched.members), fetched.presence
        for name, rate in self.rates.items():
            if philox("hide", self.hide_seed, fetched.key, name).random() < rate:
                presence &= ~self.index.bits[name]
                modality = self.modalities[name]
                for item in range(modality.items):
                    for member in item_members(modality.members, item):
                        members.pop(member, None)
        return fetched._replace(members=members, presence=presence)
