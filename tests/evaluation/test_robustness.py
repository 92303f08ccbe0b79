"""The robustness card against brute force: datasets written without what is hidden."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lanistr.__main__ import main
from lanistr.config import Recipe
from lanistr.data.hiding import HidingDataset
from lanistr.data.reader import GoldDataset
from lanistr.evaluation.evaluate import evaluate_run, load_tuned
from lanistr.evaluation.robustness import curve, measure_robustness
from lanistr.manifest import Manifest
from lanistr.metrics import accuracy
from lanistr.training import finetune
from lanistr.training.best import predict
from lanistr.training.checkpoint import WEIGHTS, named_tensors, save_weights
from lanistr.training.finetune import make_task
from tests.model.support import NAMES, recipe_with
from tests.tiny_gold import write_gold

N = 48


def present(i: int) -> list[str]:
    return [name for bit, name in enumerate(NAMES) if (i % 16) >> bit & 1] or ["text"]


def write_tuned(run: Path, gold: Path, recipe: Recipe, seed: int = 0) -> Path:
    """Random weights that tell samples apart, as a finished fine-tuning run."""
    manifest = Manifest.load(gold)
    task = make_task(recipe, manifest, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    save_weights(run / "best" / WEIGHTS, {n: t.detach().clone() for n, t in named_tensors(task).items()})
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    identity = {"task": "finetune", "labels": manifest.labels, "dataset": manifest.name, "n_labels": 8, "from": None}
    (run / "run.json").write_text(json.dumps({**identity, "content_id": manifest.content_id}))
    return run


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gold(tmp_path_factory.mktemp("robust") / "gold", {"train": 16, "val": 6, "test": N}, present)


@pytest.fixture(scope="module")
def run(gold: Path) -> Path:
    return write_tuned(gold.parent / "tuned", gold, recipe_with(finetune__pooling="modalities"))


def outputs_on(run: Path, gold: Path) -> np.ndarray:
    tuned = load_tuned(run, gold, "test")
    return predict(tuned.task, tuned.dataset, tuned.dataset.labelled(None, 0), tuned.device)[0]


def outputs_hiding(run: Path, gold: Path, hidden: Sequence[str], rate: float) -> np.ndarray:
    tuned = load_tuned(run, gold, "test")
    dataset = HidingDataset(tuned.dataset, dict.fromkeys(hidden, rate), 0)
    return predict(tuned.task, dataset, dataset.labelled(None, 0), tuned.device)[0]


@pytest.mark.parametrize("hidden", [["text"], ["image"], ["tabular"], ["timeseries"], list(NAMES)], ids="+".join)
def test_hiding_all_of_it_equals_evaluating_a_dataset_that_never_had_it(
    run: Path, gold: Path, tmp_path: Path, hidden: list[str]
) -> None:
    without = write_gold(tmp_path / "gold", {"test": N}, lambda i: [name for name in present(i) if name not in hidden])
    got = outputs_hiding(run, gold, hidden, 1.0)
    np.testing.assert_allclose(got, outputs_on(run, without), atol=1e-7)
    assert np.abs(got - outputs_on(run, gold)).max() > 1e-3, "nothing was hidden"


def test_a_curve_is_the_mean_over_draws_of_the_metric(gold: Path, run: Path) -> None:
    dataset = load_tuned(run, gold, "test").dataset
    positions = dataset.labelled(None, 0)
    bit = dataset.manifest.bit("text")

    def answer(split: GoldDataset, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Right exactly where there is a text."""
        has = np.array([bool(split.fetch(int(i)).presence & bit) for i in rows])
        truth = split.label[rows]
        return np.eye(3)[np.where(has, truth, (truth + 1) % 3)], truth

    rows = curve(answer, dataset, positions, ["text"], accuracy, [0.0, 0.5, 1.0], seeds=3)
    natural = np.mean(["text" in present(i) for i in range(N)])
    draws = [answer(HidingDataset(dataset, {"text": 0.5}, seed), positions) for seed in range(3)]
    expected = np.mean([(outputs.argmax(1) == truth).mean() for outputs, truth in draws])
    assert [row["rate"] for row in rows] == [0.0, 0.5, 1.0]
    assert [row["value"] for row in rows] == pytest.approx([natural, expected, 0.0])
    assert all(row["ci95"][0] <= row["value"] <= row["ci95"][1] for row in rows)


def test_the_command_writes_a_card_that_starts_where_evaluate_stands(
    run: Path, gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hiding = {"finetune__hide": {"image": 0.5}, "finetune__pooling": "modalities"}
    second = write_tuned(tmp_path / "second", gold, recipe_with(**hiding), seed=1)
    out = tmp_path / "card"
    options = ["--hide", "image,text", "--rates", "1,0,0.5", "--metric", "log_loss"]
    assert main(["robustness", str(run), str(second), "--data", str(gold), "--out", str(out), *options]) == 0
    found = json.loads((out / "robustness.json").read_text())
    assert found["rates"] == [0, 0.5, 1]
    for one, folder in zip(found["runs"], [run, second], strict=True):
        assert [c["hidden"] for c in one["curves"]] == [["image"], ["text"], ["image", "text"]]
        whole = evaluate_run(folder, gold, "test")["metrics"]["log_loss"]
        for each in one["curves"]:
            assert each["rows"][0] == {"rate": 0.0, **whole}
    assert found["runs"][1]["train_hidden"] == {"image": 0.5}
    card = (out / "robustness.md").read_text()
    assert card in capsys.readouterr().out
    assert f"| {second} | 8 | - | image 50% | 0% |" in card
    assert f"{found['runs'][0]['curves'][1]['rows'][2]['value']:.3f} (" in card
    assert (out / "robustness.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--hide", "smell"], "no modality smell"),
        (["--rates", "0,1.5"], "rates 1.5"),
        (["--rates", "nan"], "rates nan"),
        (["--rates", "0,x"], "--rates 0,x"),
        (["--seeds", "0"], "0 draws"),
        (["--metric", "rmse"], "metric 'rmse'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    run: Path, gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "card"
    assert main(["robustness", str(run), "--data", str(gold), "--out", str(out), *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert not out.exists()


def test_a_run_without_a_hidden_modality_is_named_before_the_work_begins(run: Path, gold: Path, tmp_path: Path) -> None:
    recipe = recipe_with()
    del recipe.model.modalities["image"]
    blind = write_tuned(tmp_path / "blind", gold, recipe)
    with pytest.raises(ValueError, match=r"blind has no modality image to hide"):
        measure_robustness([run, blind], gold, "test", None, None, [0.0], 1)


def tune(recipe: Recipe, gold: Path, folder: Path) -> None:
    finetune.finetune(recipe, gold, folder / "run", Path("ds.json"), source=None, labels=None, resume=None)


def test_fine_tuning_sees_the_share_that_its_recipe_leaves(
    gold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GoldDataset] = []

    def stop(dataset: GoldDataset, *_: Any) -> None:
        seen.append(dataset)
        raise InterruptedError

    monkeypatch.setattr(finetune, "train_loader", stop)
    for hide in ({}, {"text": 1.0}):
        with pytest.raises(InterruptedError):
            tune(recipe_with(finetune__hide=hide, finetune__freeze="none"), gold, tmp_path)
    bits = {name: seen[0].manifest.bit(name) for name in NAMES}
    for i in range(seen[0].n):
        assert seen[0].fetch(i).presence == sum(bits[name] for name in present(i))
        assert seen[1].fetch(i).presence == sum(bits[name] for name in present(i) if name != "text")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"hide": {"text": 0.5}, "cache": True}, r"finetune\.hide and finetune\.cache"),
        ({"hide": {"smell": 0.5}}, "hide smell: no such modality"),
        ({"hide": {"text": 2}}, r"hide text: rate 2\.0; it must be in \[0, 1\]"),
    ],
)
def test_what_fine_tuning_cannot_hide_is_refused(gold: Path, tmp_path: Path, config: Any, message: str) -> None:
    changes = {f"finetune__{key}": value for key, value in config.items()}
    with pytest.raises(ValueError, match=message):
        tune(recipe_with(**changes, finetune__freeze="none"), gold, tmp_path)
