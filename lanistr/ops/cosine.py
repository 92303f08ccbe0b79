"""Negative cosine similarity with a stop-gradient on the target. Shape suffixes: N rows, D width."""

from torch import Tensor
from torch.nn.functional import cosine_similarity


def neg_cosine(p_ND: Tensor, z_ND: Tensor) -> Tensor:
    """(N,) float32 in [-1, 1]; ``z_ND`` is the target and is detached (SimSiam, eq. 1)."""
    return -cosine_similarity(p_ND.float(), z_ND.detach().float(), dim=-1)
