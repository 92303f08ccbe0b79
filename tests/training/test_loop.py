"""The loop with an engine that only reports."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from lanistr.config import OptimizerConfig
from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.reader import GoldDataset
from lanistr.training.engine import StepResult
from lanistr.training.loop import train
from tests.model.support import NAMES, make_modalities
from tests.tiny_gold import write_gold


class ReportingEngine:
    """Its loss is not a number at step ``bad``."""

    def __init__(self, bad: int):
        self.device, self.module = torch.device("cpu"), torch.nn.Linear(1, 1)
        self.bad, self.seen = bad, []

    def track(self, step: int, figures: Any) -> None: ...

    def train_step(self, micro_batches: list[Any], lr: float, before_update: Any) -> StepResult:
        self.seen.append([key for batch in micro_batches for key in batch.keys])
        loss = float("nan") if len(self.seen) == self.bad + 1 else 1.0
        return StepResult({"mlm": loss}, loss, 1.0)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_samples(tmp_path: Path) -> None:
    gold = write_gold(tmp_path / "gold", {"train": 32, "val": 4, "test": 4}, lambda _: NAMES)
    modalities = make_modalities()
    loader = TrainLoader(
        GoldDataset(gold, "train", modalities),
        Collator(modalities, views=2, seed=0),
        global_batch=8,
        micro_batch=4,
        ranks=1,
        rank=0,
        seed=0,
        grouping="mixed",
    )
    engine = ReportingEngine(bad=2)
    config = OptimizerConfig(global_batch=8, max_steps=4, save_every=100, log_every=1, health_every=None)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match=r"step 3: loss nan.*on_nonfinite=skip"):
        train(cast(Any, engine), loader, config, run, resuming=False)
    assert len(engine.seen) == 3
    (incident,) = [json.loads(line) for line in (run / "incidents" / "rank-0.jsonl").read_text().splitlines()]
    assert incident["keys"] == engine.seen[2]
    assert incident["step"] == 3
    assert (run / "metrics.jsonl").read_text().count("\n") == 2, "the bad step is not reported as trained"
