"""TabNet (Arik and Pfister 2021) from pytorch_tabnet's building blocks, on the batch norms of `lanistr.ops`.

Shape suffixes: N rows of all views, R numeric columns, C categorical columns, K = R + C columns, X features after
embedding, S steps, D width.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import glu, linear, relu

from lanistr.config import ModalityConfig
from lanistr.modalities.columns import START, ColumnTokens
from lanistr.ops.ghost_norm import GhostBatchNorm
from lanistr.ops.sparsemax import sparsemax


class TabularConfig(ModalityConfig):
    """Size of TabNet and masking.

    Attributes:
        embedding_dim: per categorical column (3 as published).
        embedding_std: of the embeddings at the start (1 as published; a column of many values, each seen seldom, leaves a
            smaller one sooner).
        width: n_d = n_a; also the width of a step's output token.
        norm: ``batch`` = ghost batch norm; ``frozen`` = running statistics always (equality across batch layouts).
        mask_ratio: share of columns masked per row.
        numbers: ``standard`` = less the mean of train, over its deviation (paper); ``quantile`` = by their rank in train
            (`lanistr.modalities.scores.NormalScores`): for columns with a long tail.
        column_tokens: beside the steps a token per column enters fusion (`lanistr.modalities.columns.ColumnTokens`; not in
            the paper).
    """

    embedding_dim: int = 3
    embedding_std: float = Field(default=1.0, gt=0)
    width: int = 64
    steps: int = Field(default=3, ge=1)
    gamma: float = 1.3
    n_independent: int = 2
    n_shared: int = 2
    virtual_batch: int = Field(default=128, ge=2)
    momentum: float = 0.02
    norm: Literal["batch", "frozen"] = "batch"
    mask_ratio: float = Field(default=0.15, gt=0, lt=1)
    numbers: Literal["standard", "quantile"] = "standard"
    column_tokens: bool = False

    def tokens(self, columns: int) -> int:
        """How many a row gives to fusion."""
        return self.steps + (columns if self.column_tokens else 0)


class TabNet(nn.Module):
    """TabNet's encoder with per-column attention: the blocks of `pytorch_tabnet`, without its sparsity loss."""

    offsets_C: Tensor
    column_of_X: Tensor

    def __init__(self, config: TabularConfig, numeric: int, cardinality: list[int]):
        super().__init__()
        from pytorch_tabnet.tab_network import TabNetEncoder

        self.gamma = config.gamma
        self.width = config.width
        self.embedding = nn.Embedding(max(1, sum(cardinality)), config.embedding_dim)
        with torch.no_grad():
            self.embedding.weight.mul_(config.embedding_std)
        columns = [*range(numeric), *np.repeat(np.arange(len(cardinality)) + numeric, config.embedding_dim)]
        groups_KX = torch.nn.functional.one_hot(torch.tensor(columns, device="cpu")).T.float()
        offsets = np.concatenate([[0], np.cumsum(cardinality)])[:-1].astype(np.int64)
        self.columns = ColumnTokens(numeric, cardinality, config.width) if config.column_tokens else None
        self.register_buffer("offsets_C", torch.from_numpy(offsets), persistent=False)
        self.register_buffer("column_of_X", torch.tensor(columns), persistent=False)
        self.blocks: Any = TabNetEncoder(
            input_dim=len(columns),
            output_dim=1,
            n_d=config.width,
            n_a=config.width,
            n_steps=config.steps,
            gamma=config.gamma,
            n_independent=config.n_independent,
            n_shared=config.n_shared,
            group_attention_matrix=groups_KX,
        )
        replace_norms(self.blocks, config)

    def rows(self, categories_NC: Tensor) -> Tensor:
        """Rows of the embedding table, one for all columns."""
        return categories_NC + self.offsets_C

    def embed(self, numeric_NR: Tensor, categories_NC: Tensor) -> Tensor:
        """(N, X), at least float32."""
        embedded = self.embedding(self.rows(categories_NC)).flatten(1)
        embedded = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        return torch.cat([numeric_NR.to(embedded.dtype), embedded], dim=1)

    def forward(self, x_NX: Tensor, prior_NK: Tensor, views: int, batch_statistics: bool) -> Tensor:
        """ReLU outputs of every decision step.

        Args:
            x_NX: embedded rows of all views; hidden columns are zero.
            prior_NK: 1 where a column may be attended to at first, 0 where the view hides it (Arik and Pfister,
                section 3.4: the mask starts as 1 - S).
            views, batch_statistics: of the norms, see `GhostBatchNorm`.

        Returns:
            (N, S, D).
        """
        decided = self.decide(x_NX, prior_NK, views, batch_statistics)
        return torch.stack([step_ND for _, step_ND in decided], dim=1)

    def decide(
        self, x_NX: Tensor, prior_NK: Tensor, views: int, batch_statistics: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The mask over columns (N, K) and the ReLU output (N, D) of each step; arguments as of `forward`."""
        blocks, stats = self.blocks, (views, batch_statistics)
        x_NX = blocks.initial_bn(x_NX, *stats)
        attended = feature_transformer(blocks.initial_splitter, x_NX, *stats)[:, self.width :]
        for transformer, attention in zip(blocks.feat_transformers, blocks.att_transformers, strict=True):
            mask_NK = sparsemax(attention.bn(_wide_linear(attention.fc, attended), *stats) * prior_NK)
            prior_NK = (self.gamma - mask_NK) * prior_NK
            out = feature_transformer(transformer, mask_NK.index_select(1, self.column_of_X) * x_NX, *stats)
            step_ND, attended = out.split(self.width, dim=1)
            yield mask_NK, relu(step_ND)


def _wide_linear(layer: Any, x_NX: Tensor) -> Tensor:
    """A linear layer (without bias, as all of TabNet's) in the dtype of its input, whatever that of its weight."""
    return linear(x_NX, layer.weight.to(x_NX.dtype))


def feature_transformer(transformer: Any, x_NX: Tensor, views: int, batch_statistics: bool) -> Tensor:
    """Shared, then specific gated linear units with residuals: pytorch_tabnet's `FeatTransformer` in fewer operations."""
    for block in (transformer.shared, transformer.specifics):
        for i, layer in enumerate(block.glu_layers):
            out = glu(layer.bn(_wide_linear(layer.fc, x_NX), views, batch_statistics))
            x_NX = out if block.first and i == 0 else (x_NX + out) * 0.5**0.5
    return x_NX


def replace_norms(module: nn.Module, config: TabularConfig) -> None:
    """Put `GhostBatchNorm` in the place of every batch norm and GBN of pytorch_tabnet."""
    from pytorch_tabnet.tab_network import GBN

    for name, child in module.named_children():
        if isinstance(child, GBN):
            setattr(module, name, GhostBatchNorm(child.input_dim, config.virtual_batch, config.momentum))
        elif isinstance(child, nn.BatchNorm1d):
            momentum = child.momentum or config.momentum
            # TabNet's input norm is over the whole batch, not over virtual ones.
            setattr(module, name, GhostBatchNorm(child.num_features, None, momentum))
        else:
            replace_norms(child, config)


class MFMHead(nn.Module):
    """TabNet's decoder; its linear layer gives one number per numeric column and logits per categorical one.

    Attributes:
        mask_token: (D,) of columns, where they have tokens.
    """

    def __init__(self, config: TabularConfig, outputs: int):
        super().__init__()
        from pytorch_tabnet.tab_network import TabNetDecoder

        self.mask_token = nn.Parameter(START * torch.randn(config.width)) if config.column_tokens else None
        self.decoder = TabNetDecoder(outputs, config.width, config.steps)
        replace_norms(self.decoder, config)

    def forward(self, hidden_NSD: Tensor, batch_statistics: bool) -> Tensor:
        """(N, outputs), averaged over the steps (paper)."""
        decoder, steps = self.decoder, hidden_NSD.unbind(1)
        decoded = [
            feature_transformer(transformer, step_ND, 1, batch_statistics)
            for transformer, step_ND in zip(decoder.feat_transformers, steps, strict=True)
        ]
        return _wide_linear(decoder.reconstruction_layer, torch.stack(decoded).mean(0))
