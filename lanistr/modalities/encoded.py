"""A modality whose encoder has already run: hidden states stand in the place of its contents.

Shape suffixes: R packed rows, H hidden width of the encoder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lanistr.manifest import ModalitySchema
from lanistr.modalities.base import Collated, Modality, ModalityEncoder

DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}  # NumPy has no bfloat16: its bits


@dataclass(frozen=True)
class Encoded:
    """Hidden states that enter fusion, one sample after the other, as `ModalityEncoder.entering` gives them, of all views."""

    rows_RH: Tensor


class EncodedModality(Modality[np.ndarray, Encoded]):
    """Content: (rows, H) of a sample, all its texts or images together.

    Args:
        inner: the modality whose encoder has run.
        hidden: H.
        dtype: of what is stored, a key of `DTYPES`.
        views: how many augmented views of a train sample there are; training draws one of them.
    """

    kind = "encoded"
    term = "encoded"

    def __init__(self, inner: Modality[Any, Any], hidden: int, dtype: str, views: int):
        self.name, self.block = inner.name, inner.block
        self.inner, self.hidden, self.dtype, self.views = inner, hidden, dtype, views
        self.members, self.items = (f"encoded/{inner.name}",), 1
        self.absent_token = inner.absent_token
        self.augments = views > 1

    @classmethod
    def paper_schema(cls) -> ModalitySchema:
        """There is none."""
        raise NotImplementedError

    def view(self, number: int) -> str:
        """Name of the member that holds a view."""
        return f"{self.members[0]}.{number}" if number else self.members[0]

    def decode(self, members: Mapping[str, bytes]) -> np.ndarray:
        """The first view."""
        return self._rows(members[self.view(0)])

    def decode_augmented(self, members: Mapping[str, bytes], rng: np.random.Generator) -> np.ndarray:
        """One of the views."""
        return self._rows(members[self.view(int(rng.integers(self.views)))])

    def _rows(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, DTYPES[self.dtype]).reshape(-1, self.hidden)

    def tokens(self, lengths_N: np.ndarray) -> np.ndarray:
        """As many as before."""
        return self.inner.tokens(lengths_N)

    def dummy(self) -> np.ndarray:
        """One row of zeros."""
        return np.zeros((1, self.hidden), DTYPES[self.dtype])

    def example(self) -> np.ndarray:
        """As the dummy: sizes are counted on the inner modality."""
        return self.dummy()

    def corrupt(self, content: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """There is nothing left to corrupt: both views of pretraining are the same."""
        return np.zeros(0, dtype=bool)

    def collate(
        self, contents: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None, weights: Sequence[float]
    ) -> Collated[Encoded]:
        """One after the other."""
        rows_RH = torch.from_numpy(np.concatenate(contents if masks is None else [*contents, *contents]))
        if self.dtype == "bfloat16":
            rows_RH = rows_RH.view(torch.bfloat16)
        return Collated(Encoded(rows_RH), np.array([len(content) for content in contents]), 0.0)

    def build(self, width: int, attention: str) -> ModalityEncoder[Encoded]:
        """The model is built from the inner modality."""
        raise NotImplementedError
