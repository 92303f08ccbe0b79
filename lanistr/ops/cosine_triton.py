"""Negative cosine of `lanistr.ops.cosine` as one Triton kernel forward and one backward.

Each program holds one row of both tensors in registers: it reads them once, in their own dtype, and computes in float32.
PyTorch's composition writes float32 copies, unit vectors and their product to memory, and saves most of them.
Shape suffixes: N rows, D width.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.autograd import Function


@triton.jit
def _unit_row(x_ptr, offset, columns, D):
    """A row of the matrix at ``x_ptr`` divided by its norm, and one over that norm."""
    x = tl.load(x_ptr + offset + columns, mask=columns < D, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x)), 1e-8)  # as torch.nn.functional.cosine_similarity
    return x * inverse, inverse


@triton.jit
def _forward(p_ptr, z_ptr, out_ptr, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    p, _ = _unit_row(p_ptr, row * D, columns, D)
    z, _ = _unit_row(z_ptr, row * D, columns, D)
    tl.store(out_ptr + row, -tl.sum(p * z))


@triton.jit
def _backward(p_ptr, z_ptr, grad_ptr, dp_ptr, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    p, inverse = _unit_row(p_ptr, row * D, columns, D)
    z, _ = _unit_row(z_ptr, row * D, columns, D)
    grad = tl.load(grad_ptr + row)
    dp = grad * inverse * (tl.sum(p * z) * p - z)
    tl.store(dp_ptr + row * D + columns, dp.to(dp_ptr.dtype.element_ty), mask=columns < D)


class _NegCosine(Function):
    @staticmethod
    def forward(ctx: Any, p_ND: Tensor, z_ND: Tensor) -> Tensor:
        p_ND, z_ND = p_ND.contiguous(), z_ND.contiguous()
        ctx.save_for_backward(p_ND, z_ND)
        rows, width = p_ND.shape
        out_N = torch.empty(rows, dtype=torch.float32, device=p_ND.device)
        _forward[(rows,)](p_ND, z_ND, out_N, width, BLOCK=triton.next_power_of_2(width))  # pyright: ignore[reportIndexIssue]
        return out_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        p_ND, z_ND = ctx.saved_tensors
        rows, width = p_ND.shape
        grad_N, dp_ND = grads[0].contiguous(), torch.empty_like(p_ND)
        _backward[(rows,)](p_ND, z_ND, grad_N, dp_ND, width, BLOCK=triton.next_power_of_2(width))  # pyright: ignore[reportIndexIssue]
        return dp_ND, None  # stop-gradient on the target


def fused_neg_cosine(p_ND: Tensor, z_ND: Tensor) -> Tensor:
    """(N,) float32, N >= 1: as `lanistr.ops.cosine.neg_cosine`, for float32 and 16-bit tensors; no second derivative."""
    out_N: Tensor = _NegCosine.apply(p_ND, z_ND)
    return out_N
