"""The `table` source and what leads to it: init, convert, and the recipes made with them on real data."""

import csv
import gzip
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from etl import recipe as recipes
from etl.__main__ import main
from etl.build import build
from etl.convert import read_ts
from etl.recipe import Recipe
from lanistr.manifest import Manifest
from lanistr.transforms import read_npy

DATA = Path(os.environ.get("LANISTR_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
APPSTREAM, CDDA, UEA = DATA / "debian_appstream", DATA / "cdda_items", DATA / "timeseries_uea"
VOCABULARY = DATA / "bert_vocab_minilm" / "vocab.txt"
needs_data = pytest.mark.skipif(not APPSTREAM.is_dir(), reason=f"no real data at {DATA} (set LANISTR_DATA)")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def recipe_of(source: dict, **blocks: object) -> Recipe:
    tree = {"name": "toy", "source": {"kind": "table", **source}, "split": {"train": 1.0, "val": 0, "test": 0}}
    return Recipe.model_validate({**tree, **blocks})


def present(gold: Path, bit: int) -> int:
    return sum(n for s in Manifest.load(gold).shards for mask, n in s.n_by_mask.items() if int(mask) >> bit & 1)


def total(gold: Path) -> int:
    return sum(shard.n for shard in Manifest.load(gold).shards)


def test_mains_side_tables_keep_and_composite_ids_give_one_table_of_samples(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write(raw / "a.csv", "shop,nr,maker,kind,n\ns,1,m1,x,1\ns,2,m2,y,2\nt,1,m1,z,3\nt,1,m1,x,4\n")
    write(raw / "b.jsonl", '{"nr": 9, "maker": "m3", "m": 5}\n{"nr": 8, "kind": "x", "maker": null}\n')
    write(raw / "makers.csv", "id,city,about\nm1,Rome,old\nm2,Oslo,new\nm2,Bonn,again\nm9,Kyiv,unused\n")
    source = {
        "main": ["a.csv", "b.jsonl"],
        "id": ["shop", "nr"],
        "keep": {"kind": ["x", "y", None]},
        "join": [{"table": "makers.csv", "on": "maker", "id": "id", "columns": ["city", "about"]}],
        "text": {"columns": ["about", "kind"]},
    }
    tabular = {"numeric": ["n"], "categorical": ["city"]}
    gold = build(recipe_of(source, tabular=tabular, text={"tokenizer": {"train": 100}}), raw, tmp_path / "lake")
    manifest = Manifest.load(gold)
    assert manifest.quarantine == {"duplicate id": 1}
    assert manifest.counts == {
        "rows of a.csv": 4,
        "rows of b.jsonl": 2,
        "left out by keep: kind": 1,
        "duplicates": 0,
        "rows of makers.csv": 4,
        "rows joined with makers.csv": 3,
    }
    assert total(gold) == 5
    assert manifest.modalities["tabular"].spec["categorical"][0]["values"] == ["Rome", "Oslo"]


def test_wide_and_long_series_make_the_same_points(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write(raw / "main.csv", "id\na\nb\n")
    rng = np.random.default_rng(0)
    wide, long = ["id,t,u,v"], ["id,t,name,x"]
    for key in "ab":
        for t in range(5):
            u, v = rng.normal(size=2).round(3)
            wide.append(f"{key},{t},{u},{'' if t == 2 else v}")
            long.append(f"{key},{t},u,{u}")
            long += [] if t == 2 else [f"{key},{t},v,{v}"]
    write(raw / "wide.csv", "\n".join(wide))
    write(raw / "long.csv", "\n".join(long))
    tables = {
        "wide": {"table": "wide.csv", "id": "id", "time": "t", "values": ["u", "v"]},
        "long": {"table": "long.csv", "id": "id", "time": "t", "variable": "name", "value": "x"},
    }
    made = {}
    for name, table in tables.items():
        recipe = recipe_of({"main": "main.csv", "id": "id", "series": table}, timeseries={"max_steps": 9})
        gold = build(recipe, raw, tmp_path / name)
        made[name] = [shard.sha256 for shard in Manifest.load(gold).shards]
    assert made["wide"] == made["long"]
    both = recipe_of({"main": "main.csv", "id": "id", "series": list(tables.values())}, timeseries={"max_steps": 9})
    assert Manifest.load(build(both, raw, tmp_path / "both")).quarantine == {"duplicate point": 18}


def test_groups_may_be_told_by_the_beginning_of_a_column(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write(raw / "main.csv", "id,d,n\n" + "".join(f"{i},{'abcde'[i % 5]}-{i},{i}\n" for i in range(50)))
    recipe = recipe_of({"main": "main.csv", "id": "id", "group": "d", "group_chars": 1}, tabular={"numeric": ["n"]})
    gold = build(recipe, raw, tmp_path / "lake")
    groups = {g for p in gold.rglob("*.parquet") for g in pq.read_table(p)["group_hash"].to_pylist()}
    assert len(groups) == 5


@pytest.mark.parametrize("kind", ["csv.gz", "jsonl", "parquet", "csv.zst"])
def test_a_url_is_read_as_a_file_is(kind: str, tmp_path: Path) -> None:
    rows = [{"id": f"i{i}", "n": str(i)} for i in range(30)]
    if kind == "jsonl":
        data = "\n".join(map(json.dumps, rows)).encode()
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x")
        data = (tmp_path / "x").read_bytes()
    else:
        text = ("id,n\n" + "".join(f"{r['id']},{r['n']}\n" for r in rows)).encode()
        data = gzip.compress(text) if kind == "csv.gz" else pa.Codec("zstd").compress(text, asbytes=True)
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/shop/part-0.{kind}", data)
    memory.pipe(f"/shop/part-1.{kind}", data.replace(b"i1", b"j1") if kind == "jsonl" else data)
    (tmp_path / "raw").mkdir()
    one = recipe_of({"main": f"memory://shop/part-0.{kind}", "id": "id"}, tabular={"numeric": ["n"]})
    assert total(build(one, tmp_path / "raw", tmp_path / "one")) == 30
    many = recipe_of({"main": f"memory://shop/part-*.{kind}", "id": "id"}, tabular={"numeric": ["n"]})
    manifest = Manifest.load(build(many, tmp_path / "raw", tmp_path / "many"))
    assert [p["file"] for p in manifest.parents] == [f"memory:///shop/part-{i}.{kind}" for i in (0, 1)]
    assert manifest.counts[f"rows of memory://shop/part-*.{kind}"] == 60
    assert manifest.quarantine == {"duplicate id": 30 - (11 if kind == "jsonl" else 0)}


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_init_guesses_the_demo_shops_recipe_and_it_builds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = tmp_path / "shop", tmp_path / "shop.yaml"
    assert run("synth", "--out", raw, "--samples", 200) == 0
    tables = sorted(path for path in raw.iterdir() if path.is_file() and path.suffix in (".gz", ".parquet"))
    assert run("init", *tables, "--out", out) == 0
    guessed, shipped = recipes.load(out), recipes.load("demo")
    assert guessed.source.model_dump(exclude={"series", "text"}) == shipped.source.model_dump(
        exclude={"series", "text"}
    )
    assert [s.model_dump() for s in guessed.source.series] == [shipped.source.series.model_dump()]
    assert guessed.source.text.columns == shipped.source.text.columns
    assert guessed.tabular == shipped.tabular
    assert run("init", *tables, "--out", out) == 2
    assert "--force" in capsys.readouterr().err
    assert run("init", *tables, "--out", out, "--force") == 0
    gold = build(guessed, raw, tmp_path / "lake")
    assert total(gold) == 200
    assert 0 < present(gold, 1) < 200


def test_init_warns_of_a_column_that_tells_the_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        ["patient_id", "outcome", "ward", "score"],
        *([f"p{i // 3}", "yn"[i % 2], "AB"[i % 2], str(i % 7)] for i in range(300)),
    ]
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", *rows[0]], *([str(i), *row] for i, row in enumerate(rows[1:]))])
    assert run("init", tmp_path / "t.csv") == 0
    text = capsys.readouterr().out
    tree = yaml.safe_load(text)
    assert (tree["source"]["id"], tree["source"]["group"], tree["source"]["label"]) == ("id", "patient_id", "outcome")
    leaks = [line for line in text.splitlines() if "a leak?" in line]
    assert len(leaks) == 1
    assert leaks[0].strip().startswith("- ward")


@pytest.mark.parametrize(
    "name, message",
    [
        ("x.ts", "etl convert"),
        ("x.zip", "etl convert"),
        ("x.docx", "unknown kind"),
        ("none.csv", "no such file"),
        ("empty.csv", "empty"),
    ],
)
def test_init_says_in_one_line_what_it_cannot_read(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for there in ("x.ts", "x.zip", "x.docx", "empty.csv"):
        (tmp_path / there).write_bytes(b"")
    assert run("init", tmp_path / name) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("name", ["../out.txt", "/tmp/out.txt", "a/../../out.txt", "..\\out.txt"])
def test_convert_unpacks_nothing_outside_of_its_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("good.txt", "x")
        archive.writestr(name, "x")
    assert run("convert", tmp_path / "x.zip", "--out", tmp_path / "out") == 2
    assert "outside of" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.txt"))


@pytest.mark.parametrize("text", ["", "@data", "@timeStamps true\n@data\n(0,1):a", "1,2:3,4"])
def test_convert_says_in_one_line_what_is_no_uea_file(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.ts").write_text(text)
    code = run("convert", tmp_path / "x.ts", "--out", tmp_path / "out")
    assert code == (0 if text == "@data" else 2)
    assert "Traceback" not in capsys.readouterr().err


@needs_data
@pytest.mark.parametrize("problem, cases, dimensions", [("BasicMotions", 80, 6), ("JapaneseVowels", 640, 12)])
def test_uea_series_arrive_unchanged_and_init_sees_a_wide_table(
    problem: str, cases: int, dimensions: int, tmp_path: Path
) -> None:
    files = [UEA / f"{problem}_{part}.ts" for part in ("TRAIN", "TEST")]
    assert run("convert", *files, "--out", tmp_path / "raw") == 0
    assert (
        run("init", tmp_path / "raw" / "cases.csv", tmp_path / "raw" / "series.csv", "--out", tmp_path / "r.yaml") == 0
    )
    guessed = recipes.load(tmp_path / "r.yaml")
    (series,) = guessed.source.series
    assert (series.id, series.time, series.values) == ("case", "step", [f"dim_{i}" for i in range(dimensions)])
    if problem == "JapaneseVowels":
        return
    gold = build(recipes.load("uea_basic_motions"), tmp_path / "raw", tmp_path / "lake")
    assert (total(gold), present(gold, 0)) == (cases, cases)
    assert Manifest.load(gold).labels == ["Badminton", "Running", "Standing", "Walking"]
    expected = [np.array(case, dtype=np.float32).T for file in files for _, case in read_ts(file)]
    stored = []
    for path in gold.rglob("*.tar"):
        with tarfile.open(path) as tar:
            stored += [read_npy(tar.extractfile(m).read()) for m in tar if m.name.endswith(".ts.npy")]
    assert sorted(array.tobytes() for array in stored) == sorted(array.tobytes() for array in expected)
    assert Manifest.load(gold).quarantine == {}


@needs_data
def test_cdda_items_keep_their_sprites_and_variants_stay_together(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    shutil.copy(CDDA / "items_cuteclysm.csv", raw)
    assert run("convert", CDDA / "sprites_cuteclysm.zip", "--out", raw) == 0
    gold = build(recipes.load("cdda"), raw, tmp_path / "lake")
    with open(CDDA / "items_cuteclysm.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert total(gold) == len(rows) == 5811
    assert present(gold, 1) == sum(bool(row["sprite"]) for row in rows)
    assert len(Manifest.load(gold).labels) == 11


@needs_data
@pytest.mark.slow
def test_appstream_has_63416_samples_and_97_percent_lack_the_image(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for path in (APPSTREAM / "components.csv", APPSTREAM / "packages_no_icon.csv.gz", VOCABULARY):
        shutil.copy(path, raw)
    assert run("convert", APPSTREAM / "icons_64px.zip", "--out", raw) == 0
    tables = [raw / "components.csv", raw / "packages_no_icon.csv.gz"]
    assert run("init", *tables, "--out", tmp_path / "guess.yaml") == 0
    guessed, edited = recipes.load(tmp_path / "guess.yaml"), recipes.load("appstream")
    for field in ("main", "id", "label", "image"):
        assert getattr(guessed.source, field) == getattr(edited.source, field)
    gold = build(edited, raw, tmp_path / "lake")
    manifest = Manifest.load(gold)
    assert total(gold) == 63_416
    assert round(100 * (1 - present(gold, 1) / total(gold))) == 97
    assert present(gold, 1) == 1_994
    assert manifest.counts["left out by keep: component_type"] == 2378 - 1999
    assert len(manifest.labels) == 10
    assert manifest.quarantine == {}
