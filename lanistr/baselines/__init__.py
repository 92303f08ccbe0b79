"""Baselines, and LANISTR's own arms beside them, through one interface.

A `Method` sees what every other one sees: the same gold dataset, the same labelled train samples, the same validation
samples for everything that has to be chosen. It never sees the test split before it has answered.

Shape suffixes: N samples, C classes.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from lanistr.data.reader import GoldDataset


@dataclass(frozen=True, eq=False)
class Subset:
    """Labelled samples of one split, by their positions in it."""

    dataset: GoldDataset
    positions_N: np.ndarray

    @property
    def labels_N(self) -> np.ndarray:
        """Class ids, int64."""
        return self.dataset.label[self.positions_N]

    @property
    def classes(self) -> int:
        """Of the dataset: a draw of few labels may lack some."""
        return len(self.dataset.manifest.labels)

    def only(self, names: Collection[str]) -> "Subset":
        """The same samples without the other modalities."""
        if set(self.dataset.modalities) <= set(names):
            return self
        return Subset(self.dataset.only(names), self.positions_N)

    def __len__(self) -> int:
        return len(self.positions_N)


Predict = Callable[[Subset], np.ndarray]


class Method(Protocol):
    """One way to answer."""

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        """Learn.

        Args:
            train: labelled samples; methods that can use unlabelled ones find them in ``train.dataset``.
            val: for early stopping and every choice.
            seed: of whatever is random. ``train`` is the draw `GoldDataset.labelled` made with it.

        Returns:
            A function that gives (N, C) probabilities for the samples of a subset, in their order.

        Raises:
            ValueError: the dataset lacks what the method needs.
        """
        ...


@runtime_checkable
class Pretrains(Protocol):
    """A method that learns from unlabelled samples first: once, for all draws of labels."""

    def pretrain(self, seed: int) -> None:
        """Do what ``fit`` with this seed starts from; nothing where it is done. Not counted as time of fitting."""
        ...
