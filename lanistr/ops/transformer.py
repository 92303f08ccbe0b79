"""The transformer layer of the fusion and time-series encoders, over packed rows.

Shape suffixes: T packed rows, D width, H heads, K head width, N padded sequences, L their length.
"""

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
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


def dense_block(block: Block, x_NLD: Tensor, keep_NL: Tensor) -> Tensor:
    """`Block` over padded sequences with a key mask: another way to the same rows, for graphs that cannot pack.

    Args:
        block: its parameters.
        x_NLD: padded.
        keep_NL: bool, at least one per sequence.
    """

    def attend(y_NLD: Tensor) -> Tensor:
        q, k, v = block.qkv(y_NLD).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q, k, v, attn_mask=keep_NL[:, None, None, :])
        return block.out(out.transpose(1, 2).flatten(2))

    def mlp(y_NLD: Tensor) -> Tensor:
        return block.down(nn.functional.gelu(block.up(y_NLD)))

    if block.pre_norm:
        x_NLD = x_NLD + attend(block.norm1(x_NLD))
        return x_NLD + mlp(block.norm2(x_NLD))
    x_NLD = block.norm1(x_NLD + attend(x_NLD))
    return block.norm2(x_NLD + mlp(x_NLD))


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Switch activation checkpointing on in every `Block`."""
    for block in blocks:
        cast(Block, block).checkpoint = True
