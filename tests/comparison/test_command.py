"""`python -m lanistr compare` and `ablate` as a user runs it, on a dataset of a few random samples."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from lanistr.__main__ import main
from tests.model.support import NAMES, RECIPE
from tests.tiny_gold import write_gold

ROOT = Path(__file__).resolve().parents[2]


def lanistr(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lanistr", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """The command line sets them for its process, which here goes on."""
    loggers = [logging.getLogger(name) for name in ("lanistr", "lanistr.comparison")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tree = RECIPE.model_dump(mode="json")
    tree["pretrain"] |= {"global_batch": 8, "epochs": 1, "eval_every": None}
    tree["finetune"] |= {"global_batch": 4, "epochs": 1}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_compare_runs_resumes_and_writes_its_results(tmp_path: Path, recipe: Path) -> None:
    gold = write_gold(tmp_path / "gold", {"train": 24, "val": 9, "test": 12}, lambda i: NAMES if i % 2 else NAMES[:3])
    out = tmp_path / "out"
    shared = ["compare", str(recipe), "--data", str(gold), "--out", str(out), "--labels", "8", "--seeds", "1"]
    first = lanistr(*shared, "--methods", "trees,lanistr", "finetune.lr=1e-3")
    assert first.returncode == 0, first.stderr
    assert "2/2" in first.stderr
    result = json.loads((out / "result.json").read_text())
    assert [(row["method"], row["labels"]) for row in result["rows"]] == [("trees", "8"), ("lanistr", "8")]
    assert result["identity"]["recipe"]["finetune"]["lr"] == 1e-3
    assert (out / "table.md").read_text() == first.stdout.removesuffix("\n")
    assert not list((out / "runs").glob("*/*"))  # the weights of a finished cell are not kept
    again = lanistr(*shared, "--methods", "trees,lanistr", "finetune.lr=1e-3")
    assert again.returncode == 0, again.stderr
    assert "2 cells, 2 of them done before" in again.stderr
    assert again.stdout == first.stdout
    other = lanistr(*shared, "--methods", "trees", "finetune.lr=2e-3")
    assert other.returncode == 2
    assert "recipe.finetune.lr was 0.001, is 0.002" in other.stderr


def test_ablate_answers_for_samples_of_which_nothing_is_left(tmp_path: Path, recipe: Path) -> None:
    gold = write_gold(tmp_path / "gold", {"train": 24, "val": 9, "test": 12}, lambda i: NAMES if i % 3 else ["image"])
    out = tmp_path / "out"
    shared = ["ablate", str(recipe), "--data", str(gold), "--out", str(out), "--labels", "8", "--seeds", "1"]
    done = lanistr(*shared, "--arms", "full,without_image,without_mmm,unlabelled_50,unlabelled_0")
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "result.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["full", "without_image", "without_mmm", "unlabelled_50", "unlabelled_0"]
    steps = {
        arm: json.loads((out / "runs" / arm / "pretrain-0" / "summary.json").read_text())["steps"]
        for arm in ("full", "unlabelled_50")
    }
    assert steps == {"full": 3, "unlabelled_50": 1}
    assert not (out / "runs" / "unlabelled_0" / "pretrain-0").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "trees,forest"], "method 'forest': known are majority"),
        (["--metric", "auc"], "metric 'auc'"),
        (["--labels", "100"], "100 labels asked for"),
    ],
)
def test_a_users_mistake_is_one_line(
    tmp_path: Path, recipe: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gold = write_gold(tmp_path / "gold", {"train": 6, "val": 3, "test": 3}, lambda i: NAMES)
    shared = ["compare", str(recipe), "--data", str(gold), "--out", str(tmp_path / "out")]
    assert main([*shared, *arguments]) == 2
    assert message in capsys.readouterr().err
