"""A run in a few numbers, also one that was resumed."""

import json
from pathlib import Path
from typing import Any

import pytest

from lanistr.training.monitor import cut_back
from lanistr.training.summary import best_validation, summarise, write_summary


def row(step: int, seconds: float = 2.0, **more: Any) -> dict[str, Any]:
    terms = {"mlm": 5.0 - step / 10, "mim": None}
    rates = {"samples": 8, "seconds": seconds, "samples_per_s": 8 / seconds, "tokens_per_s": 80 / seconds}
    return {
        "step": step,
        "loss": 5.0,
        **terms,
        "lr": 1e-3,
        **rates,
        "data_wait": 0.1,
        "memory_mib": 100.0 + step,
        **more,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_sums_medians_and_peaks(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [row(1, 10.0, data_wait=0.7), row(2), row(3, utilisation=0.4)])
    found = summarise(tmp_path)
    assert (found["steps"], found["samples"], found["wall_s"]) == (3, 24, 14.0)
    assert found["samples_per_s"] == 4.0, "the slow start does not count"
    assert found["data_wait"] == pytest.approx((7 + 0.2 + 0.2) / 14)
    assert found["memory_mib"] == 103.0
    assert found["utilisation"] == 0.4
    assert found["terms"] == {"mlm": 4.7, "mim": None}


def test_steps_that_were_done_twice_count_once(tmp_path: Path) -> None:
    whole = [row(step) for step in range(1, 7)]
    path = tmp_path / "metrics.jsonl"
    write(path, whole[:5])  # killed after step 5, the checkpoint is of step 4
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    cut_back(path, 4)
    with path.open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in whole[4:])
    resumed = summarise(tmp_path)
    write(path, whole)
    assert resumed == summarise(tmp_path)
    assert resumed["samples"] == 48


def test_best_validation_is_of_the_weighted_sum_and_not_of_the_start(tmp_path: Path) -> None:
    terms = [(0, 0.1, 0.1), (5, 1.0, 3.0), (10, 2.0, 0.5)]
    write(tmp_path / "validation.jsonl", [{"step": s, "mlm": a, "mim": b} for s, a, b in terms])
    found = best_validation(tmp_path, {"mlm": 1.0, "mim": 0.1, "mtm": 1.0})
    assert found is not None
    assert (found["step"], found["loss"]) == (5, pytest.approx(1.3))
    assert best_validation(tmp_path / "nowhere", {}) is None


def test_what_the_task_says_wins_and_an_empty_run_has_a_summary(tmp_path: Path) -> None:
    write_summary(tmp_path, {"task": "pretrain", "steps": 0, "best": None})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"task": "pretrain", "steps": 0, "best": None}
