"""Multi-label targets and regressions from a user's table to a batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etl.build import build
from etl.cards import cards
from etl.diff import diff
from etl.recipe import Recipe
from etl.stats import stats
from etl.summary import Summary
from etl.verify import verify
from lanistr.data.loader import Collator
from lanistr.data.reader import GoldDataset
from lanistr.manifest import Manifest, sample_key
from lanistr.modalities import make_modalities

CONFIGS: dict[str, dict[str, Any]] = {"tabular": {"width": 8, "steps": 2}}
HEAD = "id,x,a,b,tags\n"
ROWS = [
    "1,0.5,1,2.5,red;blue",
    "2,1.5,0,,blue",
    "3,2.5,true,1e2,",
    "4,3.5,,,red; red",
    "5,4.5,oops,nan,green",
]


def make(tmp_path: Path, rows: list[str] = ROWS, **source: Any) -> Path:
    raw = tmp_path / "raw"
    raw.mkdir(exist_ok=True, parents=True)
    (raw / "main.csv").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    recipe = {
        "name": "toy",
        "source": {"kind": "table", "main": "main.csv", "id": "id", **source},
        "tabular": {"numeric": ["x"]},
        "split": {"train": 1.0, "val": 0, "test": 0},
    }
    return build(Recipe.model_validate(recipe), raw, tmp_path / "lake")


def targets(gold: Path) -> dict[str, list[float]]:
    """By row id, as the reader sees them."""
    dataset = GoldDataset(gold, "train", make_modalities(Manifest.load(gold), CONFIGS))
    ids = {sample_key("toy", i, i): i for i in "12345"}
    batch = Collator(dataset.modalities, views=1, seed=0)([dataset.read(p) for p in range(dataset.n)], [1.0] * 5, 0)
    assert batch.targets_BL is not None
    np.testing.assert_array_equal(batch.targets_BL.numpy(), dataset.target)
    np.testing.assert_array_equal(dataset.label, np.where(np.isfinite(dataset.target).any(1), 0, -1))
    return {ids[key]: row.tolist() for key, row in zip(dataset.keys, dataset.target, strict=True)}


NAN = float("nan")


@pytest.mark.parametrize(
    "source, labels, expected, bad",
    [
        (
            {"target": "regression", "label": ["b"]},
            ["b"],
            {"1": [2.5], "2": [NAN], "3": [100], "4": [NAN], "5": [NAN]},
            {"not a finite float32: b": 1},
        ),
        (
            {"target": "multilabel", "label": ["a", "b"], "keep": {"id": ["2", "4"]}},
            ["a", "b"],
            {"2": [0, NAN], "4": [NAN, NAN]},
            {},
        ),
        (
            {"target": "multilabel", "label": "tags", "label_separator": ";"},
            ["blue", "green", "red"],
            {"1": [1, 0, 1], "2": [1, 0, 0], "3": [NAN] * 3, "4": [0, 0, 1], "5": [0, 1, 0]},
            {},
        ),
    ],
)
def test_numbers_and_labels_reach_the_reader(
    tmp_path: Path, source: dict[str, Any], labels: list[str], expected: dict[str, list[float]], bad: dict[str, int]
) -> None:
    gold = make(tmp_path, **source)
    manifest = Manifest.load(gold)
    assert (manifest.target, manifest.labels, manifest.quarantine) == (source["target"], labels, bad)
    if len(expected) == 5:
        found = targets(gold)
        assert found.keys() == expected.keys()
        for key, row in expected.items():
            np.testing.assert_array_equal(found[key], row)
    verify(gold, deep=True)
    assert labels[0] in stats(gold)
    assert len(list(cards(Summary(gold), 3))) == min(3, len(expected))


def test_flags_are_zero_or_one_or_set_aside(tmp_path: Path) -> None:
    gold = make(tmp_path, target="multilabel", label=["a"])
    np.testing.assert_array_equal([targets(gold)[i] for i in "12345"], [[1], [0], [1], [NAN], [NAN]])
    assert Manifest.load(gold).quarantine == {"not 0 or 1: a": 1}


def test_diff_finds_a_changed_number(tmp_path: Path) -> None:
    source = {"target": "regression", "label": "b"}
    one = make(tmp_path / "one", **source)
    rows = [row.replace("2.5,red", "9,red") for row in ROWS]
    two = make(tmp_path / "two", rows=rows, **source)
    changed = next(line for line in diff(one, two).splitlines() if "changed" in line)
    assert "1" in changed


def test_a_class_keeps_the_bytes_it_had(tmp_path: Path) -> None:
    manifest = Manifest.load(make(tmp_path, label="tags"))
    assert manifest.target == "class"
    assert manifest.labels == ["blue", "green", "red; red", "red;blue"]
    dataset = GoldDataset(tmp_path / "lake/gold/toy", "train", make_modalities(manifest, CONFIGS))
    assert dataset.target.shape == (5, 0)
    assert dataset.read(0).target is None


@pytest.mark.parametrize(
    "source, message",
    [
        ({"label": ["a", "b"]}, "a class is one column"),
        ({"target": "regression"}, "needs label"),
        ({"target": "multilabel", "label": "tags"}, "needs label_separator"),
        ({"target": "regression", "label": "b", "label_separator": ";"}, "only for one column of a multilabel"),
    ],
)
def test_a_label_that_does_not_fit_the_target_is_named(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **source)


def test_numbers_cannot_be_strata(tmp_path: Path) -> None:
    tree = {
        "name": "toy",
        "source": {"kind": "table", "main": "main.csv", "id": "id", "target": "regression", "label": "b"},
        "tabular": {"numeric": ["x"]},
        "split": {"stratify": True},
    }
    with pytest.raises(ValueError, match="stratify"):
        Recipe.model_validate(tree)
