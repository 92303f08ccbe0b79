"""Which parameters decay, and which learn more slowly."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def parameter_groups(
    module: nn.Module, weight_decay: float, lr_shares: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters: matrices decay; biases, norms, embeddings and tokens do not.

    Args:
        module: the task.
        weight_decay: of those that decay.
        lr_shares: prefix of parameter names -> their learning rate as a share of the run's.
    """
    no_decay = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            plain = p.ndim < 2 or id(p) in no_decay or name.endswith(("positions", "cls", "embeddings", "cls_token"))
            share = next((own for prefix, own in (lr_shares or {}).items() if name.startswith(prefix)), 1.0)
            groups.setdefault((0.0 if plain else weight_decay, share), []).append(p)
    return [
        {"params": groups[key], "weight_decay": key[0], "lr_share": key[1]}
        for key in sorted(groups, key=lambda key: (-key[1], -key[0]))
    ]
