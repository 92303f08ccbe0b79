"""What ALBEF minimises (Li et al. 2021, section 3), as functions of features; the published code gave the details.

Shape suffixes: P image-text pairs, Q entries of a queue, E embedding width, M masked tokens, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, softmax


def contrastive_losses(
    image_PE: Tensor,
    text_PE: Tensor,
    slow_image_PE: Tensor,
    slow_text_PE: Tensor,
    image_queue_QE: Tensor,
    text_queue_QE: Tensor,
    temperature: Tensor,
    alpha: float,
) -> Tensor:
    """Image-text contrastive loss of each pair, eq. 2 with the soft targets of eq. 6; (P,).

    Args:
        image_PE, text_PE: unit embeddings, with gradient.
        slow_image_PE, slow_text_PE: those of the momentum encoders: what is contrasted against, and the teacher.
        image_queue_QE, text_queue_QE: momentum embeddings of earlier batches: further negatives.
        temperature: learnt scalar.
        alpha: weight of the teacher's similarities against the one-hot truth.
    """
    to_text = _one_way(image_PE, slow_image_PE, torch.cat([slow_text_PE, text_queue_QE]), temperature, alpha)
    to_image = _one_way(text_PE, slow_text_PE, torch.cat([slow_image_PE, image_queue_QE]), temperature, alpha)
    return (to_text + to_image) / 2


def _one_way(query_PE: Tensor, slow_PE: Tensor, keys_KE: Tensor, temperature: Tensor, alpha: float) -> Tensor:
    with torch.no_grad():
        truth_PK = torch.eye(len(query_PE), len(keys_KE), dtype=query_PE.dtype, device=query_PE.device)
        targets_PK = alpha * softmax(slow_PE @ keys_KE.T / temperature, dim=1) + (1 - alpha) * truth_PK
    return -(targets_PK * log_softmax(query_PE @ keys_KE.T / temperature, dim=1)).sum(1)


@torch.no_grad()
def hard_negatives(query_PE: Tensor, key_PE: Tensor, temperature: Tensor) -> Tensor:
    """For each query another pair's key, drawn by similarity (section 3.2); (P,) int64, P at least 2."""
    weights_PP = softmax(query_PE @ key_PE.T / temperature, dim=1)
    weights_PP = weights_PP.clamp(min=1e-12).fill_diagonal_(0)
    return torch.multinomial(weights_PP, 1)[:, 0]


def distilled_losses(logits_MV: Tensor, slow_logits_MV: Tensor, targets_M: Tensor, alpha: float) -> Tensor:
    """Cross-entropy with the truth, and with the momentum model's probabilities (eq. 7); (M,)."""
    hard_M = cross_entropy(logits_MV, targets_M, reduction="none")
    soft_M = -(softmax(slow_logits_MV, dim=1) * log_softmax(logits_MV, dim=1)).sum(1)
    return (1 - alpha) * hard_M + alpha * soft_M


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """Momentum update of every parameter: slow = momentum * slow + (1 - momentum) * fast."""
    for mine, theirs in zip(slow.parameters(), fast.parameters(), strict=True):
        mine.mul_(momentum).add_(theirs, alpha=1 - momentum)


class Queue(nn.Module):
    """The last ``size`` momentum embeddings of both sides, oldest overwritten first; random unit vectors at the start.

    An image and its text stand at the same place.
    """

    image_QE: Tensor
    text_QE: Tensor

    def __init__(self, size: int, width: int):
        super().__init__()
        for name in ("image_QE", "text_QE"):
            self.register_buffer(name, nn.functional.normalize(torch.randn(size, width), dim=1))
        self.next = 0

    @torch.no_grad()
    def push(self, image_PE: Tensor, text_PE: Tensor) -> None:
        """Put pairs in; of more than fit only the last ones."""
        size = len(self.image_QE)
        for mine, new in ((self.image_QE, image_PE), (self.text_QE, text_PE)):
            kept = new[-size:]
            places = torch.arange(self.next, self.next + len(kept), device=mine.device) % size
            mine.index_copy_(0, places, kept)
        self.next = (self.next + min(size, len(image_PE))) % size
