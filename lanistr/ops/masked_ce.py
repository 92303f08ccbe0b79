"""Linear layer and cross-entropy in one, over chunks of rows: the full logits never exist.

Shape suffixes: N rows, D width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

CHUNK = 1024


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, weights_N: Tensor
) -> Tensor:
    """Sum over rows of ``weights * cross_entropy(hidden @ weight.T + bias, targets)``.

    Rows are worked off in chunks of 1024, each recomputed in backward where there is more than one: at most
    (1024, V) logits are held.

    Args:
        hidden_ND: N >= 1 rows.
        weight_VD, bias_V: of the decoder.
        targets_N: int64 in [0, V).
        weights_N: float32; a row of weight 0 adds exactly zero.

    Returns:
        A float32 (float64 for float64 inputs) scalar.
    """
    if len(hidden_ND) <= CHUNK:
        return _chunk(hidden_ND, weight_VD, bias_V, targets_N, weights_N)
    totals = []
    for start in range(0, len(hidden_ND), CHUNK):
        rows = slice(start, start + CHUNK)
        total = checkpoint(
            _chunk, hidden_ND[rows], weight_VD, bias_V, targets_N[rows], weights_N[rows], use_reentrant=False
        )
        assert isinstance(total, Tensor)
        totals.append(total)
    return torch.stack(totals).sum()


def _chunk(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, weights_N: Tensor) -> Tensor:
    logits_NV = linear(hidden_ND, weight_VD, bias_V)
    logits_NV = logits_NV.double() if logits_NV.dtype == torch.float64 else logits_NV.float()
    return (cross_entropy(logits_NV, targets_N, reduction="none") * weights_N).sum()
