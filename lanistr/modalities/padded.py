"""Modalities over dense, padded tensors and a mask: for graphs that cannot pack (ONNX). The parameters are the encoders' own.

A sample that lacks a modality has a mask that is False everywhere; whatever stands in its tensors is ignored.

Shape suffixes: B samples, L padded length, D width, H height, W width of an image, R numeric and C categorical columns (or
channels of a series).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lanistr.modalities.base import Modality
from lanistr.modalities.image import ImageInput
from lanistr.modalities.tabular import Row, TabularInput
from lanistr.modalities.text import TextModality
from lanistr.modalities.timeseries import Series
from lanistr.ops.transformer import dense_block

Arrays = dict[str, np.ndarray]


class PaddedModality(nn.Module, ABC):
    """One modality of a model.

    Args:
        modality: loader side.
        encoder: its encoder, in eval mode.

    Attributes:
        tensors: suffixes of the inputs' names, in the order of `forward`; the last one is the mask.
        padded: whether the second axis of every input is a padded length.
    """

    tensors: ClassVar[tuple[str, ...]]
    padded: ClassVar[bool] = False

    def __init__(self, modality: Modality[Any, Any], encoder: Any):
        super().__init__()
        self.modality, self.encoder = modality, encoder

    @property
    def names(self) -> list[str]:
        """Of the inputs."""
        return [f"{self.modality.name}_{suffix}" for suffix in self.tensors]

    @property
    def longest(self) -> int:
        """Padded length that the model takes at most; contents are cut to it when they are decoded."""
        return len(self.modality.example())

    def pad(self, contents: Sequence[Any]) -> Arrays:
        """Inputs by name of decoded contents, None = absent."""
        arrays = self.stack([self.modality.dummy() if content is None else content for content in contents])
        arrays[-1][[content is None for content in contents]] = False
        return dict(zip(self.names, arrays, strict=True))

    @abstractmethod
    def stack(self, contents: Sequence[Any]) -> list[np.ndarray]:
        """The inputs of contents that are all there."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Any:
        """A random content, of any length."""

    @abstractmethod
    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the fusion width (B, L, D), and which of them are real (B, L)."""


class PaddedText(PaddedModality):
    """``ids`` (B, L) int64, ``mask`` (B, L) bool."""

    tensors = ("ids", "mask")
    padded = True

    def __init__(self, modality: Modality[Any, Any], encoder: Any):
        super().__init__(modality, encoder)
        self.bert = dense_bert(encoder.encoder)
        assert isinstance(modality, TextModality)
        self.entering = modality.config.fusion_tokens

    def stack(self, contents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Padded with 0."""
        return [*pad_rows(contents)]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Token ids."""
        return rng.integers(self.bert.config.vocab_size, size=rng.integers(1, self.longest + 1))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """BERT with a key mask."""
        ids_BL, mask_BL = tensors
        positions_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        x_BLD = self.bert.embeddings(input_ids=ids_BL, position_ids=positions_L[None])
        keep_BL = mask_BL | (positions_L == 0)  # an absent text attends to its first slot: no softmax over nothing
        for layer in self.bert.encoder.layer:
            x_BLD = layer(x_BLD, attention_mask=keep_BL[:, None, None, :])
        if self.entering == "mean":
            weights_BL1 = keep_BL[:, :, None].to(x_BLD.dtype)
            x_BLD = (x_BLD * weights_BL1).sum(1, keepdim=True) / weights_BL1.sum(1, keepdim=True)
        if self.entering != "all":
            x_BLD, mask_BL = x_BLD[:, :1], mask_BL[:, :1]
        return self.encoder.projection(x_BLD), mask_BL


class PaddedImage(PaddedModality):
    """``pixels`` (B, H, W, 3) uint8, ``mask`` (B,) bool."""

    tensors = ("pixels", "mask")

    def pad(self, contents: Sequence[Any]) -> Arrays:
        """A whole grey image in the place of an absent one: images have one size."""
        given = [self.modality.example() if content is None else content for content in contents]
        mask_B = np.array([content is not None for content in contents])
        return dict(zip(self.names, [np.stack(given), mask_B], strict=True))

    def stack(self, contents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """All are there."""
        return [np.stack(contents), np.ones(len(contents), dtype=bool)]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Noise."""
        return rng.integers(0, 256, self.modality.example().shape, dtype=np.uint8)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """ViT is dense as it is."""
        pixels_BHWC, mask_B = tensors
        nothing = torch.zeros(0)
        hidden = self.encoder.encode(ImageInput(pixels_BHWC, None, nothing, nothing))
        tokens_BLD = self.encoder.projection(hidden.unflatten(0, (pixels_BHWC.shape[0], -1)))
        return tokens_BLD, mask_B[:, None].expand(-1, tokens_BLD.shape[1])


class PaddedTabular(PaddedModality):
    """``numeric`` (B, R) float32, scaled; ``categories`` (B, C) int64; ``mask`` (B,) bool."""

    tensors = ("numeric", "categories", "mask")

    def stack(self, contents: Sequence[Any]) -> list[np.ndarray]:
        """Rows."""
        numeric_BR = np.stack([row.numeric_R for row in contents])
        categories_BC = np.stack([row.categories_C for row in contents])
        return [numeric_BR, categories_BC, np.ones(len(contents), dtype=bool)]

    def draw(self, rng: np.random.Generator) -> Row:
        """Normal numbers, any category."""
        dummy: Row = self.modality.dummy()
        numbers_R = rng.normal(size=len(dummy.numeric_R)).astype(np.float32)
        categories_C = rng.integers(0, np.array(self.encoder.cardinality, dtype=np.int64))
        return dummy._replace(numeric_R=numbers_R, categories_C=categories_C)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """TabNet is dense as it is; the norms use their running statistics."""
        numeric_BR, categories_BC, mask_B = tensors
        inputs = TabularInput(numeric_BR, categories_BC, None, torch.zeros(0), batch_statistics=False)
        hidden = self.encoder.encode(inputs)
        tokens_BLD = self.encoder.project(hidden, inputs).unflatten(0, (-1, self.encoder.tokens))
        return tokens_BLD, mask_B[:, None].expand(-1, self.encoder.tokens)


class PaddedSeries(PaddedModality):
    """``values`` (B, L, C) float32, standardised, 0 where nothing is known; ``mask`` (B, L) bool."""

    tensors = ("values", "mask")
    padded = True

    @property
    def longest(self) -> int:
        """Steps."""
        return len(self.modality.example().values_tC)

    def stack(self, contents: Sequence[Any]) -> list[np.ndarray]:
        """Padded with 0."""
        return [*pad_rows([series.values_tC for series in contents])]

    def draw(self, rng: np.random.Generator) -> Series:
        """Normal numbers."""
        shape = rng.integers(1, self.longest + 1), self.encoder.encoder.input.in_features
        return Series(rng.normal(size=shape).astype(np.float32), np.ones(shape, dtype=bool))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The transformer with a key mask."""
        values_BLC, mask_BL = tensors
        series, steps = self.encoder.encoder, values_BLC.shape[1]
        x_BLD = series.input(values_BLC) + series.positions[:steps]
        keep_BL = mask_BL | (torch.arange(steps, device=mask_BL.device) == 0)
        for block in series.blocks:
            x_BLD = dense_block(block, x_BLD, keep_BL)
        return self.encoder.projection(x_BLD), mask_BL


PADDED: Mapping[str, type[PaddedModality]] = {
    "text": PaddedText,
    "image": PaddedImage,
    "tabular": PaddedTabular,
    "timeseries": PaddedSeries,
}


def make_padded(modality: Modality[Any, Any], encoder: Any) -> PaddedModality:
    """The padded form of a modality. Raises ValueError for one that has none."""
    if modality.kind not in PADDED:
        raise ValueError(f"{modality.name}: {modality.kind} has no padded form; there are {', '.join(PADDED)}")
    if modality.absent_token:
        raise ValueError(f"{modality.name}: absent_token has no padded form")
    if modality.items > 1:
        raise ValueError(f"{modality.name}: up to {modality.items} per sample; the padded form takes one")
    return PADDED[modality.kind](modality, encoder)


def pad_rows(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sequences (L_i, ...) -> (B, L, ...), zeros behind their end, and the (B, L) bool mask of what is real."""
    lengths_B = np.array([len(array) for array in arrays])
    mask_BL = np.arange(lengths_B.max()) < lengths_B[:, None]
    padded = np.zeros((*mask_BL.shape, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    padded[mask_BL] = np.concatenate(arrays)
    return padded, mask_BL


def dense_bert(packed: Any) -> Any:
    """Hugging Face's BERT with scaled dot product attention and a mask, sharing every parameter with the packed one."""
    config = type(packed.config).from_dict(packed.config.to_dict())
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        dense = type(packed)(config, add_pooling_layer=False)
    dense.load_state_dict(packed.state_dict(keep_vars=True), assign=True, strict=False)
    for name, buffer in packed.named_buffers():
        dense.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    return dense.train(packed.training)
