"""`source.time` of the table source: time splits, and no point of a series after the label, against plain Python."""

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from etl.__main__ import main
from etl.build import build
from etl.recipe import Recipe
from etl.verify import verify
from lanistr.manifest import Manifest

START = datetime(2015, 1, 1, tzinfo=UTC)
SERIES = {"table": "series.csv", "id": "id", "time": "at", "values": ["x", "y"]}
SOURCE = {"kind": "table", "main": "main.csv", "id": "id", "time": "when", "series": SERIES}
CUT = {"time": {"val": "2015-03-01", "test": "2015-04-01"}}


def recipe_of(series: dict | list | None = None, **blocks: object) -> Recipe:
    source = SOURCE | {"series": series or SERIES, "group": "owner"}
    return Recipe.model_validate({"name": "toy", "source": source, "timeseries": {}, **blocks})


def write(folder: Path, name: str, header: str, rows: list[tuple]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def silver(gold: Path) -> dict[str, dict]:
    """Rows of silver by id."""
    files = (gold.parents[1] / "silver" / gold.name / "samples").glob("*.parquet")
    return {row["row_id"]: row for file in files for row in pq.read_table(file).to_pylist()}


def quarantined(gold: Path) -> set[tuple]:
    files = (gold.parents[1] / "quarantine" / gold.name).glob("*.parquet")
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return {(row["file"], row["line"], row["reason"], row["raw"]) for row in rows}


def stays(seed: int, late: int = 0) -> tuple[list[tuple], list[tuple]]:
    """60 rows (id, owner, when) and the points (id, at, x, y) of most of them, as datetimes; ``late`` follow ``when``."""
    draw = random.Random(seed)
    rows = [(f"i{i}", f"o{draw.randrange(30)}", START + timedelta(hours=draw.randrange(2880))) for i in range(60)]
    points = {
        (key, when - timedelta(minutes=draw.randrange(10_000))): (draw.random(), draw.choice([1, 2, ""]))
        for key, _, when in rows[:50]
        for _ in range(draw.randrange(1, 6))
    }
    points |= {(key, when + timedelta(seconds=1)): (draw.random(), 0) for key, _, when in rows[:late]}
    return rows, [(*place, *values) for place, values in points.items()]


def as_stamps(rows: list[tuple]) -> list[tuple]:
    zones = (UTC, datetime.strptime("+0200", "%z").tzinfo)  # one moment has several spellings
    return [
        tuple(v.astimezone(zones[i % 2]).isoformat() if isinstance(v, datetime) else v for v in row)
        for i, row in enumerate(rows)
    ]


def as_numbers(rows: list[tuple], per: float) -> list[tuple]:
    return [tuple(v.timestamp() / per if isinstance(v, datetime) else v for v in row) for row in rows]


@pytest.mark.parametrize("kind", ["timestamps", "seconds", "days"])
def test_splits_and_last_points_are_what_plain_python_says(kind: str, tmp_path: Path) -> None:
    rows, points = stays(seed=1)
    per = 86_400.0 if kind == "days" else 1.0
    spell = as_stamps if kind == "timestamps" else lambda values: as_numbers(values, per)
    write(tmp_path / "raw", "main.csv", "id,owner,when", spell(rows))
    write(tmp_path / "raw", "series.csv", "id,at,x,y", spell(points))
    cuts = [datetime(2015, month, 1, tzinfo=UTC).timestamp() / per for month in (3, 4)]
    split = CUT if kind == "timestamps" else {"time": dict(zip(("val", "test"), cuts, strict=True))}
    series = SERIES | ({} if kind == "timestamps" else {"absolute": True})
    gold = build(recipe_of(series, split=split), tmp_path / "raw", tmp_path / "lake")
    found = silver(gold)
    assert len(found) == 60
    for key, owner, when in rows:
        latest = max(w.timestamp() / per for _, o, w in rows if o == owner)
        expected = "train" if latest < cuts[0] else "val" if latest < cuts[1] else "test"
        last = max((at.timestamp() / per for i, at, _, _ in points if i == key), default=None)
        assert found[key]["split"] == expected
        assert found[key]["time"] == pytest.approx(when.timestamp() / per)
        assert found[key]["t:timeseries"] == (None if last is None else pytest.approx(last))
    assert {row["split"] for row in found.values()} == {"train", "val", "test"}
    lines = verify(gold, deep=True)
    assert "split: the rule (time) gives every row the split that it is in" in lines
    assert "times: timeseries is never later than the label (50 samples with both times)" in lines


def test_verify_names_series_that_go_on_after_the_label(tmp_path: Path) -> None:
    rows, points = stays(seed=2, late=3)
    write(tmp_path / "raw", "main.csv", "id,owner,when", as_stamps(rows))
    write(tmp_path / "raw", "series.csv", "id,at,x,y", as_stamps(points))
    gold = build(recipe_of(), tmp_path / "raw", tmp_path / "lake")
    with pytest.raises(ValueError, match="in 3 samples the timeseries is later than the label"):
        verify(gold, deep=True)


def test_a_late_point_of_a_variable_that_is_not_built_is_no_leak(tmp_path: Path) -> None:
    rows, points = stays(seed=3)
    later = [(key, when + timedelta(days=1), "", 1) for key, _, when in rows[:5]]
    write(tmp_path / "raw", "main.csv", "id,owner,when", as_stamps(rows))
    write(tmp_path / "raw", "series.csv", "id,at,x,y", as_stamps(points + later))
    gold = build(recipe_of(timeseries={"variables": ["x"]}), tmp_path / "raw", tmp_path / "lake")
    assert any(line.startswith("times: timeseries is never later") for line in verify(gold, deep=True))
    every = build(recipe_of(), tmp_path / "raw", tmp_path / "every")
    with pytest.raises(ValueError, match="in 5 samples the timeseries is later"):
        verify(every, deep=True)


@pytest.mark.parametrize("at", ["numbers", "timestamps"])
def test_nothing_is_claimed_of_times_that_cannot_be_compared(at: str, tmp_path: Path) -> None:
    rows, points = stays(seed=4)
    spell = {"numbers": lambda values: as_numbers(values, 1.0), "timestamps": as_stamps}
    other = {"numbers": "timestamps", "timestamps": "numbers"}
    write(tmp_path / "raw", "main.csv", "id,owner,when", spell[other[at]](rows))
    write(tmp_path / "raw", "series.csv", "id,at,x,y", spell[at](points))
    gold = build(recipe_of(), tmp_path / "raw", tmp_path / "lake")
    assert "times: the source knows none; nothing to compare" in verify(gold, deep=True)
    with pytest.raises(ValueError, match=f"series.csv is called absolute, but its 'at' holds {at} and source.time"):
        build(recipe_of(SERIES | {"absolute": True}), tmp_path / "raw", tmp_path / "lake2")


def test_steps_are_not_held_against_a_number_unless_they_are_called_absolute(tmp_path: Path) -> None:
    write(tmp_path / "raw", "main.csv", "id,owner,when", [(f"i{i}", f"o{i}", 3) for i in range(20)])
    write(tmp_path / "raw", "series.csv", "id,at,x,y", [(f"i{i}", t, t, i) for i in range(20) for t in range(5)])
    gold = build(recipe_of(), tmp_path / "raw", tmp_path / "lake")
    assert "t:timeseries" not in silver(gold)["i0"]
    gold = build(recipe_of(SERIES | {"absolute": True}), tmp_path / "raw", tmp_path / "lake2")
    with pytest.raises(ValueError, match="in 20 samples the timeseries is later than the label"):
        verify(gold, deep=True)


def test_an_unreadable_time_is_set_aside_and_its_row_is_in_no_split(tmp_path: Path) -> None:
    bad = ["soon", "17", "2015-02-30", "infinity", "nan", ""]
    good = [(f"g{i}", f"g{i}", (START + timedelta(days=i)).isoformat()) for i in range(100)]
    write(
        tmp_path / "raw", "main.csv", "id,owner,when", good + [(f"b{i}", f"b{i}", text) for i, text in enumerate(bad)]
    )
    write(tmp_path / "raw", "series.csv", "id,at,x,y", [(row[0], "2014-12-01", 1, i) for i, row in enumerate(good)])
    gold = build(recipe_of(split=CUT), tmp_path / "raw", tmp_path / "lake")
    reasons = ["not a time: when", "numbers and timestamps mixed: when", *["not a time: when"] * 3]
    assert quarantined(gold) == {
        ("main.csv", 101 + i, reason, text) for i, (reason, text) in enumerate(zip(reasons, bad[:5], strict=True))
    }
    assert set(silver(gold)) == {row[0] for row in good}
    assert Manifest.load(gold).counts["without a time, in no split"] == len(bad)
    whole = build(recipe_of(), tmp_path / "raw", tmp_path / "whole")  # without a time split the rows stay
    assert {key for key, row in silver(whole).items() if row["time"] is None} == {f"b{i}" for i in range(len(bad))}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source": SOURCE | {"time": None}}, "split.time cuts by time: name a column in source.time"),
        (
            {"source": SOURCE | {"time": None, "series": [SERIES | {"absolute": True}]}, "split": {}},
            "series.absolute compares with source.time",
        ),
    ],
)
def test_a_recipe_without_the_column_of_times_is_refused(
    change: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"name": "toy", "source": SOURCE, "timeseries": {}, "split": CUT} | change
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    assert main(["build", str(tmp_path / "r.yaml"), "--raw", str(tmp_path), "--lake", str(tmp_path / "lake")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("spell, proposed", [(as_stamps, True), (lambda rows: as_numbers(rows, 86_400.0), False)])
def test_init_proposes_a_column_of_timestamps_and_nothing_else(
    spell, proposed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = stays(seed=5)
    write(tmp_path / "raw", "main.csv", "id,owner,when,n", spell([(*row, i % 7) for i, row in enumerate(rows)]))
    assert main(["init", str(tmp_path / "raw" / "main.csv")]) == 0
    text = capsys.readouterr().out
    assert ("  # time: when" in text.splitlines()) == proposed
    tree = yaml.safe_load(text)
    assert "time" not in tree["source"]
    taken = yaml.safe_load(text.replace("  # time: when", "  time: when"))
    assert taken["source"].get("time") == ("when" if proposed else None)
    Recipe.model_validate(taken)
