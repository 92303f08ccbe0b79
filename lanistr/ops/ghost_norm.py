"""Ghost batch normalisation with rules for tiny and dummy batches. Shape suffixes: N rows, F features."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class GhostBatchNorm(nn.Module):
    """Batch norm over virtual batches (Hoffer et al. 2017; `pytorch_tabnet`'s GBN) for data that may be missing.

    * A virtual batch of a single row joins its neighbour.
    * ``batch_statistics = False`` (fewer than two real rows, a dummy, or a frozen norm), and eval mode: the running
      statistics normalise.
    * ``update`` decides whether the running statistics learn (only the clean view's do).

    The two switches are set by the owner before a pass. Statistics are float32 whatever the module's dtype.

    Args:
        features: F.
        virtual_batch: rows per chunk.
        momentum: of the running statistics, per chunk.
    """

    running_mean: Tensor
    running_var: Tensor
    rows_seen: Tensor

    def __init__(self, features: int, virtual_batch: int, momentum: float, eps: float = 1e-5):
        super().__init__()
        self.virtual_batch, self.momentum, self.eps = virtual_batch, momentum, eps
        self.batch_statistics = True
        self.update = True
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        # Rows since the last merge across ranks: the weight of this rank's statistics.
        self.register_buffer("rows_seen", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> "GhostBatchNorm":
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        return self

    def forward(self, x_NF: Tensor) -> Tensor:
        """(N, F) -> (N, F), in the dtype of the input."""
        if self.training and self.batch_statistics:
            normal_NF = torch.cat([self._normalise(chunk) for chunk in x_NF.float().split(self._sizes(len(x_NF)))])
        else:
            normal_NF = (x_NF.float() - self.running_mean) * (self.running_var + self.eps).rsqrt()
        return (normal_NF * self.weight + self.bias).to(x_NF.dtype)

    def _sizes(self, rows: int) -> list[int]:
        full, rest = divmod(rows, self.virtual_batch)
        sizes = [self.virtual_batch] * full + ([rest] if rest else [])
        if len(sizes) > 1 and sizes[-1] == 1:
            sizes[-2:] = [sizes[-2] + 1]
        return sizes

    def _normalise(self, x_NF: Tensor) -> Tensor:
        var_F, mean_F = torch.var_mean(x_NF, dim=0, correction=0)
        if self.update:
            with torch.no_grad():
                unbiased_F = var_F * (len(x_NF) / (len(x_NF) - 1))
                self.running_mean.lerp_(mean_F, self.momentum)
                self.running_var.lerp_(unbiased_F, self.momentum)
                self.rows_seen += len(x_NF)
        return (x_NF - mean_F) * (var_F + self.eps).rsqrt()
