"""The generic road on open data, by the commands in the heads of the recipes: raw files to a metrics file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from etl.__main__ import main as etl

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LANISTR_DATA", ROOT / ".." / "shared" / "data"))
pytestmark = pytest.mark.slow


def launch(launcher: str, *arguments: str | Path) -> str:
    """One launcher in a process of its own; what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / f"{launcher}.py"), *map(str, arguments)],
        env={**environment, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=570,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def walk(recipe: str, gold: Path, runs: Path) -> dict[str, Any]:
    """Pretrain, fine-tune, evaluate; the contents of ``metrics.json``."""
    launch("pretrain", "--recipe", recipe, "--data", gold, "--run", runs / "pretrained")
    launch("finetune", "--from", runs / "pretrained", "--data", gold, "--run", runs / "tuned")
    printed = launch("evaluate", "--run", runs / "tuned", "--data", gold, "--split", "test")
    found = json.loads((runs / "tuned" / "metrics.json").read_text())
    assert f"{found['n']} samples" in printed
    return found


def test_activities_are_told_from_a_smart_watch_s_series(tmp_path: Path) -> None:
    source = DATA / "timeseries_uea"
    if not source.is_dir():
        pytest.skip(f"{source} is not there")
    halves = [str(source / f"BasicMotions_{half}.ts") for half in ("TRAIN", "TEST")]
    assert etl(["convert", *halves, "--out", str(tmp_path / "raw")]) == 0
    assert etl(["build", "uea_basic_motions", "--raw", str(tmp_path / "raw"), "--lake", str(tmp_path / "lake")]) == 0
    found = walk("uea_basic_motions", tmp_path / "lake" / "gold" / "uea_basic_motions", tmp_path / "runs")
    assert found["n"] == 30
    assert found["metrics"]["accuracy"]["value"] >= 0.9  # four activities: chance is .25


def test_the_mimic_demo_runs_through_to_a_metrics_file(tmp_path: Path) -> None:
    source = DATA / "mimic_iv_demo_2.2"
    if not source.is_dir():
        pytest.skip(f"{source} is not there")
    assert etl(["build", "mimic4_demo", "--raw", str(source), "--lake", str(tmp_path)]) == 0
    found = walk("mimic4_demo", tmp_path / "gold" / "mimic4_demo", tmp_path / "runs")
    assert (found["n"], found["labels"]) == (15, 51)  # stays: no claim about mortality can rest on so few
    assert 0 <= found["metrics"]["auroc"]["value"] <= 1
    assert [row["present"] for row in found["patterns"]] == [["tabular", "timeseries"]]
