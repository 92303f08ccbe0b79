"""Negative cosine similarity with a stop-gradient on the target. Shape suffixes: N rows, D width."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def neg_cosine(p_ND: Tensor, z_ND: Tensor) -> Tensor:
    """(N,) in [-1, 1], at least float32; ``z_ND`` is the target and is detached (SimSiam, eq. 1)."""
    wide = torch.promote_types(p_ND.dtype, torch.float32)
    return -cosine_similarity(p_ND.to(wide), z_ND.detach().to(wide), dim=-1)
