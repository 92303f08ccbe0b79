"""`etl verify --deep`: passes on what is right; each planted fault is named."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from etl.__main__ import main
from etl.build import build
from etl.verify import verify
from lanistr.manifest import Manifest
from tests.etl.test_build import RECIPE, recipe_of, write_raw


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    return build(recipe_of(), write_raw(folder / "raw"), folder / "lake")


@pytest.fixture
def gold(made: Path, tmp_path: Path) -> Path:
    """A copy of the whole lake."""
    shutil.copytree(made.parents[1], tmp_path / "lake")
    return tmp_path / "lake" / "gold" / made.name


def edit(gold: Path, change: Callable[[Manifest], None]) -> None:
    """Change the manifest and give it the id of its new content, as a faulty build would."""
    manifest = Manifest.load(gold)
    change(manifest)
    manifest.content_id = manifest.compute_content_id()
    manifest.save(gold)


def test_a_good_dataset_is_proved(gold: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(gold), "--deep"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "members: 120 of 120 samples looked into",
        "content: no whole sample lies in two splits",
        "fit: 1 numeric columns and 1 vocabularies recomputed",
        "fit: 2 channels recomputed",
        "lake: 120 samples are rows of silver",
        "lake: 120 rows of 2 columns hold what silver holds",
        "split: the rule (hash) gives every row the split that it is in",
        "quarantine: 0 records",
        "fit: tokenizer trained again",
        "leak? column kind predicts label",
        "leak? presence of image predicts label",
    ):
        assert line in printed


def test_without_its_lake_a_dataset_is_still_proved(made: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere" / "toy"
    shutil.copytree(made, alone)
    lines = verify(alone, deep=True)
    assert any(line.startswith("lake: not around") for line in lines)
    assert any("channels recomputed" in line for line in lines)


FAULTS: dict[str, tuple[Callable[[Manifest], None], str]] = {
    "mean of everything": (
        lambda m: m.modalities["tabular"].spec["numeric"][0].update(mean=4.0),
        "fit: column weight has mean 4 ",
    ),
    "std": (lambda m: m.modalities["tabular"].spec["numeric"][0].update(std=9.0), "fit: column weight has mean"),
    "a quantile": (
        lambda m: m.modalities["tabular"].spec["numeric"][0]["quantiles"].__setitem__(7, 0.0),
        "fit: column weight has other quantiles",
    ),
    "order of a vocabulary": (
        lambda m: m.modalities["tabular"].spec["categorical"][0]["values"].reverse(),
        "column kind",
    ),
    "a value from outside of train": (
        lambda m: m.modalities["tabular"].spec["categorical"][0]["values"].append("z"),
        "column kind: value 'z' is known but not in train",
    ),
    "a channel": (lambda m: m.modalities["timeseries"].spec["mean"].__setitem__(1, 3.0), "fit: channel q has mean 3"),
    "vocabulary too small": (lambda m: m.modalities["text"].spec.update(vocab_size=20), "a token beyond the vocab"),
    "special token": (lambda m: m.modalities["text"].spec.update(sep_id=4), "do not run from"),
    "image size": (lambda m: m.modalities["image"].spec.update(size=8), "shorter side above 8"),
    "steps": (lambda m: m.modalities["timeseries"].spec.update(max_steps=2), "3 steps, at most 2"),
    "labels": (lambda m: m.labels.pop(), "label 1 of 1 classes"),
    "quarantine": (lambda m: m.quarantine.update({"broken image": 3}), "holds {}, the manifest says"),
    "salt": (lambda m: m.split_rule.update(salt="other"), "not in the split that the split rule gives"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_build_is_named(fault: str, gold: Path) -> None:
    change, message = FAULTS[fault]
    edit(gold, change)
    verify(gold)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("{", r"\{")):
        verify(gold, deep=True)


def test_a_fit_without_quantiles_is_recomputed_as_far_as_it_goes(gold: Path) -> None:
    edit(gold, lambda m: m.modalities["tabular"].spec["numeric"][0].update(quantiles=[]))
    assert any("numeric columns" in line for line in verify(gold, deep=True))


def change_silver(gold: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    (folder,) = gold.parents[1].glob(f"silver/{gold.name}")
    for path in folder.rglob("*.parquet"):
        if "samples" in str(path.relative_to(folder)):
            pq.write_table(change(pq.read_table(path)), path)


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    names = table.column_names
    return table.set_column(names.index(name), name, values) if name in names else table.append_column(name, values)


def test_rows_of_another_build_or_split_or_label_are_found(gold: Path) -> None:
    change_silver(gold, lambda t: with_column(t, "label", pc.if_else(pc.equal(t["label"], "yes"), "no", "yes")))
    with pytest.raises(ValueError, match="another label in silver"):
        verify(gold, deep=True)
    change_silver(gold, lambda t: with_column(t, "split", pa.array(["train"] * len(t))))
    with pytest.raises(ValueError, match="another split in silver"):
        verify(gold, deep=True)
    change_silver(gold, lambda t: with_column(t, "row_id", pc.binary_join_element_wise(t["row_id"], "x", "")))
    with pytest.raises(ValueError, match="no rows of silver"):
        verify(gold, deep=True)


def test_a_feature_later_than_its_label_is_found(gold: Path) -> None:
    def timed(late: float) -> Callable[[pa.Table], pa.Table]:
        def change(table: pa.Table) -> pa.Table:
            table = with_column(table, "time", pa.array([48.0] * len(table)))
            return with_column(table, "t:timeseries", pa.array([late] * len(table)))

        return change

    change_silver(gold, timed(48.0))
    assert any("timeseries is never later than the label (30 samples" in line for line in verify(gold, deep=True))
    change_silver(gold, timed(49.0))
    with pytest.raises(ValueError, match="in 30 samples the timeseries is later than the label"):
        verify(gold, deep=True)


def test_a_whole_sample_on_both_sides_is_an_error_a_short_text_is_not(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    long = "this very long note says the same again and again in thirty words or so " * 2
    tree = {
        "name": "twins",
        "source": {
            "kind": "table",
            "main": "t.jsonl",
            "id": "id",
            "text": {"columns": ["note"]},
        },
        "text": {"tokenizer": {"train": 200}, "max_tokens": 64},
    }
    for name, note in (("short", "great"), ("long", long)):
        rows = [{"id": f"{name}{i}", "note": note if i < 40 else f"note {i}"} for i in range(60)]
        (raw / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        gold = build(recipe_of(tree, name=name), raw, tmp_path / "lake")
        if name == "short":
            lines = verify(gold, deep=True)
            assert any("with nothing but a short text or a row are in train too" in line for line in lines)
        else:
            with pytest.raises(ValueError, match=r"samples of val are in train as well, .*give both the same group"):
                verify(gold, deep=True)


def test_a_kept_fit_that_no_longer_belongs_to_the_data_is_said(gold: Path, made: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(made.parents[2] / "raw", raw)
    text = gzip.decompress((raw / "items.csv.gz").read_bytes()).decode()
    more = text + "".join(f"\nx{i},p{i},yes,900,d" for i in range(40))
    (raw / "items.csv.gz").write_bytes(gzip.compress(more.encode()))
    rebuilt = build(recipe_of(), raw, gold.parents[1])
    assert any("made from another train split" in line for line in verify(rebuilt, deep=True))
    other = build(recipe_of(RECIPE, name="other", fit_from=str(made)), raw, tmp_path / "lake2")
    assert any(line.startswith("fit: not recomputed, it is that of toy") for line in verify(other, deep=True))
    fresh = build(recipe_of(), raw, gold.parents[1], refit=True)
    assert any("1 vocabularies recomputed" in line for line in verify(fresh, deep=True))
