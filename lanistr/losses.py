"""Losses of the multimodal encoder (the unimodal ones live with their modality).

Shape suffixes: T packed fusion rows of one view, B samples, D width.
"""

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

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


def cross_modal_loss(predicted_BH: Tensor, target_BH: Tensor, both_B: Tensor) -> Tensor:
    """Negative cosine between what one modality predicts of another and what that one is (not in the paper).

    The target is detached and centred over the samples that have both: the direction that all samples share tells nothing.
    It uses the statistics of the micro-batch, so it depends on how a global batch is divided.

    Args:
        predicted_BH: from a modality alone.
        target_BH: mean hidden state of the other; zeros where it is absent.
        both_B: 1 where a sample has both, else 0.

    Returns:
        A float32 scalar, summed over these samples.
    """
    target_BH = target_BH.detach().float()
    mean_H = (target_BH * both_B[:, None]).sum(0) / both_B.sum().clamp(min=1)
    return (-cosine_similarity(predicted_BH.float(), target_BH - mean_H, dim=1) * both_B).sum()


def decorrelation_loss(x_BD: Tensor) -> Tensor:
    """Keeps fused embeddings from collapsing (not in the paper: DECISIONS.md).

    Sum of squared off-diagonal correlations over D, and a hinge that asks every feature for a standard deviation of at
    least 0.3. It uses the statistics of the micro-batch, so it depends on how a global batch is divided.

    Args:
        x_BD: B >= 2 fused embeddings.

    Returns:
        A float32 scalar.
    """
    x_BD = x_BD.float()
    std_D = (x_BD.var(0) + 1e-6).sqrt()
    normal_BD = (x_BD - x_BD.mean(0)) / std_D
    correlation_DD = normal_BD.T @ normal_BD / (len(x_BD) - 1)
    off_diagonal = correlation_DD.square().sum() - correlation_DD.diagonal().square().sum()
    return off_diagonal / x_BD.shape[1] + 20 * nn.functional.relu(0.3 - std_D).mean()
