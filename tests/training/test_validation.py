"""Validation of pretraining against a loop over single samples."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lanistr.config import PretrainConfig
from lanistr.data.loader import Collator
from lanistr.data.reader import GoldDataset
from lanistr.training.validation import Validator
from tests.model.support import NAMES, RECIPE, make_modalities, make_pretrain
from tests.tiny_gold import write_gold


def make(folder: Path, **config: Any) -> tuple[Validator, Any]:
    gold = write_gold(
        folder / "gold",
        {"train": 8, "val": 40, "test": 4},
        lambda i: [n for b, n in enumerate(NAMES) if (i + 1) >> b & 1],
    )
    modalities = make_modalities()
    task = make_pretrain(modalities)
    engine = cast(Any, SimpleNamespace(module=task, weights=task.weights, device=torch.device("cpu")))
    val = GoldDataset(gold, "val", modalities)
    collator = Collator(modalities, views=2, seed=3)
    return Validator(engine, val, collator, PretrainConfig(**config), folder, total=10), task


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def test_terms_are_means_over_the_held_out_samples(tmp_path: Path) -> None:
    validator, task = make(tmp_path, eval_samples=37)
    found = validator.measure(5)
    sums, counts = dict.fromkeys(task.weights, 0.0), dict.fromkeys(task.weights, 0.0)
    task.eval()
    for i in range(37):
        batch = validator.collator([validator.val.read(i)], [1.0], 0)
        with torch.no_grad():
            for name, total in task(batch).items():
                sums[name] += float(total)
                counts[name] += batch.counts[name]
    assert RECIPE.objective.decorrelation == 0, "a term of batch statistics has no mean over samples"
    for name in task.weights:
        assert found[name] == pytest.approx(sums[name] / counts[name], rel=1e-4), name
    assert rows(tmp_path) == [{"step": 5, "samples": 37, **found}]


def test_the_line_of_step_0_says_why_a_term_may_be_huge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="lanistr")
    validator, _ = make(tmp_path, eval_every=4)
    validator.begin(0)
    validator.after_step(4)
    assert ["before training" in line for line in caplog.messages] == [True, False]


def test_measures_first_last_and_between_and_leaves_training_mode_and_weights_alone(tmp_path: Path) -> None:
    validator, task = make(tmp_path, eval_every=4)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.train()
    validator.begin(0)
    assert not any(validator.after_step(step) for step in range(1, 11))
    assert [row["step"] for row in rows(tmp_path)] == [0, 4, 8, 10]
    assert len({json.dumps({**row, "step": 0}) for row in rows(tmp_path)}) == 1, "same weights, same masks, same terms"
    assert task.training
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_a_resumed_run_repeats_no_row(tmp_path: Path) -> None:
    validator, _ = make(tmp_path, eval_every=4)
    for step in (0, 4, 8):
        validator.measure(step)
    validator.begin(6)
    validator.after_step(8)
    assert [row["step"] for row in rows(tmp_path)] == [0, 4, 8]
