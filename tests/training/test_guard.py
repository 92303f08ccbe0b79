import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanistr.training.engine import StepResult
from lanistr.training.guard import Guard, SpikeWatch

BATCHES = cast(Any, [SimpleNamespace(keys=("a", "b")), SimpleNamespace(keys=("c",))])


def bad() -> StepResult:
    return StepResult({"mlm": 1.0}, 1.0, math.inf, skipped=True)


def good(loss: float = 1.0) -> StepResult:
    return StepResult({"mlm": loss}, loss, 1.0)


def test_a_gradient_that_is_not_finite_stops_although_the_loss_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step 6: loss 1\.0, gradient norm inf"):
        Guard(tmp_path, "stop").check(5, bad(), BATCHES)
    row = json.loads((tmp_path / "incidents" / "rank-0.jsonl").read_text())
    assert row["keys"] == ["a", "b", "c"]


def test_skipping_gives_up_after_ten_in_a_row_and_not_before(tmp_path: Path) -> None:
    guard = Guard(tmp_path, "skip")
    for step in range(9):
        guard.check(step, bad(), BATCHES)
    guard.check(9, good(), BATCHES)
    for step in range(10, 19):
        guard.check(step, bad(), BATCHES)
    with pytest.raises(ValueError, match="as the 9 before"):
        guard.check(19, bad(), BATCHES)


def test_a_spike_is_written_down_with_its_samples_and_a_falling_loss_is_none(tmp_path: Path) -> None:
    guard = Guard(tmp_path, "stop")
    losses = [10 * 0.98**step + 0.1 * math.sin(step) for step in range(60)]
    losses[40] = 30.0
    for step, loss in enumerate(losses):
        guard.check(step, good(loss), BATCHES)
    rows = [json.loads(line) for line in (tmp_path / "incidents" / "rank-0.jsonl").read_text().splitlines()]
    assert [(row["step"], row["what"]) for row in rows] == [(41, "spike")]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_no_loss_within_the_usual_range_is_a_spike(losses: list[float], scale: float, shift: float) -> None:
    watch = SpikeWatch()
    for loss in losses:
        usual = [*watch.recent]
        spike = watch.is_spike(loss)
        assert not (spike and loss <= max(usual))
