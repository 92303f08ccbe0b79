"""Ghost batch normalisation with rules for tiny and dummy batches.

Shape suffixes: N rows of all views, C chunks, n rows of a chunk, F features.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


class GhostBatchNorm(nn.Module):
    """Batch norm over virtual batches (Hoffer et al. 2017; `pytorch_tabnet`'s GBN) for data that may be missing.

    * Each view is normalised by its own statistics; only the first one (the clean view) moves the running statistics.
    * A virtual batch of a single row joins its neighbour.
    * Without batch statistics (fewer than two real rows, a dummy, or a frozen norm), and in eval mode, the running
      statistics normalise.

    All full chunks of all views are normalised in one call; there is no loop over chunks. Statistics are at
    least float32, whatever the module's dtype.

    Args:
        features: F.
        virtual_batch: rows per chunk; None = all rows of a view.
        momentum: of the running statistics, per chunk.
    """

    running_mean: Tensor
    running_var: Tensor
    rows_seen: Tensor

    def __init__(self, features: int, virtual_batch: int | None, momentum: float, eps: float = 1e-5):
        super().__init__()
        self.virtual_batch, self.momentum, self.eps = virtual_batch, momentum, eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))
        # Rows since the last merge across ranks: the weight of this rank's statistics.
        self.register_buffer("rows_seen", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> "GhostBatchNorm":
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = _wide(self.running_mean), _wide(self.running_var)
        return self

    def forward(self, x_NF: Tensor, views: int = 1, batch_statistics: bool = True) -> Tensor:
        """(N, F) -> (N, F), in the dtype of the input.

        Args:
            x_NF: rows of view 0, then of view 1, ...; N is a multiple of ``views``.
            views: how many.
            batch_statistics: False = the running statistics normalise, in training too.
        """
        wide_NF, weight, bias = _wide(x_NF), _wide(self.weight), _wide(self.bias)
        if not (self.training and batch_statistics):
            out_NF = nn.functional.batch_norm(wide_NF, self.running_mean, self.running_var, weight, bias, eps=self.eps)
            return out_NF.to(x_NF.dtype)
        rows = len(x_NF) // views
        self.rows_seen += rows
        chunk = self.virtual_batch or rows
        full, rest = chunk_rows(rows, chunk)
        if not full or not rest:
            return self._normalise(wide_NF, views, rest or chunk, weight, bias).to(x_NF.dtype)
        parts = wide_NF.unflatten(0, (views, rows)).split([full * chunk, rest], dim=1)
        normal = [
            self._normalise(part.flatten(0, 1), views, size, weight, bias).unflatten(0, (views, -1))
            for part, size in zip(parts, (chunk, rest), strict=True)
        ]
        return torch.cat(normal, dim=1).flatten(0, 1).to(x_NF.dtype)

    def _normalise(self, x_NF: Tensor, views: int, size: int, weight_F: Tensor, bias_F: Tensor) -> Tensor:
        """Chunks of ``size`` rows each: a group norm in which every feature of a chunk is a group."""
        chunks, features = len(x_NF) // size, x_NF.shape[1]
        x_CFn = x_NF.view(chunks, size, features).transpose(1, 2).contiguous()
        out_CFn, mean_CF, rstd_CF = torch.native_group_norm(
            x_CFn, weight_F, bias_F, chunks, features, size, features, self.eps
        )
        if views > 1:  # the clean view comes first
            mean_CF, rstd_CF = mean_CF[: chunks // views], rstd_CF[: chunks // views]
        self._learn(mean_CF.detach(), rstd_CF.detach(), size)
        return out_CFn.transpose(1, 2).reshape(x_NF.shape)

    @torch.no_grad()
    def _learn(self, mean_CF: Tensor, rstd_CF: Tensor, size: int) -> None:
        """Exponential averages, as if the chunks had come one after the other."""
        weight_C = _decay(len(mean_CF), self.momentum, mean_CF.dtype, mean_CF.device)
        keep, unbias = (1 - self.momentum) ** len(mean_CF), size / (size - 1)
        self.running_mean.addmv_(mean_CF.T, weight_C, beta=keep)
        self.running_var.addmv_(rstd_CF.pow(-2).T, weight_C, beta=keep, alpha=unbias)
        self.running_var.sub_(self.eps * unbias * (1 - keep))


@lru_cache(maxsize=64)
def _decay(chunks: int, momentum: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(C,): how much each of C chunks in a row is worth in an exponential average."""
    weights = [momentum * (1 - momentum) ** later for later in range(chunks - 1, -1, -1)]
    return torch.tensor(weights, dtype=dtype, device=device)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def chunk_rows(rows: int, virtual_batch: int) -> tuple[int, int]:
    """Number of full chunks and the rows of a last chunk of another size (0 = none); none has a single row.

    Args:
        rows: of one view, at least 2.
        virtual_batch: at least 2.
    """
    assert rows > 1, "batch statistics need two rows"
    full, rest = divmod(rows, virtual_batch)
    return (full - 1, virtual_batch + 1) if rest == 1 else (full, rest)
