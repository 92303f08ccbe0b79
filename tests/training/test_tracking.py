"""TensorBoard, CSV and W&B through DeepSpeed's monitor."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from lanistr.training import tracking
from lanistr.training.tracking import fill_trackers
from tests.model.support import NAMES, RECIPE
from tests.ranks import finish, launch
from tests.tiny_gold import write_gold

ROOT = Path(__file__).resolve().parents[2]


def test_logs_go_into_the_run_folder_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    monkeypatch.delenv("WANDB_NAME", raising=False)
    config = {
        "tensorboard": {"enabled": True},
        "csv_monitor": {"enabled": True, "output_path": "logs", "job_name": "mine"},
        "wandb": {"enabled": True, "team": "us"},
    }
    fill_trackers(config, Path("ds.json"), Path("runs/a"))
    assert config["tensorboard"] == {"enabled": True, "output_path": "runs/a", "job_name": "tensorboard"}
    assert config["csv_monitor"] == {"enabled": True, "output_path": "logs", "job_name": "mine"}
    assert config["wandb"] == {"enabled": True, "team": "us", "project": "lanistr"}


def test_a_missing_package_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ds\.json: wandb is enabled .* pip install 'lanistr\[track\]'"):
        fill_trackers({"wandb": {"enabled": True}}, Path("ds.json"), Path("run"))
    fill_trackers({"wandb": {"enabled": False}, "csv_monitor": {"enabled": True}}, Path("ds.json"), Path("run"))
    with pytest.raises(ValueError, match="comet is not supported"):
        fill_trackers({"comet": {"enabled": True}}, Path("ds.json"), Path("run"))


@pytest.mark.dist
def test_every_tracker_that_is_installed_holds_the_rows_of_metrics_jsonl(tmp_path: Path) -> None:
    with_tensorboard, with_wandb = (importlib.util.find_spec(name) is not None for name in ("tensorboard", "wandb"))
    gold = write_gold(tmp_path / "gold", {"train": 40, "val": 8, "test": 4}, lambda _: NAMES)
    tree = RECIPE.model_dump(mode="json")
    tree["pretrain"] |= {"global_batch": 8, "max_steps": 4, "log_every": 2, "health_every": 2, "eval_every": None}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    config = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    config |= {"csv_monitor": {"enabled": True}, "tensorboard": {"enabled": with_tensorboard}}
    config["wandb"] = {"enabled": with_wandb}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    run = tmp_path / "run"
    given = ["--deepspeed", tmp_path / "ds.json", "--recipe", tmp_path / "tiny.yaml", "--data", gold, "--run", run]
    finish(launch(1, [str(ROOT / "launchers" / "pretrain.py"), *map(str, given)], {"WANDB_MODE": "offline"}))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    for name in ("loss", "mlm", "grad_norm/text", "present/image"):
        with (run / "csv_monitor" / f"{name.replace('/', '_')}.csv").open() as file:
            lines = list(csv.reader(file))[1:]
        assert [(int(step), float(value)) for step, value in lines] == [
            (r["step"], pytest.approx(r[name])) for r in rows
        ]
    written = {path.stem for path in (run / "csv_monitor").iterdir()}
    assert not [name for name in written if name.startswith("Train_")], "DeepSpeed's own figures are of one rank"
    if with_tensorboard:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        scalars = [(event.step, event.value) for event in events.Scalars("loss")]
        assert scalars == [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in rows]
    if with_wandb:
        (written_offline,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
        log = written_offline.read_bytes()
        assert all(json.dumps(row["loss"]).encode() in log and b"grad_norm/text" in log for row in rows)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["task"], summary["steps"], summary["samples"]) == ("pretrain", 4, 32)
