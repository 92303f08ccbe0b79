import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanistr.training.engine import StepResult
from lanistr.training.guard import Guard, SpikeWatch
from tests.model.support import NAMES
from tests.ranks import finish, launch
from tests.tiny_gold import write_gold

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


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=17, max_size=100), st.integers(-9, 9))
def test_a_spike_lies_above_the_median_whatever_the_unit_of_the_loss(losses: list[float], power: int) -> None:
    watch, scaled = SpikeWatch(), SpikeWatch()
    for loss in losses:
        usual = [*watch.recent]
        spike = watch.is_spike(loss)
        assert scaled.is_spike(loss * 2.0**power) == spike
        assert not spike or loss > statistics.median(usual)


@pytest.mark.dist
def test_on_two_ranks_no_step_that_is_not_finite_is_taken_what_differs_is_named_and_batch_norm_merged(
    tmp_path: Path,
) -> None:
    gold = write_gold(tmp_path / "gold", {"train": 40}, lambda _: NAMES)
    (tmp_path / "zero0.json").write_text("{}")
    cases = [
        {"stage": stage, "precision": precision, "micro": None, "gold": str(gold)}
        for stage, precision in (("0", "float32"), ("1", "float32"), ("2", "float32"), ("2", "bfloat16"))
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    worker = str(Path(__file__).with_name("guard_worker.py"))
    finish(launch(2, [worker, str(tmp_path / "cases.json"), str(tmp_path / "out.json")]))
    *reports, merged = json.loads((tmp_path / "out.json").read_text())
    # Weighted by the rows that each rank has seen: (3 * 1 + 9 * 11) / 12 and (3 * 2 + 9 * 22) / 12.
    assert merged["merged"] == [[[8.5, 8.5], [17.0, 17.0], 0, [7.0, 7.0]]] * 2
    for case, report in zip(cases, reports, strict=True):
        assert report["steps"] == [[[False, False], [True, True], [False, False]]] * 2, case
        for said in report["said"]:
            assert f"after step 3: parameters differ between ranks; the first is {report['name']}" in said, case
