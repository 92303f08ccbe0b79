"""Splits: groups never straddle, rules hold against plain Python, and are stable."""

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etl import recipe as recipes
from etl.build import build
from etl.near import MIN_WORDS, merged_names
from etl.recipe import Split
from etl.split import assign, bounds, rule, select, split_of
from etl.verify import verify
from lanistr.manifest import Manifest

Rows = list[tuple[str, str, str | None, float | None]]  # row, group, label, time
ODD = ["é", "日本", "", "a'b", "x" * 300]
rows_of = st.lists(
    st.tuples(
        st.sampled_from([f"g{i}" for i in range(12)] + ODD),
        st.sampled_from(["a", "b", None]),
        st.one_of(st.none(), st.integers(-5, 5).map(float)),
    ),
    max_size=60,
).map(lambda rows: [(f"r{i}", *row) for i, row in enumerate(rows)])


def table(rows: Rows) -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    con.execute("create table samples (row_id varchar, grp varchar, label varchar, time double)")
    if rows:
        con.executemany("insert into samples values (?, ?, ?, ?)", [list(row) for row in rows])
    return con


def splits(rows: Rows, split: Split) -> dict[str, str | None]:
    with table(rows) as con:
        return dict(con.execute(select(rule(split, "owner"), "samples")).fetchall())


def groups(rows: Rows, found: dict[str, str | None]) -> dict[str, set[str | None]]:
    seen: dict[str, set[str | None]] = defaultdict(set)
    for row, group, _, _ in rows:
        seen[group].add(found[row])
    return seen


def test_sql_and_python_hash_alike() -> None:
    split = Split(salt="s'", train=0.5, val=0.25, test=0.25)
    rows: Rows = [(f"r{i}", group, None, None) for i, group in enumerate([f"g{i}" for i in range(500)] + ODD)]
    assert splits(rows, split) == {row: split_of(group, split) for row, group, _, _ in rows}


def naive_stratified(rows: Rows, split: Split) -> dict[str, str]:
    labels: dict[str, Counter[str | None]] = defaultdict(Counter)
    for _, group, label, _ in rows:
        labels[group][label] += 1
    strata: dict[str | None, list[str]] = defaultdict(list)
    for group, counts in labels.items():
        strata[min(counts, key=lambda label: (-counts[label], label is None, label or ""))].append(group)
    train, val = bounds(split)
    found = {}
    for members in strata.values():

        def place(group: str) -> tuple[int, bytes]:
            digest = hashlib.md5(f"{split.salt}:{group}".encode()).digest()
            return int.from_bytes(digest, "little"), group.encode()

        for i, group in enumerate(sorted(members, key=place)):
            share = 10_000 * (i + 0.5) / len(members)
            found[group] = "train" if share < train else "val" if share < val else "test"
    return found


@settings(max_examples=25)
@given(rows_of)
def test_stratified_split_is_that_of_plain_python_and_group_safe(rows: Rows) -> None:
    split = Split(train=0.5, val=0.25, test=0.25, stratify=True)
    found = splits(rows, split)
    assert {group: {split} for group, split in naive_stratified(rows, split).items()} == groups(rows, found)


@pytest.mark.parametrize("stratify", [False, True])
@settings(max_examples=25)
@given(rows=rows_of)
def test_unlabelled_groups_are_train_and_all_others_stay_where_they_were(stratify: bool, rows: Rows) -> None:
    shares = {"train": 0.4, "val": 0.3, "test": 0.3, "stratify": stratify}
    before = splits(rows, Split.model_validate(shares))
    found = splits(rows, Split.model_validate(shares | {"unlabelled": "train"}))
    labelled = {group for _, group, label, _ in rows if label is not None}
    assert found == {row: before[row] if group in labelled else "train" for row, group, _, _ in rows}


def test_stratified_shares_are_exact_and_a_new_group_moves_few() -> None:
    rows: Rows = [(f"r{i}", f"g{i}", "rare" if i < 40 else "common", None) for i in range(1000)]
    split = Split(stratify=True)
    found = splits(rows, split)
    for label, n in (("rare", 40), ("common", 960)):
        counts = Counter(found[row] for row, _, this, _ in rows if this == label)
        assert counts == {"train": 0.8 * n, "val": 0.1 * n, "test": 0.1 * n}
    grown = splits([*rows, ("new", "new", "rare", None)], split)
    assert sum(found[row] != grown[row] for row in found) <= 2


@settings(max_examples=25)
@given(rows_of)
def test_time_split_lets_nothing_of_the_future_into_train(rows: Rows) -> None:
    found = splits(rows, Split.model_validate({"time": {"val": 0, "test": 3}}))
    assert all(len(seen) == 1 for seen in groups(rows, found).values())
    for group in {row[1] for row in rows}:
        times = [time for _, this, _, time in rows if this == group and time is not None]
        expected = None if not times else "train" if max(times) < 0 else "val" if max(times) < 3 else "test"
        assert groups(rows, found)[group] == {expected}


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"time": {"val": "2016-01-01", "test": "2017-01-01"}, "stratify": True}, "leave out stratify"),
        ({"time": {"val": 1, "test": 2}, "unlabelled": "train"}, "leave out unlabelled"),
        ({"unlabelled": "val"}, "'split' or 'train'"),
        ({"time": {"val": 2, "test": 1}}, "val starts after test"),
        ({"time": {"val": "soon", "test": 1}}, "isoformat"),
        ({"near_duplicates": 0.1}, "near_duplicates"),
        ({"train": 0.9}, "must be 1"),
    ],
)
def test_a_wrong_split_is_refused(split: dict, message: str) -> None:
    tree = {
        "name": "x",
        "split": split,
        "source": {"kind": "amazon2018", "reviews": "r"},
        "tabular": {},
    }
    with pytest.raises(ValueError, match=message):
        recipes.Recipe.model_validate(tree)


def test_dates_are_utc() -> None:
    cut = Split.model_validate({"time": {"val": "2016-01-01", "test": "2016-01-01T01:00:00+01:00"}}).time
    assert cut
    assert (cut.val, cut.test) == (1451606400, 1451606400)


def words(seed: int, n: int) -> list[str]:
    return [f"w{i}" for i in np.random.default_rng(seed).integers(0, 500, n)]


def jaccard(a: str, b: str) -> float:
    x, y = ({tuple(t.split()[i : i + 3]) for i in range(len(t.split()) - 2)} for t in (a, b))
    return len(x & y) / len(x | y)


def test_near_duplicates_share_a_group_and_others_do_not() -> None:
    base = words(0, 200)
    near = [*base[:197], "x", "y", "z"]
    half = [*base[:100], *words(1, 100)]
    other = words(2, 200)
    texts = {"a": base, "b": near, "c": half, "d": other, "e": near[:195]}
    rows = [(group, " ".join(text)) for group, text in texts.items()]
    assert jaccard(rows[0][1], rows[1][1]) > 0.9
    assert jaccard(rows[0][1], rows[2][1]) < 0.5
    assert merged_names(rows, 0.8) == {"a": "a", "b": "a", "e": "a"}
    assert merged_names(rows[::-1], 0.8) == {"a": "a", "b": "a", "e": "a"}


def test_short_texts_and_texts_of_one_group_merge_nothing() -> None:
    short = " ".join(words(0, MIN_WORDS - 1))
    assert merged_names([("a", short), ("b", short)], 0.8) == {}
    long = " ".join(words(0, MIN_WORDS))
    assert merged_names([("a", long), ("a", long)], 0.8) == {}
    assert merged_names([("b", long), ("a", long.upper())], 0.8) == {"a": "a", "b": "a"}


def notes(folder: Path, copies: int, n: int = 300) -> Path:
    rows = []
    for i in range(n):
        text = words(0 if i < copies else i + 1, 60)
        rows.append(
            {"id": f"i{i}", "note": " ".join([*text[:58], f"v{i}", "end"]), "when": f"2015-{1 + i % 12:02d}-01"}
        )
    folder.mkdir()
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


NOTES = {
    "name": "notes",
    "source": {"kind": "table", "main": "t.jsonl", "id": "id", "text": {"columns": ["note"]}},
    "text": {"tokenizer": {"train": 200}, "max_tokens": 64},
}


def test_a_build_keeps_near_duplicates_on_one_side_and_verify_proves_it(tmp_path: Path) -> None:
    raw = notes(tmp_path / "raw", copies=9)
    recipe = recipes.Recipe.model_validate({**NOTES, "split": {"near_duplicates": 0.8}})
    gold = build(recipe, raw, tmp_path / "lake")
    manifest = Manifest.load(gold)
    assert manifest.counts["groups merged over near-duplicate texts"] == 8
    assert manifest.split_rule["near_duplicates"] == 0.8
    files = str(gold.parents[1] / "silver" / "notes" / "**" / "*.parquet")
    found = duckdb.execute(
        f"select distinct split from read_parquet('{files}', union_by_name=true) "
        "where row_id in ('i0','i1','i2','i3','i4','i5','i6','i7','i8') and split is not null"
    ).fetchall()
    assert len(found) == 1
    assert any(line.startswith("split: the rule (hash)") for line in verify(gold, deep=True))


def test_boiler_plate_that_would_merge_everything_is_an_error(tmp_path: Path) -> None:
    raw = notes(tmp_path / "raw", copies=20)
    recipe = recipes.Recipe.model_validate({**NOTES, "split": {"near_duplicates": 0.8}})
    with pytest.raises(ValueError, match="merges 20 groups into one of 20 samples, more than 1% of the 300"):
        build(recipe, raw, tmp_path / "lake")
    assert not (tmp_path / "lake" / "gold").exists() or not list((tmp_path / "lake" / "gold").rglob("manifest.json"))


def test_a_time_split_of_reviews_cuts_at_the_date_and_verify_proves_it(tmp_path: Path) -> None:
    reviews = [
        {
            "overall": 5,
            "reviewerID": f"r{i // 2}",
            "asin": f"a{i % 7}",
            "reviewText": f"no {i}",
            "unixReviewTime": 86400 * i,
        }
        for i in range(200)
    ] + [{"overall": 5, "reviewerID": "timeless", "asin": "a", "reviewText": "when?"}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, reviews)))
    tree = {
        "name": "timed",
        "source": {"kind": "amazon2018", "reviews": "r.jsonl"},
        "tabular": {},
        "split": {"time": {"val": "1970-05-01", "test": "1970-06-10"}},
    }
    gold = build(recipes.Recipe.model_validate(tree), tmp_path, tmp_path / "lake")
    manifest = Manifest.load(gold)
    assert manifest.counts["without a time, in no split"] == 1
    assert [manifest.n(split) for split in ("train", "val", "test")] == [120, 40, 40]
    assert any(line.startswith("split: the rule (time)") for line in verify(gold, deep=True))


@pytest.mark.parametrize("stratify", [False, True])
def test_a_build_trains_on_all_that_is_unlabelled_and_verify_proves_it(stratify: bool, tmp_path: Path) -> None:
    rows = [
        {"id": f"i{i}", "group": f"g{i // 2}", "size": i, "label": "ab"[i // 4 % 2] if i < 200 and not i % 2 else None}
        for i in range(600)
    ]  # every group of the first 100 has one sample with and one without a label; no other has a label
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree = {
        "name": "part",
        "source": {"kind": "table", "main": "t.jsonl", "id": "id", "group": "group", "label": "label"},
        "tabular": {"numeric": ["size"]},
        "split": {"train": 0.5, "val": 0.2, "test": 0.3, "stratify": stratify, "unlabelled": "train"},
    }
    gold = build(recipes.Recipe.model_validate(tree), tmp_path, tmp_path / "lake")
    manifest = Manifest.load(gold)
    assert manifest.split_rule["unlabelled"] == "train"
    held_out = manifest.n("val") + manifest.n("test")
    assert 0 < held_out <= 200
    assert manifest.n("train") == 600 - held_out
    assert any(line.startswith("split: the rule (") for line in verify(gold, deep=True))


def test_a_time_split_needs_a_source_with_times() -> None:
    with table([("r", "g", None, None)]) as con:
        con.execute("alter table samples drop column time")
        with pytest.raises(ValueError, match=r"split\.time: the source gives no time"):
            assign(con, Split.model_validate({"time": {"val": 0, "test": 1}}), "owner")
