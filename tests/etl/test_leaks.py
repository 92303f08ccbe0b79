"""The leak probe finds what was planted, and nothing in noise; its arithmetic against plain loops."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.build import build
from etl.leaks import Known, Z, _ids, _named, _phrases, _youden, probe, removed_error
from etl.recipe import Recipe
from etl.summary import read_indices
from lanistr.manifest import Manifest

texts = st.lists(st.lists(st.integers(0, 3), max_size=6).map(lambda ids: np.array(ids, dtype=np.int64)), max_size=5)


@given(texts)
def test_phrases_are_those_of_a_naive_loop(texts: list[np.ndarray]) -> None:
    expected = {
        (tuple(ids[i : i + n].tolist()), number)
        for number, ids in enumerate(texts)
        for n in (1, 2, 3)
        for i in range(len(ids) - n + 1)
    }
    distinct, code, text = _phrases(texts)
    found = [(tuple(_ids(int(distinct[c]))), int(t)) for c, t in zip(code, text, strict=True)]
    assert len(found) == len(set(found))
    assert set(found) == expected


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.01, 0.99))
def test_removed_error_is_the_lower_wilson_bound(counts: tuple[int, int], base: float) -> None:
    hits, n = counts
    found = float(removed_error(np.array([hits]), np.array([n]), base)[0])
    low = 1 - (1 - found) * (1 - base)
    # The bound is where a true share of `low` would be Z standard errors below what was seen.
    # Squared: near a share of 0 a root would make 1e-8 of a rounding error of 1e-16.
    assert (hits / n - low) ** 2 == pytest.approx(Z * Z * low * (1 - low) / n, abs=1e-9)
    assert low <= hits / n + 1e-12


def test_a_group_is_one_witness_however_often_it_repeats_itself() -> None:
    label = np.array([1] * 90 + [0] * 60)
    group = np.array([0] * 60 + list(range(1, 91)))
    known = Known(label, group, ["no", "yes"])
    code = (np.arange(150) < 60).astype(np.int64)  # a feature of the first group only
    pairs = {(int(c), int(g), int(y)) for c, g, y in zip(code, group, label, strict=True)}
    base = np.mean([y for _, y in {(g, y) for _, g, y in pairs}])
    expected = removed_error(np.array([1]), np.array([1]), float(base))[0]
    assert known.strengths(code, np.arange(150), 2)[1][1] == pytest.approx(expected)
    assert expected < 0.5


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_identifiers_and_noise_decide_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positive, group = rng.random(2000) < 0.3, rng.integers(0, 400, 2000)
    assert _youden(group, positive, group) < 0.3
    assert abs(_youden(rng.integers(0, 20, 2000), positive, group)) < 0.3
    assert _youden(positive.astype(np.int64), positive, group) == 1


def test_of_overlapping_phrases_the_longest_common_one_is_named() -> None:
    carriers = {0: np.arange(100), 1: np.arange(98), 2: np.arange(30), 3: np.arange(500, 520)}
    five, five_stars, got_five, other = 7, 7 << 21 | 9, 3 << 21 | 7, 12
    assert _named(carriers, np.array([five, five_stars, got_five, other])) == [1, 3]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaks")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(1500):
        y = int(rng.random() < 0.3)
        dull = " ".join(rng.choice(["the", "ward", "was", "quiet", "today", "and", "so", "on"], 12))
        told = f"{dull} autopsy was ordered" if y and rng.random() < 0.4 else dull
        rows.append(
            {
                "id": f"i{i}",
                "owner": f"o{i // 2}",
                "label": ["alive", "dead"][y],
                "note": told,
                "billed_days": rng.normal(10 - 9 * y, 1),
                "age": rng.normal(60 + 5 * y, 15),
                "ward": str(rng.choice(["morgue", "north"])) if y else "north",
                "serial": f"s{i}",
                "photo": "x.jpg",
            }
        )
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree = {
        "name": "planted",
        "source": {
            "kind": "table",
            "main": "t.jsonl",
            "id": "id",
            "group": "owner",
            "label": "label",
            "text": {"columns": ["note"]},
        },
        "text": {"tokenizer": {"train": 300}},
        "tabular": {"numeric": ["billed_days", "age"], "categorical": ["ward", "serial"]},
    }
    return build(Recipe.model_validate(tree), folder, folder / "lake")


def test_planted_column_value_and_phrase_are_named_and_nothing_else(planted: Path) -> None:
    manifest = Manifest.load(planted)
    leaks = probe(planted, manifest, read_indices(planted, manifest))
    named = {(leak.what, leak.label) for leak in leaks}
    assert {
        ("column billed_days", "dead"),
        ("column billed_days", "alive"),
        ("column ward = 'morgue'", "dead"),
    } <= named
    (phrase,) = {(what, label) for what, label in named if what.startswith("phrase")}
    assert "autopsy" in phrase[0]
    assert phrase[1] == "dead"
    assert len(named) == 4
    shown = "\n".join(str(leak.redacted()) for leak in leaks)
    assert "billed_days" in shown
    assert "autopsy" not in shown
    assert "morgue" not in shown


def test_unlabelled_data_has_no_leaks(planted: Path) -> None:
    manifest = Manifest.load(planted)
    assert probe(planted, manifest, read_indices(planted, manifest).with_columns(label=pl.lit(-1))) == []
