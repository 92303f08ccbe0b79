"""`etl gc` removes what no manifest names, and nothing else; `etl diff` says what differs."""

import gzip
from pathlib import Path

import pytest

from etl.__main__ import main
from etl.build import build, build_plan, build_share
from etl.diff import diff
from etl.gc import collect
from etl.lake import lock
from etl.verify import verify
from lanistr.manifest import Manifest
from tests.etl.test_build import bytes_of, recipe_of, write_raw


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def add_rows(raw: Path) -> None:
    items = gzip.decompress((raw / "items.csv.gz").read_bytes()).decode()
    items = items.replace("i6,o3,no,", "i6,o3,yes,").replace("\ni7,o3,", "\nj7,o3,")
    (raw / "items.csv.gz").write_bytes(gzip.compress(f"{items}\nnew,o_new,yes,3.5,a".encode()))


def test_gc_leaves_what_the_manifest_names_and_what_is_not_ours(tmp_path: Path) -> None:
    raw, lake = write_raw(tmp_path / "raw"), tmp_path / "lake"
    gold = build(recipe_of(), raw, lake)
    add_rows(raw)
    build(recipe_of(), raw, lake)
    fresh = build(recipe_of(), raw, tmp_path / "fresh", refit=True)
    (gold / "notes.html").write_text("mine")
    (gold / "train" / ".x.tar.abc.tmp").write_text("left by a kill")
    (lake / "silver" / ".toy.old").mkdir()
    build_plan(recipe_of(name="other"), raw, lake)
    build_share(recipe_of(name="other"), raw, lake, 0, 2)
    before = files(lake)
    lines = collect(lake, dry_run=True)
    assert files(lake) == before
    assert lines[-1].endswith("MiB would be removed")
    with lock(lake, "toy"):
        assert "toy: is being built; passed over" in collect(lake, dry_run=True)
    collect(lake)
    assert {name.split("-")[1] for name in files(gold) if name.endswith(".tar")} == {
        name.split("-")[1] for name in files(fresh) if name.endswith(".tar")
    }
    manifest = Manifest.load(gold)
    named = {file for s in manifest.shards for file in (s.path, s.index)}
    assert files(gold) - named - {f for f in files(gold) if f.startswith("reports/")} == {
        "manifest.json",
        "notes.html",
        manifest.tokenizer.file if manifest.tokenizer else "",
    }
    assert len([f for f in files(gold) if f.startswith("reports/")]) == 3
    assert verify(gold)[-1].startswith("ok")
    assert not (lake / ".other.building").exists()
    assert not (lake / "silver" / ".toy.old").exists()
    assert collect(lake)[-1] == "0.0 MiB removed"


def test_after_gc_a_rebuild_still_skips_what_is_there(tmp_path: Path) -> None:
    raw, lake = write_raw(tmp_path / "raw"), tmp_path / "lake"
    gold = build(recipe_of(), raw, lake)
    before = bytes_of(gold)
    collect(lake)
    assert bytes_of(gold) == before


def test_gc_of_something_else_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gc", str(tmp_path)]) == 2
    assert "not a lake" in capsys.readouterr().err


def test_diff_counts_what_was_added_removed_and_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_raw(tmp_path / "raw")
    a = build(recipe_of(), raw, tmp_path / "a")
    assert diff(a, a) == f"the same: toy {Manifest.load(a).content_id[:16]}"
    add_rows(raw)
    (raw / "photos" / "i0.jpg").write_bytes((raw / "photos" / "i3.jpg").read_bytes())
    b = build(recipe_of(fit_from=str(a)), raw, tmp_path / "b")
    assert main(["diff", str(a), str(b)]) == 0
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["only in a"][3] == "1"  # i7 has another id now
    assert lines["only in b"][3] == "2"
    assert lines["changed"][1] == "2"  # another label, another photo
    assert lines["same"][1] == str(120 - 3)
    assert lines["schema and fit"] == ["schema", "and", "fit", "a", "b"]
    assert main(["diff", str(a), str(raw)]) == 2
