import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image

from etl import recipe as recipes
from etl.__main__ import main
from etl.build import build
from etl.cluster import InProcess, Pool
from etl.verify import verify
from lanistr.manifest import Manifest
from lanistr.transforms import TabularSpec, load_tokenizer, read_npy

RECIPE = {
    "name": "toy",
    "source": {
        "kind": "table",
        "main": "items.csv.gz",
        "id": "id",
        "group": "owner",
        "label": "label",
        "text": {"table": "notes.jsonl.gz", "columns": ["note"]},
        "image": "photos/{id}.jpg",
        "series": {"table": "series.csv", "id": "id", "time": "t", "variable": "v", "value": "x"},
    },
    "text": {"tokenizer": {"train": 200}, "max_tokens": 16},
    "image": {"size": 16},
    "tabular": {"numeric": ["weight"], "categorical": ["kind"]},
    "timeseries": {"max_steps": 8},
    "shard_size": 40,
}
N = 120


def write_raw(raw: Path) -> Path:
    """Items; every second has a note, every third a photo, every fourth a series."""
    (raw / "photos").mkdir(parents=True)
    rng = np.random.default_rng(0)
    items = ["id,owner,label,weight,kind"]
    notes, series = [], ["id,t,v,x"]
    for i in range(N):
        weight = "" if i % 10 == 0 else f"{rng.normal(5, 2):.3f}"
        items.append(f"i{i},o{i // 2},{'yes' if i % 3 else 'no'},{weight},{'abc'[i % 3]}")
        if i % 2 == 0:
            notes.append(json.dumps({"id": f"i{i}", "note": f"a note on item number {i} and its kind"}))
        if i % 3 == 0:
            pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(raw / "photos" / f"i{i}.jpg")
        if i % 4 == 0:
            series += [f"i{i},{t},{v},{rng.normal():.3f}" for t in range(3) for v in ("p", "q")]
    (raw / "items.csv.gz").write_bytes(gzip.compress("\n".join(items).encode()))
    (raw / "notes.jsonl.gz").write_bytes(gzip.compress("\n".join(notes).encode()))
    (raw / "series.csv").write_text("\n".join(series))
    return raw


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "raw")


def recipe_of(tree: dict | None = None, **changes: object) -> recipes.Recipe:
    return recipes.Recipe.model_validate({**(tree or RECIPE), **changes})


def bytes_of(gold: Path) -> dict[str, str]:
    return {
        str(p.relative_to(gold)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(gold.rglob("*"))
        if p.is_file()
    }


def tokenizer_of(gold: Path) -> Path:
    tokenizer = Manifest.load(gold).tokenizer
    assert tokenizer is not None
    return gold / tokenizer.file


def samples_of(gold: Path) -> dict[str, dict]:
    """Read by the library, not by us."""
    tars = [str(p) for p in sorted(gold.rglob("*.tar"))]
    found = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False, empty_check=False):
        found[sample["__key__"]] = sample
    return found


def test_same_input_gives_the_same_bytes_with_any_number_of_workers(raw: Path, tmp_path: Path) -> None:
    one = build(recipe_of(), raw, tmp_path / "a", executor=InProcess())
    two = build(recipe_of(), raw, tmp_path / "b", executor=Pool(2))
    assert bytes_of(one) == bytes_of(two)


def test_another_process_with_another_hash_seed_gives_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(RECIPE))
    made = []
    for seed in ("1", "2"):
        lake = tmp_path / seed
        command = ["build", str(tmp_path / "toy.yaml"), "--raw", str(raw), "--lake", str(lake), "--workers", "1"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-m", "etl", *command], check=True, env=environment, capture_output=True)
        made.append(bytes_of(lake / "gold" / "toy"))
    assert made[0] == made[1]


def test_webdataset_reads_our_tars_and_a_missing_modality_is_a_missing_member(raw: Path, tmp_path: Path) -> None:
    gold = build(recipe_of(), raw, tmp_path / "lake")
    samples = samples_of(gold)
    assert len(samples) == N
    for sample in samples.values():
        present = json.loads(sample["json"])["modalities"]
        members = {
            "text": {"tok.npy"},
            "image": {"jpg"},
            "tabular": {"tab.npy"},
            "timeseries": {"ts.npy", "tsmask.npy"},
        }
        expected = {"json"}.union(*(members[name] for name in present))
        assert {key for key in sample if not key.startswith("__")} == expected
    count = {name: sum(name in json.loads(s["json"])["modalities"] for s in samples.values()) for name in members}
    assert count == {"text": N // 2, "image": N // 3, "tabular": N, "timeseries": N // 4}


def test_verify_passes_on_a_good_dataset_and_finds_a_flipped_byte(raw: Path, tmp_path: Path) -> None:
    gold = build(recipe_of(), raw, tmp_path / "lake")
    assert verify(gold)[-1].startswith("ok")
    for path in [*gold.rglob("*.tar"), *gold.rglob("*.parquet"), tokenizer_of(gold)]:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="sha256 differs"):
            verify(gold)
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def test_groups_never_straddle_splits(raw: Path, tmp_path: Path) -> None:
    gold = build(recipe_of(), raw, tmp_path / "lake")
    seen: dict[str, set[str]] = {}
    for path in gold.rglob("*.parquet"):
        for group in pq.read_table(path)["group_hash"].to_pylist():
            seen.setdefault(group, set()).add(path.parent.name)
    assert all(len(splits) == 1 for splits in seen.values())
    assert len(seen) == N // 2


def test_statistics_and_vocabularies_come_from_train_only(raw: Path, tmp_path: Path) -> None:
    gold = build(recipe_of(), raw, tmp_path / "lake")
    manifest = Manifest.load(gold)
    spec = TabularSpec.model_validate(manifest.modalities["tabular"].spec)
    rows = [read_npy(s["tab.npy"]) for s in samples_of(gold / "train").values()]
    weights = np.array([row[0] for row in rows], dtype=np.float64)
    weights = weights[np.isfinite(weights)]
    assert spec.numeric[0].mean == pytest.approx(weights.mean(), rel=1e-6)
    assert spec.numeric[0].std == pytest.approx(weights.std(), rel=1e-6)
    assert spec.numeric[0].quantiles == pytest.approx(np.quantile(weights, np.linspace(0, 1, 129)), rel=1e-6)
    assert set(spec.categorical[0].values) <= {"a", "b", "c"}
    tokenizer = load_tokenizer(tokenizer_of(gold))
    assert tokenizer.encode("a note on item", add_special_tokens=False).tokens == ["a", "note", "on", "item"]


def test_quantiles_of_many_values_come_from_a_repeatable_even_draw(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantiles(lake: str) -> np.ndarray:
        gold = build(recipe_of(), raw, tmp_path / lake)
        assert any("numeric columns" in line for line in verify(gold, deep=True))
        return np.array(Manifest.load(gold).modalities["tabular"].spec["numeric"][0]["quantiles"])

    whole = quantiles("whole")
    for module in ("etl.fit", "etl.refit"):
        monkeypatch.setattr(f"{module}.QUANTILE_VALUES", N // 3)
    drawn = quantiles("drawn")
    assert (drawn == quantiles("again")).all()
    assert (drawn != whole).any()
    assert abs(np.median(drawn) - np.median(whole)) < 0.2 * np.ptp(whole)


def test_a_rebuild_keeps_its_fit_until_told_otherwise(raw: Path, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    first = Manifest.load(build(recipe_of(), raw, lake)).modalities["tabular"].spec
    text = gzip.decompress((raw / "items.csv.gz").read_bytes()).decode()
    more = text + "".join(f"\nx{i},p{i},yes,900,d" for i in range(40))
    (raw / "items.csv.gz").write_bytes(gzip.compress(more.encode()))
    assert Manifest.load(build(recipe_of(), raw, lake)).modalities["tabular"].spec == first
    assert Manifest.load(build(recipe_of(), raw, lake, refit=True)).modalities["tabular"].spec != first


def test_fit_from_takes_the_other_datasets_tokenizer_and_fit(raw: Path, tmp_path: Path) -> None:
    gold = build(recipe_of(), raw, tmp_path / "lake")
    other = Manifest.load(build(recipe_of(name="other", fit_from=str(gold)), raw, tmp_path / "lake"))
    base = Manifest.load(gold)
    assert other.tokenizer == base.tokenizer
    assert {n: m.spec for n, m in other.modalities.items()} == {n: m.spec for n, m in base.modalities.items()}


def test_bad_records_are_set_aside_with_line_and_reason(raw: Path, tmp_path: Path) -> None:
    notes = gzip.decompress((raw / "notes.jsonl.gz").read_bytes()).decode().splitlines()
    notes[3] = notes[3][:-4]
    notes.append('{"id": "nobody", "note": "whose?"}')
    notes.append('{"id": "i0", "note": "again"}')
    (raw / "notes.jsonl.gz").write_bytes(gzip.compress("\n".join(notes).encode()))
    items = gzip.decompress((raw / "items.csv.gz").read_bytes()).decode().splitlines()
    items[6] = items[6].replace(items[6].split(",")[3], "heavy")
    (raw / "items.csv.gz").write_bytes(gzip.compress("\n".join(items).encode()))
    (raw / "photos" / "i3.jpg").write_bytes((raw / "photos" / "i3.jpg").read_bytes()[:100])
    gold = build(recipe_of(), raw, tmp_path / "lake")
    assert Manifest.load(gold).quarantine == {
        "broken image": 1,
        "duplicate id": 1,
        "not a JSON object": 1,
        "not a number: weight": 1,
        "unknown id": 1,
    }
    bad = [
        row
        for p in (tmp_path / "lake" / "quarantine" / "toy").glob("*.parquet")
        for row in pq.read_table(p).to_pylist()
    ]
    lines = {row["reason"]: (row["file"], row["line"]) for row in bad}
    assert lines["not a JSON object"] == ("notes.jsonl.gz", 4)
    assert lines["not a number: weight"] == ("items.csv.gz", 6)
    assert len(samples_of(gold)) == N


@pytest.mark.parametrize("packing", [".tsv", ".csv.zst", ".tsv.gz"])
def test_packed_and_tab_separated_tables_give_the_same_samples(packing: str, raw: Path, tmp_path: Path) -> None:
    expected = samples_of(build(recipe_of(), raw, tmp_path / "a"))
    plain = gzip.decompress((raw / "items.csv.gz").read_bytes())
    plain = plain.replace(b",", b"\t") if ".tsv" in packing else plain
    name = f"items{packing}"
    packed = {".gz": gzip.compress, ".zst": lambda b: pa.Codec("zstd").compress(b, asbytes=True)}
    (raw / name).write_bytes(packed.get(Path(name).suffix, bytes)(plain))
    source = {**RECIPE["source"], "main": name}
    found = samples_of(build(recipe_of(source=source), raw, tmp_path / "b"))
    assert found.keys() == expected.keys()
    members = [m for m in next(iter(expected.values())) if not m.startswith("__") and m != "meta.json"]
    assert all(found[key].get(m) == expected[key].get(m) for key in expected for m in members)


def test_a_truncated_zst_is_one_line(raw: Path, tmp_path: Path) -> None:
    packed = pa.Codec("zstd").compress(np.random.default_rng(0).bytes(50_000), asbytes=True)
    (raw / "items.csv.zst").write_bytes(packed[:20_000])
    with pytest.raises(ValueError, match=r"items\.csv\.zst: truncated or corrupt zstd"):
        build(recipe_of(source={**RECIPE["source"], "main": "items.csv.zst"}), raw, tmp_path / "lake")


def test_too_many_bad_records_stop_the_run_and_leave_their_quarantine(raw: Path, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    gold = build(recipe_of(), raw, lake)
    before = bytes_of(gold)
    notes = gzip.decompress((raw / "notes.jsonl.gz").read_bytes()).decode().splitlines()
    notes[3] = notes[7] = "{"
    (raw / "notes.jsonl.gz").write_bytes(gzip.compress("\n".join(notes).encode()))
    with pytest.raises(ValueError, match=r"2 of .* raw records are bad, more than --max-bad 0\.001: not a JSON object"):
        build(recipe_of(), raw, lake, max_bad=0.001)
    assert bytes_of(gold) == before
    assert pq.read_table(lake / "quarantine" / "toy" / "notes.jsonl.gz.parquet").num_rows == 2
    assert build(recipe_of(), raw, lake, max_bad=0.1) == gold


def test_an_image_name_cannot_leave_the_raw_folder(raw: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.jpg")
    table = pa.table({"id": [f"r{i}" for i in range(60)], "path": ["../secret.jpg"] * 60, "weight": [1.0] * 60})
    pq.write_table(table, raw / "items.parquet")
    tree = {
        "name": "toy",
        "source": {"kind": "table", "main": "items.parquet", "id": "id", "image": "{path}"},
        "image": {"size": 16},
        "tabular": {"numeric": ["weight"]},
    }
    gold = build(recipe_of(tree), raw, tmp_path / "lake")
    assert Manifest.load(gold).quarantine == {"image outside of the raw folder": 60}
    assert not any("jpg" in sample for sample in samples_of(gold).values())


def run(*arguments: str) -> int:
    return main(list(arguments))


def test_bad_input_is_one_line_exit_code_2_and_nothing_half_written(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, lake = tmp_path / "toy.yaml", tmp_path / "lake"

    def attempt(tree: dict, message: str) -> None:
        path.write_text(yaml.safe_dump(tree))
        assert run("build", str(path), "--raw", str(raw), "--lake", str(lake)) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
        assert not lake.exists() or {p.name for p in lake.iterdir()} <= {".toy.lock"}

    attempt({**RECIPE, "shardsize": 3}, "unknown key 'shardsize'; did you mean 'shard_size'?")
    attempt(
        {**RECIPE, "tabular": {"numeric": ["wieght"]}}, "no column 'wieght'; there are id, kind, label, owner, weight"
    )
    whole = (raw / "notes.jsonl.gz").read_bytes()
    (raw / "notes.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    attempt(RECIPE, "notes.jsonl.gz: truncated or corrupt gzip")
    assert run("verify", str(raw)) == 2
    assert "no manifest.json" in capsys.readouterr().err


def test_a_failed_rebuild_leaves_the_earlier_dataset_as_it_was(raw: Path, tmp_path: Path) -> None:
    gold = build(recipe_of(), raw, tmp_path / "lake")
    before = bytes_of(gold)
    (raw / "series.csv").write_text("nothing,of,use\n1,2,3\n")
    with pytest.raises(ValueError, match=r"series\.csv: no column 'id'"):
        build(recipe_of(), raw, tmp_path / "lake")
    assert bytes_of(gold) == before


def test_require_keeps_parallel_samples_only(raw: Path, tmp_path: Path) -> None:
    gold = build(recipe_of(require=["text", "image", "tabular"]), raw, tmp_path / "lake")
    assert len(samples_of(gold)) == N // 6


@pytest.mark.parametrize("name", ["demo", "amazon_giftcards", "amazon_office", "amazon_fashion", "amazon_beauty"])
def test_shipped_recipes_are_valid(name: str) -> None:
    assert recipes.load(name).name == name
