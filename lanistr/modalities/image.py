"""Images: ViT over dense patches of the present rows, masked image modelling on masked patches only.

Shape suffixes: N rows of all views, n rows of one view, H height, W width, C colours, P patches, X pixels of a patch
(3 * patch * patch), M masked patches, D model width.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from lanistr.config import ModalityConfig
from lanistr.manifest import ModalitySchema
from lanistr.modalities.base import (
    NO_ROWS,
    NO_WEIGHTS,
    Collated,
    Modality,
    ModalityEncoder,
    RawContext,
    stack,
)
from lanistr.modalities.loading import load_pretrained, published_sizes
from lanistr.modalities.pixels import aligned_rows, centre, decode_into, decode_jpeg, fits_exactly, random_box
from lanistr.raw import read_image_file
from lanistr.transforms import MEMBERS, ImageSpec, encode_image


class ImageConfig(ModalityConfig):
    """Size of the ViT (defaults: ViT-B/16 at 224 px) and masking.

    Attributes:
        pretrained: hub name or path of ViT weights; the sizes then come from there.
        mask_ratio: share of patches masked (SimMIM).
        pooler: the ViT's unused pooler, carried frozen by the ``official`` preset only.
        crop: in training, a random crop of this share of the area and an aspect ratio of 3/4 to 4/3, for example
            [0.6, 1.0] (Szegedy et al. 2015); None = the centre, always.
        flip: in training, chance of a horizontal flip. Off by default: text about "left" does not survive it.
        norm_eps, activation: of the ViT's architecture (an export of a run with ``pretrained`` writes them).
    """

    pretrained: str | None = None
    size: int = 224
    patch: int = 16
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    mask_ratio: float = Field(default=0.5, gt=0, lt=1)
    pooler: bool = False
    crop: tuple[float, float] | None = None
    flip: float = Field(default=0.0, ge=0, le=1)
    norm_eps: float = 1e-12
    activation: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"] = "gelu"

    @model_validator(mode="after")
    def _patches_fill_image(self) -> "ImageConfig":
        if self.crop and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop {self.crop}: write [smallest, largest] share of the area, above 0, at most 1")
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is not a multiple of patch {self.patch}")
        return self


@dataclass(frozen=True)
class ImageInput:
    """Pixels of the present images, once; the views differ by their mask.

    Attributes:
        pixels_nHWC: uint8; the model cuts them into patches, on its device.
        mask_NP1: float32, 1 = replaced by the mask token; rows of view 0 (all zero), then of view 1. None = one view.
        masked_M: masked patches as rows of the flattened (n * P) grid; weights_M the weight of their sample.
    """

    pixels_nHWC: Tensor
    mask_NP1: Tensor | None
    masked_M: Tensor
    weights_M: Tensor


class ImageModality(Modality[np.ndarray, ImageInput]):
    """Content: (H, W, C) uint8 pixels."""

    kind = "image"
    term = "mim"
    Config = ImageConfig
    heavy = True

    def __init__(self, name: str, config: dict[str, Any], schema: ModalitySchema):
        super().__init__(name, config, schema)
        self.config = self.parse_config(ImageConfig, config)
        self.spec = ImageSpec.model_validate(schema.spec)
        self.augments = self.config.crop is not None or self.config.flip > 0

    def encode(self, record: Mapping[str, Any], context: RawContext) -> dict[str, bytes]:
        """A path or the bytes of a file, or several where the schema has several; an empty path is absent."""

        def encode(source: str | Path | bytes) -> dict[str, bytes]:
            data = source if isinstance(source, bytes) else read_image_file(context.folder, source)
            return encode_image(data, self.spec) if data else {}

        return self.encode_items(record.get(self.name), (str, Path, bytes), encode)

    def portable(self) -> dict[str, Any]:
        """With the published sizes in the place of published weights."""
        if not self.config.pretrained:
            return self.block
        from transformers import ViTConfig

        sizes = {
            "hidden": "hidden_size",
            "layers": "num_hidden_layers",
            "heads": "num_attention_heads",
            "intermediate": "intermediate_size",
            "norm_eps": "layer_norm_eps",
            "activation": "hidden_act",
        }
        found = published_sizes(ViTConfig, self.config.pretrained, "image.pretrained", sizes)
        return {**self.block, "pretrained": None, **found}

    @classmethod
    def paper_schema(cls) -> ModalitySchema:
        """224 px JPEGs."""
        return ModalitySchema(kind=cls.kind, members=MEMBERS[cls.kind], spec=ImageSpec(size=224).model_dump())

    def decode(self, members: Mapping[str, bytes]) -> np.ndarray:
        """Centre crop, resize to ``size``."""
        size = self.config.size
        pixels = decode_jpeg(members["jpg"], size)
        if pixels.shape[:2] != (size, size):
            image = Image.fromarray(pixels)
            pixels = np.asarray(image.crop(centre(image)).resize((size, size), Image.Resampling.BILINEAR))
        return pixels

    def decode_augmented(self, members: Mapping[str, bytes], rng: np.random.Generator) -> np.ndarray:
        """Random resized crop and flip, where the recipe asks for them."""
        size = self.config.size
        area, log_ratio, x, y, flip = rng.random(5)
        # A crop of share a of the area needs 1 / sqrt(a) of the resolution.
        smallest = self.config.crop[0] if self.config.crop else 1.0
        image = Image.fromarray(decode_jpeg(members["jpg"], int(np.ceil(size / np.sqrt(smallest)))))
        box: tuple[float, float, float, float] = centre(image)
        if self.config.crop:
            box = random_box(image.size, self.config.crop, area, log_ratio, x, y)
        pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
        return pixels[:, ::-1] if flip < self.config.flip else pixels

    def decode_batch(
        self, members: Sequence[Mapping[str, bytes]], rngs: Iterable[np.random.Generator] | None = None
    ) -> list[np.ndarray | ValueError]:
        """As `Modality.decode_batch`, into the rows of one array: `collate` need not copy them together."""
        size = self.config.size
        # All headers first: between two decodings, each would be read with caches full of pixels, thrice as slowly.
        fit = [rngs is None and fits_exactly(own["jpg"], size) for own in members]
        found: list[np.ndarray | ValueError] = []
        rows_nHWC, strict = aligned_rows(len(members), size), rngs is not None
        for row_HWC, own, fits, rng in zip(rows_nHWC, members, fit, rngs or itertools.repeat(None), strict=strict):
            try:
                if not (fits and decode_into(own["jpg"], row_HWC)):
                    row_HWC[:] = self.decode(own) if rng is None else self.decode_augmented(own, rng)
                found.append(row_HWC)
            except ValueError as error:
                found.append(error)
        return found

    def tokens(self, lengths_N: np.ndarray) -> np.ndarray:
        """[CLS] and the patches."""
        return np.full_like(lengths_N, (self.config.size // self.config.patch) ** 2 + 1)

    def dummy(self) -> np.ndarray:
        """A single grey patch."""
        return np.full((self.config.patch, self.config.patch, 3), 128, dtype=np.uint8)

    def example(self) -> np.ndarray:
        """A grey image."""
        return np.full((self.config.size, self.config.size, 3), 128, dtype=np.uint8)

    def corrupt(self, content: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Exactly ``mask_ratio`` of the patches, at least one."""
        patches = self._count(content)
        chosen = rng.permutation(patches)[: max(1, round(patches * self.config.mask_ratio))]
        mask = np.zeros(patches, dtype=bool)
        mask[chosen] = True
        return mask

    def collate(
        self, contents: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None, weights: Sequence[float]
    ) -> Collated[ImageInput]:
        """Stack the images."""
        pixels_nHWC = stack(contents)
        patches = self._count(contents[0])
        tokens = np.full(len(contents), patches + 1)
        if masks is None:
            return Collated(ImageInput(torch.from_numpy(pixels_nHWC), None, NO_ROWS, NO_WEIGHTS), tokens, 0.0)
        mask_nP = np.stack(masks)
        masked_M = np.flatnonzero(mask_nP)
        weights_M = np.asarray(weights, dtype=np.float32)[masked_M // patches]
        both_NP = np.concatenate([np.zeros_like(mask_nP), mask_nP]).astype(np.float32)
        inputs = ImageInput(
            torch.from_numpy(pixels_nHWC),
            torch.from_numpy(both_NP[..., None]),
            torch.from_numpy(masked_M),
            torch.from_numpy(weights_M),
        )
        return Collated(inputs, tokens, float((weights_M > 0).sum()))

    def _count(self, pixels: np.ndarray) -> int:
        """Patches of an image."""
        return pixels.shape[0] * pixels.shape[1] // self.config.patch**2

    def build(self, width: int, attention: str) -> "ImageEncoder":
        """ViT (dense SDPA: all images have one length), its projection and its pixel decoder."""
        return ImageEncoder(self.config, width)


class MIMHead(nn.Module):
    """SimMIM: a learnt mask token and a linear decoder to pixels."""

    def __init__(self, hidden: int, pixels: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(hidden))
        self.decoder = nn.Linear(hidden, pixels)
        nn.init.normal_(self.mask_token, std=0.02)


class ImageEncoder(ModalityEncoder[ImageInput]):
    """ViT from transformers."""

    def __init__(self, config: ImageConfig, width: int):
        super().__init__()
        self.pretrained, self.patch = config.pretrained is not None, config.patch
        self.encoder = _make_vit(config)
        hidden = self.encoder.config.hidden_size
        self.projection = nn.Linear(hidden, width)
        self.head = MIMHead(hidden, 3 * config.patch**2)

    def encode(self, inputs: ImageInput) -> Tensor:
        """(N * (P + 1), hidden): [CLS] and patches of each image."""
        embeddings = self.encoder.embeddings
        convolution = embeddings.patch_embeddings.projection
        pixels_nPX = _normalise(cut(inputs.pixels_nHWC, self.patch), convolution.weight.dtype)
        # A convolution with stride = kernel is a matrix product over patches.
        x_NPD = nn.functional.linear(pixels_nPX, convolution.weight.flatten(1), convolution.bias)
        if inputs.mask_NP1 is not None:
            mask_NP1 = inputs.mask_NP1.to(x_NPD.dtype)
            x_NPD = torch.cat([x_NPD, x_NPD])
            x_NPD = x_NPD * (1 - mask_NP1) + self.head.mask_token * mask_NP1
        cls_N1D = embeddings.cls_token.expand(x_NPD.shape[0], 1, -1)
        x_NPD = torch.cat([cls_N1D, x_NPD], dim=1)
        x_NPD = x_NPD + embeddings.position_embeddings[:, : x_NPD.shape[1]]
        for layer in self.encoder.layers:
            x_NPD = layer(x_NPD)
        return self.encoder.layernorm(x_NPD).flatten(0, 1)

    def blocks(self) -> Iterable[nn.Module]:
        """ViT's layers."""
        return self.encoder.layers

    def checkpoint_activations(self) -> None:
        """Hugging Face's own checkpointing."""
        self.encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def reconstruct(self, hidden: Tensor, inputs: ImageInput) -> Tensor:
        """L1 of masked patches, mean over a patch's pixels, summed over patches (SimMIM; paper section 3.1)."""
        patches_nPX = cut(inputs.pixels_nHWC, self.patch)
        rows, patches, _ = patches_nPX.shape
        hidden_MD = hidden.view(2, rows, patches + 1, -1)[1, :, 1:].flatten(0, 1)
        hidden_MD = hidden_MD.index_select(0, inputs.masked_M)
        target_MX = patches_nPX.flatten(0, 1).index_select(0, inputs.masked_M)
        error_MX = self.head.decoder(hidden_MD).float() - _normalise(target_MX, torch.float32)
        return (error_MX.abs().mean(1) * inputs.weights_M).sum()


def cut(pixels_nHWC: Tensor, patch: int) -> Tensor:
    """Images -> patches (n, P, X), row by row; a patch's pixels in the order of a convolution's kernel (C, H, W)."""
    rows, height, width, colours = pixels_nHWC.shape
    grid = pixels_nHWC.view(rows, height // patch, patch, width // patch, patch, colours)
    return grid.permute(0, 1, 3, 5, 2, 4).reshape(rows, -1, colours * patch * patch)


def _normalise(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 -> [-1, 1], as google/vit-base-patch16-224 expects."""
    return pixels.to(dtype) / 127.5 - 1


def _make_vit(config: ImageConfig) -> Any:
    from transformers import ViTConfig, ViTModel

    no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if config.pretrained:
        vit = load_pretrained(
            ViTModel, config.pretrained, "image.pretrained", add_pooling_layer=config.pooler, **no_dropout
        )
        if (vit.config.image_size, vit.config.patch_size) != (config.size, config.patch):
            raise ValueError(
                f"image.pretrained {config.pretrained!r} has size {vit.config.image_size}, patch {vit.config.patch_size}; "
                f"the recipe says size {config.size}, patch {config.patch}"
            )
    else:
        vit_config = ViTConfig(
            image_size=config.size,
            patch_size=config.patch,
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate,
            layer_norm_eps=config.norm_eps,
            hidden_act=config.activation,
            **no_dropout,
        )
        vit_config._attn_implementation = "sdpa"
        vit = ViTModel(vit_config, add_pooling_layer=config.pooler)
    if vit.pooler is not None:
        vit.pooler.requires_grad_(False)
    return vit
