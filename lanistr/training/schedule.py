"""The learning rate: a pure function of the step."""

import math


def lr_at(step: int, total_steps: int, lr: float, warmup: float, final_lr: float) -> float:
    """Learning rate of update ``step`` (0-based).

    Linear warm-up over the first ``warmup * total_steps`` updates (the first update has a positive rate, the last of
    the warm-up the full one), then a cosine that reaches ``final_lr * lr`` after the last update.

    Args:
        step: in [0, total_steps).
        total_steps: of the run.
        lr: peak.
        warmup: share of the steps.
        final_lr: share of the peak.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lr * (final_lr + (1 - final_lr) * (1 + math.cos(math.pi * progress)) / 2)
