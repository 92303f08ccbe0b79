"""Time series: a transformer encoder (Zerveas et al. 2021) over packed steps.

Shape suffixes: T packed steps (all views), t packed steps of one view, C channels, G channel groups, D width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lanistr.batch import Layout, make_layout
from lanistr.config import ModalityConfig
from lanistr.manifest import ModalitySchema
from lanistr.modalities.base import Collated, Modality, ModalityEncoder, RawContext
from lanistr.modalities.loading import match_rows
from lanistr.ops.transformer import Block, checkpoint_blocks
from lanistr.raw import read_points
from lanistr.transforms import MEMBERS, SeriesSpec, encode_points, read_npy


class SeriesConfig(ModalityConfig):
    """Size of the encoder (defaults: Table 5) and masking.

    Attributes:
        hidden: model width; None = the number of channels, as the published code has it.
        positions: ``learnable`` from +-0.02 (paper), or ``fixed`` sinusoids of amplitude 1; Zerveas et al. have both.
            The small start hides time from short trainings (DECISIONS.md).
        mask_ratio: share of a variable's steps masked, in geometric runs of mean length ``mask_length``.
    """

    hidden: int | None = 256
    layers: int = 3
    heads: int = 4
    intermediate: int = 3072
    max_steps: int = Field(default=48, ge=1)
    positions: Literal["learnable", "fixed"] = "learnable"
    mask_ratio: float = Field(default=0.15, gt=0, lt=1)
    mask_length: float = Field(default=3.0, ge=1)

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> "SeriesConfig":
        if self.hidden is not None and self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        return self


@dataclass(frozen=True)
class Series:
    """Standardised values (0 where nothing is known; a grid may have imputed them) and observed flags, both (steps, C)."""

    values_tC: np.ndarray
    observed_tC: np.ndarray


@dataclass(frozen=True)
class SeriesInput:
    """Packed steps.

    Attributes:
        values_TC: of all views; masked entries are 0 in the masked view.
        targets_tC: the clean values; weights_tC: weight of each entry in the loss, 0 where nothing is predicted.
    """

    values_TC: Tensor
    layout: Layout
    targets_tC: Tensor
    weights_tC: Tensor


def _runs(draws_uG: np.ndarray, first_G: np.ndarray, start: float, stop: float) -> np.ndarray:
    """(u + 1, G) states of two-state chains that begin with ``first_G``.

    An open chain closes where its draw is below ``stop``, a closed one opens where it is below ``start``. So a draw below
    both flips the state, one between them sets it, one above both keeps it: the state is what it was set to last, flipped
    as often as there were flips since.
    """
    low, high = min(start, stop), max(start, stop)
    flips_uG = np.concatenate([np.zeros((1, len(first_G)), dtype=np.int64), np.cumsum(draws_uG < low, axis=0)])
    is_set_uG = (draws_uG >= low) & (draws_uG < high)
    places = np.arange(1, len(draws_uG) + 1)[:, None]
    last_uG = np.concatenate([np.zeros((1, len(first_G)), dtype=np.int64), np.where(is_set_uG, places, 0)])
    last_uG = np.maximum.accumulate(last_uG, axis=0)
    value_uG = np.where(last_uG > 0, start > stop, first_G)
    flipped_uG = (flips_uG - np.take_along_axis(flips_uG, last_uG, axis=0)) % 2 == 1
    return value_uG ^ flipped_uG


class SeriesModality(Modality[Series, SeriesInput]):
    """Content: `Series`."""

    kind = "timeseries"
    term = "mtm"
    Config = SeriesConfig

    def __init__(self, name: str, config: dict[str, Any], schema: ModalitySchema):
        super().__init__(name, config, schema)
        self.config = self.parse_config(SeriesConfig, config)
        self.spec = SeriesSpec.model_validate(schema.spec)
        self.mean = np.array(self.spec.mean, dtype=np.float32)
        self.std = np.array(self.spec.std, dtype=np.float32)
        self.group_of_C = np.zeros(len(self.spec.variables), dtype=np.int64)
        for group, channels in enumerate(self.spec.groups):
            self.group_of_C[channels] = group

    def encode(self, record: Mapping[str, Any], context: RawContext) -> dict[str, bytes]:
        """Points ``(time, variable, value)``, or ``{variable: values}`` of steps; an empty series is absent."""
        value = record.get(self.name)
        if value is None or (hasattr(value, "__len__") and not len(value)):
            return {}
        return encode_points(read_points(value, self.spec), self.spec)

    @classmethod
    def paper_schema(cls) -> ModalitySchema:
        """MIMIC's discretiser: 59 value channels and 17 observed flags (the paper says 48; DECISIONS.md)."""
        channels = 76
        spec = SeriesSpec(
            variables=[f"channel{i}" for i in range(channels)],
            groups=[[i] for i in range(channels)],
            mean=[0.0] * channels,
            std=[1.0] * channels,
            max_steps=48,
        )
        return ModalitySchema(kind=cls.kind, members=MEMBERS[cls.kind], spec=spec.model_dump())

    def decode(self, members: Mapping[str, bytes]) -> Series:
        """The last ``max_steps`` steps, standardised."""
        values = read_npy(members["ts.npy"])
        observed = read_npy(members["tsmask.npy"]).astype(bool)
        if values.shape != observed.shape or values.shape[1:] != self.mean.shape:
            raise ValueError(f"ts.npy {values.shape}, tsmask.npy {observed.shape}: not (T, {len(self.mean)})")
        values, observed = values[-self.config.max_steps :], observed[-self.config.max_steps :]
        known = observed if self.spec.grid is None else np.isfinite(values)
        return Series(np.where(known, (values - self.mean) / self.std, 0).astype(np.float32), observed)

    def tokens(self, lengths_N: np.ndarray) -> np.ndarray:
        """Cut to ``max_steps``."""
        return np.minimum(lengths_N, self.config.max_steps)

    def dummy(self) -> Series:
        """A single step of zeros."""
        shape = (1, len(self.mean))
        return Series(np.zeros(shape, dtype=np.float32), np.ones(shape, dtype=bool))

    def example(self) -> Series:
        """The longest series."""
        shape = (min(self.config.max_steps, self.spec.max_steps), len(self.mean))
        return Series(np.zeros(shape, dtype=np.float32), np.ones(shape, dtype=bool))

    def corrupt(self, content: Series, rng: np.random.Generator) -> np.ndarray:
        """(steps, C): per variable, runs of geometric length; a variable's channels are masked together."""
        steps = len(content.values_tC)
        groups = len(self.spec.groups)
        stop = 1 / self.config.mask_length
        start = stop * self.config.mask_ratio / (1 - self.config.mask_ratio)
        draws = rng.random((steps, groups))
        first_G = rng.random(groups) < self.config.mask_ratio
        mask_tC = _runs(draws[:-1], first_G, min(1.0, start), stop)[:, self.group_of_C]
        if not (mask_tC & content.observed_tC).any():
            observed = np.argwhere(content.observed_tC)
            if len(observed):
                step, channel = observed[rng.integers(len(observed))]
                mask_tC[step] |= self.group_of_C == self.group_of_C[channel]
        return mask_tC

    def collate(
        self, contents: Sequence[Series], masks: Sequence[np.ndarray] | None, weights: Sequence[float]
    ) -> Collated[SeriesInput]:
        """Pack the steps, clean view first."""
        lengths = np.array([len(c.values_tC) for c in contents])
        clean_tC = np.concatenate([c.values_tC for c in contents])
        if masks is None:
            nothing = torch.zeros(0, clean_tC.shape[1])
            inputs = SeriesInput(torch.from_numpy(clean_tC), make_layout(lengths), nothing, nothing)
            return Collated(inputs, lengths, 0.0)
        mask_tC = np.concatenate(masks)
        predicted_tC = mask_tC & np.concatenate([c.observed_tC for c in contents])
        step_weights = np.repeat(np.asarray(weights, dtype=np.float32), lengths)
        weights_tC = predicted_tC * step_weights[:, None]
        inputs = SeriesInput(
            values_TC=torch.from_numpy(np.concatenate([clean_tC, np.where(mask_tC, 0, clean_tC)])),
            layout=make_layout([*lengths, *lengths]),
            targets_tC=torch.from_numpy(clean_tC),
            weights_tC=torch.from_numpy(weights_tC),
        )
        return Collated(inputs, lengths, float((weights_tC > 0).sum()))

    def adapt(
        self, stored: dict[str, Tensor], own: dict[str, Tensor], schema: ModalitySchema
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Channels are matched by name; what is new keeps its fresh start."""
        old = SeriesSpec.model_validate(schema.spec).variables
        if old == self.spec.variables:
            return stored, []
        weight = match_rows(own["input.weight"], stored["input.weight"], 1, self.spec.variables, old)
        new, gone = set(self.spec.variables) - set(old), set(old) - set(self.spec.variables)
        names = ", ".join(sorted(new | gone)[:8])
        found = len(self.spec.variables) - len(new)
        note = f"{self.name}: {found} channels by name, {len(new)} new, {len(gone)} gone ({names})"
        return {**stored, "input.weight": weight}, [note]

    def build(self, width: int, attention: str) -> "SeriesEncoder":
        """The encoder, its projection and its linear output layer."""
        return SeriesEncoder(self.config, len(self.mean), width, attention)


def sinusoids(steps: int, width: int) -> Tensor:
    """(steps, width) float32 position table of Vaswani et al. (2017), section 3.5: sines, then cosines."""
    frequency_F = torch.exp(torch.arange((width + 1) // 2) * (-2 * math.log(1e4) / width))
    angle_SF = torch.arange(steps)[:, None] * frequency_F
    return torch.cat([angle_SF.sin(), angle_SF.cos()], dim=1)[:, :width]


class SeriesTransformer(nn.Module):
    """Input projection, positions, post-norm transformer layers."""

    def __init__(self, config: SeriesConfig, channels: int, backend: str):
        super().__init__()
        hidden = config.hidden or channels
        self.input = nn.Linear(channels, hidden)
        if config.positions == "fixed":
            self.register_buffer("positions", sinusoids(config.max_steps, hidden), persistent=False)
        else:
            self.positions = nn.Parameter(torch.empty(config.max_steps, hidden).uniform_(-0.02, 0.02))
        self.blocks = nn.ModuleList(
            Block(hidden, config.heads, config.intermediate, 1e-5, backend, pre_norm=False, init_std=None)
            for _ in range(config.layers)
        )

    def forward(self, values_TC: Tensor, layout: Layout) -> Tensor:
        """(T, hidden)."""
        x_TD = self.input(values_TC.to(self.input.weight.dtype))
        # The fixed table stays float32 under DeepSpeed, which casts parameters only.
        x_TD = x_TD + self.positions.index_select(0, layout.positions_T).to(x_TD.dtype)
        for block in self.blocks:
            x_TD = block(x_TD, layout)
        return x_TD


class SeriesEncoder(ModalityEncoder[SeriesInput]):
    """Time-series transformer; the reconstruction is a linear layer (the paper: this encoder has no decoder)."""

    def __init__(self, config: SeriesConfig, channels: int, width: int, backend: str):
        super().__init__()
        hidden = config.hidden or channels
        self.encoder = SeriesTransformer(config, channels, backend)
        self.projection = nn.Linear(hidden, width)
        self.head = nn.Linear(hidden, channels)

    def encode(self, inputs: SeriesInput) -> Tensor:
        """(T, hidden): one token per step."""
        return self.encoder(inputs.values_TC, inputs.layout)

    def blocks(self) -> Iterable[nn.Module]:
        """The transformer's layers."""
        return self.encoder.blocks

    def checkpoint_activations(self) -> None:
        """See `Block.checkpoint`."""
        checkpoint_blocks(self.encoder.blocks)

    def reconstruct(self, hidden: Tensor, inputs: SeriesInput) -> Tensor:
        """Squared error summed over masked observed values (Zerveas et al. eq. 6)."""
        steps = len(inputs.targets_tC)
        error_tC = self.head(hidden[steps:]).float() - inputs.targets_tC
        return (error_tC.square() * inputs.weights_tC).sum()
