"""The best weights by the chosen metric, and a resume that goes on counting."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lanistr.config import FinetuneConfig
from lanistr.data.reader import GoldDataset
from lanistr.training import best
from lanistr.training.best import BestKeeper
from tests.model.support import make_modalities
from tests.tiny_gold import write_gold


class FakeEngine:
    device = torch.device("cpu")
    module = torch.nn.Linear(1, 1)
    step = 0

    def full_weights(self) -> dict[str, torch.Tensor]:
        return {"step": torch.tensor([float(self.step)])}


@pytest.fixture
def val(tmp_path: Path) -> GoldDataset:
    gold = write_gold(
        tmp_path / "gold", {"val": 6}, lambda i: ["text"], targets=lambda i: [float(i)], target="regression"
    )
    return GoldDataset(gold, "val", make_modalities())


def run_epochs(
    keeper: BestKeeper, errors: list[float], start: int, monkeypatch: pytest.MonkeyPatch, per_epoch: int = 2
) -> list[int]:
    """Validate with these mean absolute errors; returns the steps done."""
    engine: Any = keeper.engine
    keeper.begin(start)
    done = []
    for step in range(start + 1, per_epoch * len(errors) + 1):
        engine.step = step
        truth = keeper.val.target[keeper.positions]
        error = errors[step // per_epoch - 1]
        monkeypatch.setattr(best, "predict", lambda *_, e=error, t=truth: (t + e, t))
        done.append(step)
        if keeper.after_step(step):
            break
    return done


def make(val: GoldDataset, run: Path, **config: Any) -> BestKeeper:
    engine: Any = FakeEngine()
    return BestKeeper(engine, val, FinetuneConfig(**config), 2, run)


def saved_step(run: Path) -> int:
    return json.loads((run / "best" / "best.json").read_text())["step"]


def test_the_smallest_error_is_kept_and_patience_ends_the_run(
    val: GoldDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = make(val, tmp_path / "run", metric="mae", patience=2)
    assert run_epochs(keeper, [3.0, 1.0, 2.0, 1.0, 0.5], 0, monkeypatch)[-1] == 8
    assert saved_step(tmp_path / "run") == 4, "the first of equally good ones"
    rows = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([row["mae"] for row in rows], [3, 1, 2, 1])
    assert keeper.score(8) == pytest.approx(-1.0)
    assert keeper.score(7) is None


@pytest.mark.parametrize("resumed_at", [2, 3, 5, 6])
def test_a_resumed_run_stops_where_the_undisturbed_one_does(
    val: GoldDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed_at: int
) -> None:
    errors, config = [3.0, 1.0, 2.0, 1.5, 0.5], {"metric": "rmse", "patience": 2}
    whole = run_epochs(make(val, tmp_path / "a", **config), errors, 0, monkeypatch)
    run_epochs(make(val, tmp_path / "b", **config), errors[:3], 0, monkeypatch)
    again = run_epochs(make(val, tmp_path / "b", **config), errors, resumed_at, monkeypatch)
    assert again[-1] == whole[-1]
    assert saved_step(tmp_path / "a") == saved_step(tmp_path / "b")
    assert (tmp_path / "a" / "validation.jsonl").read_text() == (tmp_path / "b" / "validation.jsonl").read_text()


def test_a_metric_of_another_target_is_refused(val: GoldDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for a regression target there are mae"):
        make(val, tmp_path, metric="accuracy")
