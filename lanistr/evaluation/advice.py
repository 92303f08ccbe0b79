"""What to do about a modality, from what `importance` measured."""

from collections.abc import Mapping, Sequence
from typing import Any

ENOUGH = 0.01  # of the variance: a modality that surely explains less is not worth having
OFTEN = 0.2  # missing share from which collecting more is worth a word


def advise(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Keep, drop, or collect more; a rule and no more than that."""
    rising = still_rising(found["curve"])
    rows = []
    for row in found["shapley"]:
        low, high = row["ci95"]
        missing = found["missing"][row["modality"]]
        if low > 0 and missing >= OFTEN:
            gain = row["value"] * missing / (1 - missing)
            verdict, why = "keep, collect more", f"missing in {missing:.0%}; about {gain:+.3f} if it never were"
        elif low > 0:
            verdict, why = "keep", "its interval is above zero"
        elif high < ENOUGH:
            verdict, why = "drop", f"surely below {ENOUGH:.0%} of the variance with this encoder and these labels"
        else:
            verdict = "label more" if rising else "undecided"
            why = "its interval holds zero" + (", and the learning curve still rises" if rising else "")
        rows.append({"modality": row["modality"], "verdict": verdict, "why": why})
    return rows


def still_rising(curve: Sequence[Mapping[str, float]]) -> bool:
    """Whether the last doubling of the labels brought more than it could by chance."""
    half, full = curve[-2], curve[-1]
    return full["value"] - half["value"] > max(half["spread"], full["spread"], 0.005)
