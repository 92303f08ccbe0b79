"""Which checkpoints stay."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Saved:
    """What the policy needs to know of a checkpoint.

    Attributes:
        step: steps done.
        time: of saving, in seconds.
        score: on validation, more is better; None = not measured after this step.
    """

    step: int
    time: float
    score: float | None = None


def surplus(saved: Sequence[Saved], keep: int, keep_best: bool, keep_hours: float | None) -> list[int]:
    """Steps of the checkpoints that may go.

    Args:
        saved: complete checkpoints.
        keep: that many of the newest stay; at least 1.
        keep_best: the best score stays (the earliest of equals).
        keep_hours: one per so many hours stays: the first, and each that is so much younger than the one kept before.
    """
    ordered = sorted(saved, key=lambda s: s.step)
    stay = {s.step for s in ordered[-keep:]}
    scored = [s for s in ordered if s.score is not None]
    if keep_best and scored:
        stay.add(max(scored, key=lambda s: (s.score, -s.step)).step)
    if keep_hours:
        last = float("-inf")
        for s in ordered:
            if s.time - last >= keep_hours * 3600:
                stay.add(s.step)
                last = s.time
    return [s.step for s in ordered if s.step not in stay]
