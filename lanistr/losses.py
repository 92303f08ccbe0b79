"""Losses of the multimodal encoder (the unimodal ones live with their modality).

Shape suffixes: T packed fusion rows of one view, D width.
"""

from torch import Tensor

from lanistr.ops.cosine import neg_cosine


def simsiam_loss(z_clean: Tensor, p_clean: Tensor, z_masked: Tensor, p_masked: Tensor) -> Tensor:
    """Symmetric negative cosine per row, in [-1, 1] (paper eq. 2).

    Each branch's target is detached by `neg_cosine` (stop-gradient).

    Args:
        z_clean, z_masked: (T, D) projections of the clean and of the masked view.
        p_clean, p_masked: (T, D) predictions.

    Returns:
        (T,) float32.
    """
    return (neg_cosine(p_clean, z_masked) + neg_cosine(p_masked, z_clean)) / 2
