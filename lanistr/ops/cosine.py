"""Negative cosine similarity with a stop-gradient on the target. Shape suffixes: N rows, D width."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

REGISTERS = 8192  # a row as wide as this still fits a program of the kernel; the paper's is 2048


def neg_cosine(p_ND: Tensor, z_ND: Tensor) -> Tensor:
    """(N,) in [-1, 1], at least float32; ``z_ND`` is the target and is detached (SimSiam, eq. 1).

    On CUDA, where Triton is installed (with PyTorch's CUDA builds it is), by the kernel of `lanistr.ops.cosine_triton`.
    """
    if _fits_kernel(p_ND, z_ND):
        from lanistr.ops.cosine_triton import fused_neg_cosine

        return fused_neg_cosine(p_ND, z_ND.detach())
    wide = torch.promote_types(p_ND.dtype, torch.float32)
    return -cosine_similarity(p_ND.to(wide), z_ND.detach().to(wide), dim=-1)


def _fits_kernel(p_ND: Tensor, z_ND: Tensor) -> bool:
    fits = p_ND.ndim == 2 and p_ND.shape == z_ND.shape and p_ND.numel() > 0 and p_ND.shape[1] <= REGISTERS
    return fits and p_ND.is_cuda and p_ND.dtype != torch.float64 and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
