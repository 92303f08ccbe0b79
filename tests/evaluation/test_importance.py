"""Importance on factors that were planted, and its command line."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from etl.sources.synthetic import draw_factors
from lanistr.data.reader import GoldDataset
from lanistr.evaluation.advice import advise
from lanistr.evaluation.embed import embed
from lanistr.evaluation.importance import Game, Values, _column_pairs, importance, measure
from lanistr.evaluation.importance_report import write_importance
from lanistr.evaluation.material import Material, gather
from lanistr.evaluation.probe import Truth
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from lanistr.training.checkpoint import WEIGHTS, load_weights
from lanistr.training.finetune import make_task
from tests.model.support import NAMES, RECIPE
from tests.tiny_gold import write_gold
from tests.tiny_run import write_pretraining

ROOT = Path(__file__).resolve().parents[2]


def shop(n: int, seed: int) -> Material:
    """The demo shop with factors that can be read without an encoder: image and series are missing as in the shop."""
    factors = draw_factors(n, seed)
    rng = np.random.default_rng([seed, 9])
    hot = {name: np.eye(5)[values] for name, values in factors.items()}
    cells = {
        "supplier": hot["tabular"],
        "weight_kg": hot["bin"],
        "warehouse_temperature": np.eye(5)[rng.integers(0, 5, n)],
    }
    present = {"text": 0.98, "image": 0.5, "tabular": 1.0, "series": 0.6}
    return Material(
        features={
            "text": np.concatenate([hot["text"], hot["mood"]], axis=1),
            "image": hot["image"],
            "tabular": np.zeros((n, 1)),
            "series": hot["series"],
        },
        plain={},
        present={name: rng.random(n) < share for name, share in present.items()},
        cells={"tabular": cells},
        fused=hot["text"],
        truth=Truth(hot["y"], np.ones((n, 5), dtype=bool), np.arange(n), factors["y"]),
        classes=True,
    )


@pytest.fixture(scope="module")
def found() -> dict:
    return measure(shop(600, 0), draws=12, seed=0)


def test_planted_modalities_come_in_the_planted_order(found: dict) -> None:
    order = [row["modality"] for row in found["shapley"]]
    assert order[:2] == ["text", "tabular"]  # image and series are planted within .001 of each other
    assert all(row["ci95"][0] > 0 for row in found["shapley"])
    whole = next(row for row in found["subsets"] if len(row["modalities"]) == 4)
    assert sum(row["value"] for row in found["shapley"]) == pytest.approx(whole["value"])


def test_an_order_is_told_only_where_the_interval_of_the_difference_is_above_zero(found: dict) -> None:
    ranked = [row["modality"] for row in found["shapley"]]
    assert [row["pair"] for row in found["order"]] == [list(pair) for pair in itertools.pairwise(ranked)]
    for row, above, below in zip(found["order"], found["shapley"], found["shapley"][1:], strict=False):
        assert row["value"] == pytest.approx(above["value"] - below["value"])
        assert row["told"] == (row["ci95"][0] > 0)
    assert found["order"][1]["told"]  # the table and what follows it are planted .14 apart
    assert not found["order"][2]["told"]  # image and series .001


def test_the_planted_interaction_is_found_and_named_by_column(found: dict) -> None:
    assert found["pairs"][0]["pair"] == ["text", "tabular"]
    assert found["pairs"][0]["ci95"][0] > 0
    shown = [row["pair"] for row in found["column_pairs"] if row["found"]]
    assert shown == [["text", "tabular/weight_kg"]]


@pytest.mark.parametrize(("together", "said"), [(-0.01, False), (0.05, True)])
def test_two_that_overfit_alone_and_together_are_no_pair(together: float, said: bool) -> None:
    rng = np.random.default_rng(0)
    value = {("text",): -0.01, ("tabular/c",): -0.01, ("text", "tabular/c"): together}
    values = Values(value, {case: mean + rng.normal(0, 0.001, 40) for case, mean in value.items()}, 1.0)
    game = Game(["text", "tabular"], [("tabular", "c")], {})
    (row,) = _column_pairs(values, game)
    assert row["ci95"][0] > 0
    assert row["found"] == said


def test_the_noise_column_is_last_and_the_column_that_tells_nothing_alone_is_not(found: dict) -> None:
    columns = found["columns"]
    assert columns[-1]["column"] == "warehouse_temperature"
    weight = next(row for row in columns if row["column"] == "weight_kg")
    assert weight["alone"]["value"] < 0.01
    assert weight["on_top"]["value"] > 0.05


def test_advice_follows_intervals_missing_shares_and_the_learning_curve() -> None:
    rows = [("a", 0.2, 0.1, 0.3), ("b", 0.1, 0.02, 0.2), ("c", 0.001, -0.002, 0.004), ("d", 0.02, -0.02, 0.06)]
    figures = {
        "shapley": [{"modality": m, "value": v, "ci95": [low, high]} for m, v, low, high in rows],
        "missing": {"a": 0.0, "b": 0.5, "c": 0.0, "d": 0.0},
        "curve": [{"labels": n, "value": v, "spread": 0.001} for n, v in ((50, 0.1), (100, 0.2), (200, 0.3))],
    }
    verdicts = [row["verdict"] for row in advise(figures)]
    assert verdicts == ["keep", "keep, collect more", "drop", "label more"]
    assert "+0.100 if it never were" in advise(figures)[1]["why"]
    figures["curve"][-1]["value"] = 0.2
    assert advise(figures)[3]["verdict"] == "undecided"


def test_the_report_is_whole(found: dict, tmp_path: Path) -> None:
    about = {"run": "r", "dataset": "shop", "labels": 600, "draws": 12}
    cost = {m: {"bytes": 10.0, "flops": 1e6} for m in ("text", "image", "tabular", "series")}
    text = write_importance({**found, "about": about, "cost": cost}, tmp_path)
    assert "text and tabular/weight_kg" in text
    assert "600 labels cannot tell" in text
    assert "tabular >" in text
    assert (tmp_path / "importance.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "importance.json").read_text())["pairs"] == found["pairs"]


def present(i: int) -> list[str]:
    return [name for bit, name in enumerate(NAMES) if (i % 16) >> bit & 1] or ["text"]


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gold(tmp_path_factory.mktemp("tiny") / "gold", {"train": 60}, present)


def test_what_is_probed_are_the_runs_embeddings_and_the_cells_of_the_table(gold: Path, tmp_path: Path) -> None:
    run = write_pretraining(tmp_path / "run", gold)
    dataset = GoldDataset(gold, "train", make_modalities(Manifest.load(gold), RECIPE.model.modalities))
    labelled = np.array([1, 4, 5, 30])
    material = gather(run, RECIPE, dataset, labelled, seed=0)
    assert len(material.fused) == 60
    task = make_task(RECIPE, dataset.manifest, "cpu")
    load_weights(task, run / "checkpoints" / "step-00000007" / WEIGHTS)
    expected = embed(task.model, dataset, labelled)
    for name in NAMES:
        np.testing.assert_allclose(material.features[name][:4], expected.modalities[name], atol=1e-5)
    assert set(material.cells["tabular"]) == {"a", "b", "c"}
    for name, column in (("a", 0), ("c", 2)):
        for row, position in enumerate(labelled):
            content = dataset.read(int(position)).contents.get("tabular")
            missing = content is None or not content.observed_K[column]
            bins = {"a": 4, "c": 1}[name]  # a number is in a half, a third, a fifth and a tenth
            assert material.cells["tabular"][name][row].sum() == (1 if missing else bins)
            assert bool(material.cells["tabular"][name][row, -1]) == missing
    np.testing.assert_array_equal(material.truth.values_NL.argmax(1), dataset.label[labelled])


def test_a_whole_run_states_costs_and_refuses_what_it_cannot_divide(gold: Path, tmp_path: Path) -> None:
    run = write_pretraining(tmp_path / "run", gold)
    found = importance(run, gold, labels=40, seed=0, draws=2)
    assert {row["modality"] for row in found["advice"]} == set(NAMES)
    assert len(found["subsets"]) == 15
    dataset = GoldDataset(gold, "train", make_modalities(Manifest.load(gold), RECIPE.model.modalities))
    sizes = [len(dataset.fetch(i).members["jpg"]) for i in range(60) if "jpg" in dataset.fetch(i).members]
    assert found["cost"]["image"]["bytes"] == pytest.approx(np.mean(sizes))
    assert all(cost["flops"] > 0 for cost in found["cost"].values())
    with pytest.raises(ValueError, match="61 labels asked for"):
        importance(run, gold, labels=61, seed=0, draws=2)
    with pytest.raises(ValueError, match="at least 20 groups"):
        importance(run, gold, labels=10, seed=0, draws=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "nowhere", "--data", "nowhere"], "no run.json"),
        (["--from", "nowhere", "--data", "nowhere", "--draws", "1"], "--draws 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "importance.py"), *arguments],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
