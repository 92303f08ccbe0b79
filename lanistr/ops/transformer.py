"""The transformer layer of the fusion and time-series encoders, over packed rows.

Shape suffixes: T packed rows, D width, H heads, K head width.
"""

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lanistr.batch import Layout
from lanistr.ops.attention import attention


class Block(nn.Module):
    """Attention and MLP with residuals; erf-GELU.

    Args:
        width, heads, intermediate: D, H (divides D), MLP width.
        eps: of the layer norms.
        backend: of `lanistr.ops.attention`.
        pre_norm: normalise before each half (FLAVA's multimodal encoder) or after (Zerveas et al.).
        init_std: of the weights (FLAVA's initialisation); None = as `torch.nn.TransformerEncoderLayer`, which Zerveas et
            al. use.

    Attributes:
        checkpoint: keep only the input in training, and compute the rest again in backward.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        intermediate: int,
        eps: float,
        backend: str,
        *,
        pre_norm: bool,
        init_std: float | None,
    ):
        super().__init__()
        self.heads, self.backend, self.pre_norm = heads, backend, pre_norm
        self.checkpoint = False
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, intermediate)
        self.down = nn.Linear(intermediate, width)
        for layer in (self.qkv, self.out, self.up, self.down):
            if init_std is not None:
                nn.init.normal_(layer.weight, std=init_std)
                nn.init.zeros_(layer.bias)
        if init_std is None:
            nn.init.xavier_uniform_(self.qkv.weight)
            nn.init.zeros_(self.qkv.bias)
            nn.init.zeros_(self.out.bias)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """(T, D) -> (T, D)."""
        if self.checkpoint and self.training:
            return cast(Tensor, checkpoint(self._forward, x_TD, layout, use_reentrant=False))
        return self._forward(x_TD, layout)

    def _forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        if self.pre_norm:
            x_TD = x_TD + self._attend(self.norm1(x_TD), layout)
            return x_TD + self._mlp(self.norm2(x_TD))
        x_TD = self.norm1(x_TD + self._attend(x_TD, layout))
        return self.norm2(x_TD + self._mlp(x_TD))

    def _attend(self, x_TD: Tensor, layout: Layout) -> Tensor:
        q_THK, k_THK, v_THK = self.qkv(x_TD).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return self.out(attention(q_THK, k_THK, v_THK, layout, self.backend).flatten(1))

    def _mlp(self, x_TD: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x_TD)))


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Switch activation checkpointing on in every `Block`."""
    for block in blocks:
        cast(Block, block).checkpoint = True
