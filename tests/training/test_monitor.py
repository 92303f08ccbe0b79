"""Guards what an operator is told about waiting for data."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from lanistr.batch import Loading
from lanistr.config import OptimizerConfig
from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import Fetched
from lanistr.training.data_watch import DataWatch
from lanistr.training.engine import StepResult
from lanistr.training.health import Health
from lanistr.training.loop import train
from lanistr.training.shards import Shards
from tests.model.support import NAMES, make_modalities
from tests.tiny_gold import write_gold


class Engine:
    """Steps that take a fixed time."""

    device = torch.device("cpu")
    module = torch.nn.Linear(1, 1)
    layout: ClassVar = {"ranks": 1}
    updates = 0

    def track(self, step: int, figures: Any) -> None: ...

    def train_step(self, micro_batches: Any, lr: float, before_update: Any) -> StepResult:
        time.sleep(0.02)
        return StepResult({"mlm": 1.0}, 1.0, 1.0)

    def save(self, folder: Path) -> Shards:
        return Shards()

    def full_weights(self) -> dict[str, torch.Tensor]:
        return {"w": torch.zeros(1)}

    def full_moments(self) -> dict[str, torch.Tensor]:
        return {}

    def buffers(self) -> dict[str, torch.Tensor]:
        return {}

    def set_buffers(self, values: dict[str, torch.Tensor]) -> None:
        assert not values


class SlowDataset(GoldDataset):
    def fetch(self, position: int) -> Fetched:
        time.sleep(0.02)
        return super().fetch(position)


def make_loader(dataset: GoldDataset, global_batch: int) -> TrainLoader:
    collator = Collator(dataset.modalities, views=1, seed=0)
    return TrainLoader(
        dataset, collator, global_batch=global_batch, micro_batch=None, ranks=1, rank=0, seed=0, grouping="mixed"
    )


def test_a_loader_made_slow_on_purpose_shows_up_within_20_steps_with_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modalities = {"tabular": make_modalities()["tabular"]}
    dataset = SlowDataset(write_gold(tmp_path / "gold", {"train": 40}, lambda _: NAMES), "train", modalities)
    loader = make_loader(dataset, 2)
    config = OptimizerConfig(global_batch=2, epochs=1, max_steps=20, log_every=20, health_every=None)
    (tmp_path / "run").mkdir()
    train(Engine(), loader, config, tmp_path / "run", resuming=False)  # type: ignore[arg-type]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "bottleneck" in line]
    assert line.startswith("step 11/20  data is the bottleneck: ")
    assert "reading and decoding" in line
    assert "try data.workers=2 (now 0" in line
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["data_wait"] > 0.3


def run(watch: DataWatch, steps: int, step_s: float, waited: float, now: list[float]) -> list[str]:
    said = []
    for _ in range(steps):
        now[0] += step_s
        advice = watch.note(waited, [Loading(0.0, 0.3, 0.1)])
        said += [advice] if advice else []
    return said


def test_start_up_and_short_waits_are_no_reason_for_advice_and_it_is_not_repeated() -> None:
    now = [0.0]
    watch = DataWatch(0, clock=lambda: now[0])
    assert not run(watch, 1, 30.0, 29.0, now)
    assert not run(watch, 50, 1.0, 0.05, now)
    assert len(run(watch, 400, 1.0, 0.5, now)) == 1
    assert len(run(watch, 1000, 1.0, 0.5, now)) == 1


def test_where_all_cores_load_more_workers_are_not_the_advice() -> None:
    now = [0.0]
    watch = DataWatch(10_000, clock=lambda: now[0])
    (advice,) = run(watch, 12, 1.0, 0.5, now)
    assert "50% of the last 10 steps waited for it" in advice
    assert "300 ms reading and decoding" in advice
    assert "faster disk" in advice


@pytest.mark.parametrize("pretraining", [True, False])
def test_a_collapse_is_an_alarm_in_pretraining_only_and_logged_in_fine_tuning_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pretraining: bool
) -> None:
    ranks = iter([12.0, 1.0, 1.0, 1.0])
    figures = {"health_samples": 32.0, "std/fused": 0.1, "spread/fused": 0.5}
    monkeypatch.setattr(Health, "begin", lambda self, step: None)
    monkeypatch.setattr(Health, "end", lambda self: {**figures, "rank/fused": next(ranks)})
    modalities = {"tabular": make_modalities()["tabular"]}
    dataset = GoldDataset(write_gold(tmp_path / "gold", {"train": 16}, lambda _: NAMES), "train", modalities)
    loader = make_loader(dataset, 4)
    config = OptimizerConfig(global_batch=4, epochs=1, max_steps=4, log_every=1)
    run = tmp_path / "run"
    run.mkdir()
    train(Engine(), loader, config, run, resuming=False, watch_collapse=pretraining)  # type: ignore[arg-type]
    assert capsys.readouterr().err.count("embeddings collapse: fused") == int(pretraining)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["rank/fused"] for row in rows] == [12.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("signalled", [False, True])
def test_a_run_is_finished_only_where_no_signal_ended_it(tmp_path: Path, signalled: bool) -> None:
    modalities = {"tabular": make_modalities()["tabular"]}
    dataset = GoldDataset(write_gold(tmp_path / "gold", {"train": 16}, lambda _: NAMES), "train", modalities)
    loader = make_loader(dataset, 4)
    config = OptimizerConfig(global_batch=4, epochs=1, max_steps=4, log_every=1, health_every=None)
    run = tmp_path / "run"
    run.mkdir()

    class SignalAtStep2:
        def begin(self, step: int) -> None: ...

        def score(self, step: int) -> None: ...

        def after_step(self, step: int) -> bool:
            if signalled and step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return False

    assert train(Engine(), loader, config, run, resuming=False, validation=SignalAtStep2()) is not signalled  # type: ignore[arg-type]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == (2 if signalled else 4)
