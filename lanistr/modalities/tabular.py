"""Tabular rows: columns, masked feature modelling (MFM), and TabNet with its projection and its decoder.

What enters fusion are TabNet's step outputs (paper) and, where the recipe says so, a token per column.

Shape suffixes: N rows of one view, R numeric columns, C categorical columns, K = R + C columns, X features after
embedding, S steps, D width.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lanistr.manifest import ModalitySchema
from lanistr.modalities.base import NO_WEIGHTS, Collated, Modality, ModalityEncoder, RawContext
from lanistr.modalities.loading import match_rows
from lanistr.modalities.scores import NormalScores
from lanistr.modalities.tabnet import MFMHead, TabNet, TabularConfig
from lanistr.raw import read_row
from lanistr.transforms import (
    MEMBERS,
    MISSING_ID,
    CategoricalColumn,
    NumericColumn,
    TabularSpec,
    concatenate_npy,
    read_npy,
)
from lanistr.transforms import TabularEncoder as RowEncoder


class Row(NamedTuple):
    """Scaled numbers (0 where missing), category ids, and which of the K cells are observed."""

    numeric_R: np.ndarray
    categories_C: np.ndarray
    observed_K: np.ndarray


@dataclass(frozen=True)
class TabularInput:
    """Present rows.

    Attributes:
        keep_NK: 0 where the masked view hides a column; None = one view.
        weights_NK: weight of each cell in the loss, 0 where nothing is predicted.
        batch_statistics: whether these rows may be normalised by their own statistics.
    """

    numeric_NR: Tensor
    categories_NC: Tensor
    keep_NK: Tensor | None
    weights_NK: Tensor
    batch_statistics: bool


class TabularModality(Modality[Row, TabularInput]):
    """Content: `Row`."""

    kind = "tabular"
    term = "mfm"
    Config = TabularConfig

    def __init__(self, name: str, config: dict[str, Any], schema: ModalitySchema):
        super().__init__(name, config, schema)
        self.config = self.parse_config(TabularConfig, config)
        self.spec = TabularSpec.model_validate(schema.spec)
        self.mean = np.array([c.mean for c in self.spec.numeric], dtype=np.float32)
        self.std = np.array([c.std for c in self.spec.numeric], dtype=np.float32)
        self.cardinality = np.array([c.cardinality for c in self.spec.categorical], dtype=np.int64)
        self.columns = len(self.mean) + len(self.cardinality)
        self.scores = self._scores() if self.config.numbers == "quantile" else None

    def _scores(self) -> list[NormalScores]:
        """Of each numeric column. Raises ValueError where the dataset has no quantiles."""
        bare = [column.name for column in self.spec.numeric if not column.quantiles]
        if bare:
            raise ValueError(
                f"model.modalities.{self.name}.numbers: quantile needs the quantiles of column {bare[0]}, which this dataset "
                "has not; build it again with --refit, or choose standard"
            )
        return [NormalScores.of(column.quantiles) for column in self.spec.numeric]

    def raw_keys(self) -> tuple[str, ...]:
        """The columns."""
        return tuple(column.name for column in [*self.spec.numeric, *self.spec.categorical])

    def encode(self, record: Mapping[str, Any], context: RawContext) -> dict[str, bytes]:
        """The columns that the record names; one that it lacks, or has as None, is a missing cell."""
        if not any(key in record for key in self.raw_keys()):
            return {}
        return self._encoder.encode(read_row(record, self.spec))

    @cached_property
    def _encoder(self) -> RowEncoder:
        return RowEncoder(self.spec)

    @classmethod
    def paper_schema(cls) -> ModalitySchema:
        """Amazon's columns: product, reviewer, verified, year, votes, timestamp."""
        spec = TabularSpec(
            numeric=[NumericColumn(name=n, mean=0.0, std=1.0, quantiles=[0, 1]) for n in ("votes", "timestamp")],
            categorical=[
                CategoricalColumn(name="product", values=[], buckets=10000),
                CategoricalColumn(name="reviewer", values=[], buckets=10000),
                CategoricalColumn(name="verified", values=["false", "true"]),
                CategoricalColumn(name="year", values=[str(y) for y in range(1999, 2019)]),
            ],
        )
        return ModalitySchema(kind=cls.kind, members=MEMBERS[cls.kind], spec=spec.model_dump())

    def decode(self, members: Mapping[str, bytes]) -> Row:
        """Scale the numbers; a missing cell is 0 (the mean) or category 0."""
        (row,) = self._rows(self._stored(members)[None])
        return row

    def decode_batch(
        self, members: Sequence[Mapping[str, bytes]], rngs: Iterable[np.random.Generator] | None = None
    ) -> list[Row | ValueError]:
        """As `Modality.decode_batch`, the arithmetic of all rows at once; one by one only where a row is bad."""
        with contextlib.suppress(ValueError):
            cells, lengths = concatenate_npy([own["tab.npy"] for own in members])
            if set(lengths) == {self.columns}:
                return [*self._rows(cells.reshape(-1, self.columns).astype(np.float32, copy=False))]
        return super().decode_batch(members, rngs)

    def _stored(self, members: Mapping[str, bytes]) -> np.ndarray:
        """(K,) float32 as written."""
        row_K = read_npy(members["tab.npy"])
        if row_K.shape != (self.columns,):
            raise ValueError(f"tab.npy: shape {row_K.shape}, the schema has {self.columns} columns")
        return row_K.astype(np.float32, copy=False)

    def _scaled(self, numbers_nR: np.ndarray) -> np.ndarray:
        """As the recipe says; NaN stays NaN."""
        if self.scores is None:
            return (numbers_nR - self.mean) / self.std
        scaled = [scores(numbers_nR[:, i]) for i, scores in enumerate(self.scores)]
        return np.stack(scaled, axis=1) if scaled else numbers_nR

    def _rows(self, rows_nK: np.ndarray) -> list[Row]:
        numeric = len(self.mean)
        observed_nK = np.isfinite(rows_nK)
        numbers_nR = np.where(observed_nK[:, :numeric], self._scaled(rows_nK[:, :numeric]), 0)
        ids_nC = np.where(observed_nK[:, numeric:], rows_nK[:, numeric:], MISSING_ID).astype(np.int64)
        bad_N = ((ids_nC < 0) | (ids_nC >= self.cardinality)).any(axis=1)
        if bad_N.any():
            ids, limits = ids_nC[bad_N.argmax()].tolist(), self.cardinality.tolist()
            raise ValueError(f"tab.npy: category ids {ids}, cardinalities {limits}")
        return list(map(Row, numbers_nR.astype(np.float32, copy=False), ids_nC, observed_nK))

    def cells(self, content: Row) -> Mapping[str, float | int]:
        """The columns; numbers scaled."""
        numbers = np.where(content.observed_K[: len(self.mean)], content.numeric_R, np.nan)
        found: dict[str, float | int] = {
            c.name: float(value) for c, value in zip(self.spec.numeric, numbers, strict=True)
        }
        ids = {c.name: int(i) for c, i in zip(self.spec.categorical, content.categories_C, strict=True)}
        return found | ids

    def tokens(self, lengths_N: np.ndarray) -> np.ndarray:
        """One per decision step, and one per column where columns have tokens."""
        return np.full_like(lengths_N, self.config.tokens(self.columns))

    def dummy(self) -> Row:
        """A row of means and missing categories."""
        numeric, categories = len(self.mean), len(self.cardinality)
        return Row(
            np.zeros(numeric, dtype=np.float32),
            np.full(categories, MISSING_ID, dtype=np.int64),
            np.ones(numeric + categories, dtype=bool),
        )

    def example(self) -> Row:
        """Any row: all have one size."""
        return self.dummy()

    def corrupt(self, content: Row, rng: np.random.Generator) -> np.ndarray:
        """(K,): Bernoulli over observed columns, whole columns; at least one."""
        draws = rng.random(len(content.observed_K))
        mask = (draws < self.config.mask_ratio) & content.observed_K
        if not mask.any():
            mask[np.where(content.observed_K, draws, 2).argmin()] = True
        return mask

    def collate(
        self, contents: Sequence[Row], masks: Sequence[np.ndarray] | None, weights: Sequence[float]
    ) -> Collated[TabularInput]:
        """Stack the rows."""
        numeric = torch.from_numpy(np.array([c.numeric_R for c in contents]))
        categories = torch.from_numpy(np.array([c.categories_C for c in contents]))
        tokens = np.full(len(contents), self.config.tokens(self.columns))
        # Statistics need two rows, all of them real.
        batch_statistics = self.config.norm == "batch" and len(contents) > 1 and min(weights) > 0
        if masks is None:
            return Collated(TabularInput(numeric, categories, None, NO_WEIGHTS, batch_statistics), tokens, 0.0)
        mask_NK = np.array(masks)
        predicted_NK = mask_NK & np.array([c.observed_K for c in contents])
        weights_NK = predicted_NK * np.asarray(weights, dtype=np.float32)[:, None]
        inputs = TabularInput(
            numeric,
            categories,
            torch.from_numpy((~mask_NK).astype(np.float32)),
            torch.from_numpy(weights_NK.astype(np.float32)),
            batch_statistics,
        )
        return Collated(inputs, tokens, float((weights_NK > 0).sum()))

    def adapt(
        self, stored: dict[str, Tensor], own: dict[str, Tensor], schema: ModalitySchema
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Columns and categories are matched by name; what is new keeps its fresh start."""
        old = TabularSpec.model_validate(schema.spec)
        keys = [_Keys.of(spec, self.config.embedding_dim) for spec in (self.spec, old)]
        adapted = {}
        for name, tensor in stored.items():
            if name not in own:
                adapted[name] = tensor
            elif name in ("embedding.weight", "columns.embedding.weight"):
                adapted[name] = match_rows(own[name], tensor, 0, keys[0].rows, keys[1].rows)
            elif name.endswith("initial_splitter.shared.shared_layers.0.weight"):
                adapted[name] = match_rows(own[name], tensor, 1, keys[0].features, keys[1].features)
            elif name in ("columns.weight", "columns.bias"):
                columns = [key.numeric if name == "columns.weight" else key.columns for key in keys]
                adapted[name] = match_rows(own[name], tensor, 0, *columns)
            elif ".initial_bn." in name and tensor.ndim:
                adapted[name] = match_rows(own[name], tensor, 0, keys[0].features, keys[1].features)
            elif ".att_transformers." in name and tensor.ndim:
                adapted[name] = match_rows(own[name], tensor, 0, keys[0].columns, keys[1].columns)
            else:
                adapted[name] = tensor
        return adapted, _compare(self.name, keys[0], keys[1])

    def build(self, width: int, attention: str) -> "TabularEncoder":
        """TabNet, its projection and its decoder."""
        return TabularEncoder(self.config, len(self.mean), self.cardinality.tolist(), width)


@dataclass(frozen=True)
class _Keys:
    """What each numeric column, column, embedded feature and row of the embedding table stands for."""

    numeric: list[Any]
    columns: list[Any]
    features: list[Any]
    rows: list[Any]

    @classmethod
    def of(cls, spec: TabularSpec, embedding_dim: int) -> "_Keys":
        """Keys in the order of the encoder's tensors."""
        numeric = [("number", c.name) for c in spec.numeric]
        categorical = [("category", c.name) for c in spec.categorical]
        embedded = [(*column, i) for column in categorical for i in range(embedding_dim)]
        rows = [
            (c.name, *row)
            for c in spec.categorical
            for row in [
                ("missing",),
                ("unseen",),
                *(("value", v) for v in c.values),
                *(("bucket", b, c.buckets) for b in range(c.buckets)),
            ]
        ]
        return cls(numeric, [*numeric, *categorical], [*numeric, *embedded], rows)


def _compare(name: str, own: _Keys, old: _Keys) -> list[str]:
    """Notes on what is new and what is gone."""
    notes = []
    for what, mine, theirs in (("columns", own.columns, old.columns), ("embedding rows", own.rows, old.rows)):
        new, gone = [k for k in mine if k not in set(theirs)], [k for k in theirs if k not in set(mine)]
        if new or gone:
            names = ", ".join("/".join(map(str, key[-2:])) for key in [*new, *gone][:8])
            found = len(mine) - len(new)
            notes.append(f"{name}: {found} {what} by name, {len(new)} new, {len(gone)} gone ({names})")
    return notes


class TabularEncoder(ModalityEncoder[TabularInput]):
    """TabNet; the clean and the masked view are one pass, each with its own batch statistics.

    It computes in float32 whatever its parameters' dtype: in bfloat16 its gradient is off by more than half (DECISIONS.md).
    """

    def __init__(self, config: TabularConfig, numeric: int, cardinality: list[int], width: int):
        super().__init__()
        self.numeric, self.cardinality, self.steps = numeric, cardinality, config.steps
        self.tokens = config.tokens(numeric + len(cardinality))
        self.encoder = TabNet(config, numeric, cardinality)
        self.projection = nn.Linear(config.width, width)
        self.head = MFMHead(config, numeric + sum(cardinality))

    def encode(self, inputs: TabularInput) -> Tensor:
        """(views * N * tokens, D): the step outputs of each row, then its columns where they have tokens."""
        tabnet = self.encoder
        x_NX = tabnet.embed(inputs.numeric_NR, inputs.categories_NC)
        prior_NK = x_NX.new_ones(x_NX.shape[0], self.numeric + len(self.cardinality))
        if inputs.keep_NK is None:
            return self._beside(tabnet(x_NX, prior_NK, 1, inputs.batch_statistics), inputs)
        keep_NK = inputs.keep_NK.to(x_NX.dtype)
        x_NX = torch.cat([x_NX, x_NX * keep_NK.index_select(1, tabnet.column_of_X)])
        return self._beside(tabnet(x_NX, torch.cat([prior_NK, keep_NK]), 2, inputs.batch_statistics), inputs)

    def _beside(self, steps_NSD: Tensor, inputs: TabularInput) -> Tensor:
        """The rows' step outputs, of all views, with the tokens of their columns, one after the other."""
        columns = self.encoder.columns
        if columns is None:
            return steps_NSD.flatten(0, 1)
        tokens_NKD = columns(inputs.numeric_NR, self.encoder.rows(inputs.categories_NC))
        if inputs.keep_NK is not None:
            tokens_NKD = torch.cat([tokens_NKD, columns.hide(tokens_NKD, inputs.keep_NK, self.head.mask_token)])
        return torch.cat([steps_NSD, tokens_NKD], dim=1).flatten(0, 1)

    def cell_shares(self, inputs: TabularInput) -> Tensor:
        """(N, K), rows sum to 1: the masks of all steps, weighted by their summed outputs (Arik and Pfister, section 3.3)."""
        x_NX = self.encoder.embed(inputs.numeric_NR, inputs.categories_NC)
        prior_NK = x_NX.new_ones(len(x_NX), self.numeric + len(self.cardinality))
        steps = self.encoder.decide(x_NX, prior_NK, 1, inputs.batch_statistics)
        total_NK = torch.stack([mask_NK * step_ND.sum(1, keepdim=True) for mask_NK, step_ND in steps]).sum(0)
        return total_NK / total_NK.sum(1, keepdim=True).clamp(min=1e-12)

    def project(self, hidden: Tensor, inputs: TabularInput) -> Tensor:
        """Tokens of the fusion width, in the dtype of the parameters."""
        return self.projection(hidden.to(next(self.projection.parameters()).dtype))

    def reconstruct(self, hidden: Tensor, inputs: TabularInput) -> Tensor:
        """Squared error of numbers and cross-entropy of categories, summed over masked observed cells."""
        rows = len(inputs.numeric_NR)
        hidden_NSD = hidden.view(2, rows, self.tokens, -1)[1, :, : self.steps]
        out = self.head(hidden_NSD, inputs.batch_statistics).float()  # the decoder has no clean view
        errors = (out[:, : self.numeric] - inputs.numeric_NR).square()
        total = (errors * inputs.weights_NK[:, : self.numeric]).sum()
        start = self.numeric
        for column, cardinality in enumerate(self.cardinality):
            losses = cross_entropy(
                out[:, start : start + cardinality], inputs.categories_NC[:, column], reduction="none"
            )
            total = total + (losses * inputs.weights_NK[:, self.numeric + column]).sum()
            start += cardinality
        return total
