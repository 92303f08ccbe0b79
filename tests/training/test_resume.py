"""Any kill, nothing lost: a run killed with SIGKILL and resumed equals one that never stopped, bitwise."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lanistr.training.checkpoint import find_latest, load_weights
from tests.model.support import NAMES, RECIPE
from tests.ranks import finish, launch
from tests.tiny_gold import write_gold

ROOT = Path(__file__).resolve().parents[2]
STEPS = 14


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def present(i: int) -> list[str]:
        return [name for bit, name in enumerate(NAMES) if (i * 5 + 6) >> bit & 1]

    return write_gold(tmp_path_factory.mktemp("gold"), {"train": 40, "val": 12, "test": 12}, present)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = RECIPE.model_dump(mode="json")
    tree["model"]["modalities"]["tabular"]["norm"] = "batch"
    tree["pretrain"] |= {
        "global_batch": 8,
        "max_steps": STEPS,
        "epochs": 20,
        "save_every": 4,
        "eval_every": 4,
        "log_every": 1,
        "lr": 1e-2,
        "on_nonfinite": "skip",  # batch norm over two equal rows makes gradients explode
    }
    tree["finetune"] |= {"global_batch": 8, "epochs": 3, "log_every": 1, "dropout": 0.1, "hidden": 8}
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def arguments(launcher: str, recipe: Path, gold: Path, run: Path, *more: str) -> list[str]:
    ds = ROOT / "ds_configs" / "zero2.json"
    common = ["--deepspeed", str(ds), "--recipe", str(recipe), "--data", str(gold), "--run", str(run)]
    return [str(ROOT / "launchers" / f"{launcher}.py"), *common, *more]


def rows(run: Path) -> list[dict]:
    timing = {"samples_per_s", "tokens_per_s", "data_wait", "memory_mib", "seconds"}
    timing |= {"useful_tflops", "utilisation", "health_cost"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


@pytest.mark.dist
def test_killed_and_resumed_equals_never_stopped_bitwise(recipe: Path, gold: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(launch(2, arguments("pretrain", recipe, gold, whole)))
    slow = launch(2, arguments("pretrain", recipe, gold, broken))
    while not (broken / "metrics.jsonl").is_file() or len((broken / "metrics.jsonl").read_text().splitlines()) < 6:
        assert all(process.poll() is None for process in slow), slow[0].communicate()[0]
        time.sleep(0.02)
    for process in slow:
        process.kill()
    for process in slow:
        process.communicate()
    latest = find_latest(broken)
    assert latest is not None
    assert latest.step < STEPS, "the kill came too late to test anything"
    finish(launch(2, arguments("pretrain", recipe, gold, broken, "--resume", "auto")))

    assert rows(broken) == rows(whole)
    assert all(row["samples"] == 8 for row in rows(whole)), "of both ranks"
    validated = [(run / "validation.jsonl").read_text() for run in (whole, broken)]
    assert validated[0] == validated[1]
    assert [json.loads(line)["step"] for line in validated[0].splitlines()] == [0, 4, 8, 12, STEPS]
    best = json.loads((whole / "summary.json").read_text())["best"]["step"]
    kept = {int(folder.name.removeprefix("step-")) for folder in (whole / "checkpoints").glob("step-*")}
    assert kept == {12, STEPS, best}, "the last two and the one that validated best"
    ends = [find_latest(run) for run in (whole, broken)]
    weights = [load_file(str(end.folder / "weights.safetensors")) for end in ends if end]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    other = arguments("pretrain", recipe, gold, broken, "--resume", "auto", "pretrain.lr=1e-3", "pretrain.log_every=3")
    (output,) = [p.communicate()[0] for p in launch(1, other)]
    assert "error: " in output
    assert "pretrain.lr was 0.01, is 0.001; --resume force" in output
    assert "Traceback" not in output


@pytest.mark.dist
def test_finetuning_freezes_encoders_and_writes_metrics(recipe: Path, gold: Path, tmp_path: Path) -> None:
    pre, tuned = tmp_path / "pre", tmp_path / "tuned"
    finish(launch(1, arguments("pretrain", recipe, gold, pre, "pretrain.max_steps=3")))
    output = finish(launch(1, arguments("finetune", recipe, gold, tuned, "--from", str(pre), "--labels", "16")))[0]
    assert "new: classifier" in output
    before, after = find_latest(pre), find_latest(tuned)
    assert before is not None
    assert after is not None
    start, end = (load_file(str(c.folder / "weights.safetensors")) for c in (before, after))
    frozen = [n for n in end if n.startswith("model.encoders.") and ".encoder." in n.removeprefix("model.encoders.")]
    trained = [n for n in end if n.startswith("model.fusion.")]
    assert frozen
    assert all(torch.equal(start[n], end[n]) for n in frozen)
    assert any(not torch.equal(start[n], end[n]) for n in trained)
    evaluate = [str(ROOT / "launchers" / "evaluate.py"), "--run", str(tuned), "--data", str(gold), "--split", "test"]
    finish(launch(1, evaluate))
    result = json.loads((tuned / "metrics.json").read_text())
    assert result["n"] == 12
    assert set(result["metrics"]) >= {"accuracy", "macro_f1", "auroc"}
    low, high = result["metrics"]["accuracy"]["ci95"]
    assert low <= result["metrics"]["accuracy"]["value"] <= high


@pytest.mark.dist
def test_a_regression_is_tuned_with_frozen_parts_and_evaluated(recipe: Path, tmp_path: Path) -> None:
    gold = write_gold(
        tmp_path / "gold",
        {"train": 40, "val": 12, "test": 12},
        lambda i: ["text", "tabular"] if i % 2 else ["tabular"],
        targets=lambda i: [1000.0 + i, float("nan") if i % 3 else -i],
        target="regression",
    )
    pre, tuned = tmp_path / "pre", tmp_path / "tuned"
    finish(launch(1, arguments("pretrain", recipe, gold, pre, "pretrain.max_steps=2")))
    more = ["--from", str(pre), "--freeze", "text,image,timeseries", "finetune.metric=mae", "finetune.patience=2"]
    output = finish(launch(1, arguments("finetune", recipe, gold, tuned, *more)))[0]
    assert "validation mae" in output
    finish(launch(1, [str(ROOT / "launchers" / "evaluate.py"), "--run", str(tuned), "--data", str(gold)]))
    result = json.loads((tuned / "metrics.json").read_text())
    assert result["metrics"]["mae"]["value"] < 500, "in the target's own unit"
    assert [row["n"] for row in result["patterns"]] == [6, 6]
    with np.load(tuned / "predictions-test.npz") as found:
        assert found["outputs"].shape == found["truth"].shape == (12, 2)
    assert json.loads((tuned / "summary.json").read_text())["metric"] == "mae"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["pretrain.learning_rate=1"], "unknown key 'pretrain.learning_rate'"),
        (["pretrain.global_batch=64"], "lower global_batch"),
        (["--data", "nowhere"], "no manifest.json"),
        (["--deepspeed", "nowhere.json"], "no such file"),
        (["model.attention=flash_attn"], "flash_attn needs CUDA"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    recipe: Path, gold: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    (process,) = launch(1, arguments("pretrain", recipe, gold, tmp_path / "run", *more))
    output = process.communicate()[0]
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert message in next(line for line in output.splitlines() if line.startswith("error: "))
    assert not (tmp_path / "run").exists()


def test_an_unfinished_checkpoint_is_never_found(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-00000009").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000008").mkdir()
    good = tmp_path / "checkpoints" / "step-00000004"
    good.mkdir()
    (good / "meta.json").write_text(json.dumps({"step": 4}))
    found = find_latest(tmp_path)
    assert found is not None
    assert found.step == 4


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3, 2)}, str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2\), the model \(4, 2\)"):
        load_weights(torch.nn.Linear(2, 4), tmp_path / "w.safetensors")
