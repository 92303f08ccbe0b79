"""Sparsemax (Martins and Astudillo 2016): the Euclidean projection onto the simplex. Shape suffixes: N rows, K classes."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def sparsemax(z_NK: Tensor) -> Tensor:
    """Rows that sum to 1, many of them exactly zero elsewhere; float32 inside, the input's dtype outside.

    Unlike upstream's, the input is not changed and the gradient can be checked (`torch.autograd.gradcheck`).
    """
    out_NK: Tensor = _Sparsemax.apply(z_NK)
    return out_NK


def threshold(z_NK: Tensor) -> Tensor:
    """(N, 1): tau with ``sum(max(z - tau, 0)) = 1``, by sorting."""
    sorted_NK = z_NK.sort(dim=-1, descending=True).values
    excess_NK = sorted_NK.cumsum(-1) - 1
    rank_K = torch.arange(1, z_NK.shape[-1] + 1, device=z_NK.device, dtype=z_NK.dtype)
    # The largest of these means is the threshold: it grows while a further element still belongs to the support.
    return (excess_NK / rank_K).amax(-1, keepdim=True)


class _Sparsemax(Function):
    @staticmethod
    def forward(ctx: Any, z_NK: Tensor) -> Tensor:
        wide_NK = z_NK if z_NK.dtype == torch.float64 else z_NK.float()
        out_NK = (wide_NK - threshold(wide_NK)).clamp(min=0)
        ctx.save_for_backward(out_NK)
        return out_NK.to(z_NK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (out_NK,) = ctx.saved_tensors
        (grad_NK,) = grads
        support_NK = (out_NK > 0).to(out_NK.dtype)
        mean_N1 = (grad_NK * support_NK).sum(-1, keepdim=True) / support_NK.sum(-1, keepdim=True)
        return ((grad_NK - mean_N1) * support_NK).to(grad_NK.dtype)
