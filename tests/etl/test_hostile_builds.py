"""Hostile values through a whole build: nothing is lost, nothing outside the lake is written, nothing outside raw is read."""

import csv
import gzip
import hashlib
import io
import json
import os
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from etl.__main__ import main
from etl.build import build
from etl.recipe import Recipe
from etl.verify import verify
from lanistr.manifest import Manifest

SECRET = b"TOP-SECRET-CANARY"
KEYS = [
    "a.b", "..", ".", "a/b", "/", "/etc/passwd", "../../x", "a\\b", "a b", " lead", "trail ", "é", "日本", "\u202ereversed", "👩‍👩‍👧",
    "'; drop table samples; --", '"quoted"', "{id}", "%s", "$HOME", "`ls`", "a\nb", "a\tb", "NULL", "None", "nan", "0", "00", "1e5",
    "x" * 5000, "|", "a|b", "*", "?", "[a]", "~", "-", "--", "#", "CON", "a\u0000b", "\u0301", "\ufeff", "\ufffd",
]  # fmt: skip
NUMBERS = {
    "1": True, " 2 ": True, "1e5": True, "-0": True, "+3": True, ".5": True, "5.": True, "1e-300": True, "16777217": True,
    "NaN": False, "nan": False, "inf": False, "-Infinity": False, "1e400": False, "1e39": False, "1,5": False, "1_000": False,
    "0x10": False, "five": False, "١٢": False, "1 2": False, "--1": False, "2020-01-01": False, "true": False, "$5": False, "5%": False,
}  # fmt: skip
TIMES = {
    "1678-01-01": -9214560000.0, "2300-01-01 00:00:00": 10413792000.0, "0001-01-01": -62135596800.0, "9999-12-31": 253402214400.0,
    "2020-01-01T00:00:00+02:00": 1577829600.0, "2020-01-01T00:00:00Z": 1577836800.0, "2020-01-01 00:00:00": 1577836800.0,
    "2020-02-30": "not a time", "infinity": "not a time", "yesterday": "not a time", "12": "time: numbers and dates mixed",
    "inf": "not a time", "": "no time",
}  # fmt: skip


def write_csv(path: Path, rows: list[list[str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def recipe_of(source: dict, **blocks: object) -> Recipe:
    return Recipe.model_validate({"name": "hostile", "source": {"kind": "table", "id": "id", **source}, **blocks})


def quarantined(lake: Path) -> Counter[tuple[str, str]]:
    files = (lake / "quarantine" / "hostile").rglob("*.parquet")
    return Counter((row["reason"], row["raw"]) for path in files for row in pq.read_table(path).to_pylist())


def snapshot(folder: Path, without: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
        if not path.is_relative_to(without) and not path.is_fifo()
    }


def silver(lake: Path, name: str) -> list[dict]:
    found = sorted(
        p for p in (lake / "silver" / "hostile").rglob("*.parquet") if name in p.name or name in str(p.parent)
    )
    return [row for path in found for row in pq.read_table(path).to_pylist()]


def test_any_key_is_a_key(tmp_path: Path) -> None:
    raw, lake = tmp_path / "raw", tmp_path / "lake"
    (raw / "photos").mkdir(parents=True)
    (tmp_path / "x.jpg").write_bytes(SECRET)
    rows = [json.dumps({"id": key, "n": i, "owner": key, "kind": key, "label": key[:3]}) for i, key in enumerate(KEYS)]
    rows += [json.dumps({"id": key}) for key in KEYS[:5]] + ['{"id":null}', '{"id":""}', '{"n":1}']
    (raw / "items.jsonl").write_text("\n".join(rows), encoding="utf-8")
    before = snapshot(tmp_path, lake)
    source = {"main": "items.jsonl", "group": "owner", "label": "label", "image": "photos/{id}.jpg"}
    tabular = {"numeric": ["n"], "categorical": ["kind"]}
    gold = build(recipe_of(source, tabular=tabular, image={"size": 8}), raw, lake)
    manifest = Manifest.load(gold)
    assert sum(shard.n for shard in manifest.shards) == len(KEYS)
    assert {r: n for r, n in manifest.quarantine.items() if "image" not in r} == {"duplicate id": 5, "no id": 3}
    assert snapshot(tmp_path, lake) == before
    assert verify(gold)[-1].startswith("ok")


def test_numbers_are_finite_or_set_aside_with_their_text(tmp_path: Path) -> None:
    raw, lake = tmp_path / "raw", tmp_path / "lake"
    raw.mkdir()
    write_csv(raw / "items.csv", [["id", "n"], *([f"i{i}", value] for i, value in enumerate(NUMBERS)), ["none", ""]])
    build(
        recipe_of({"main": "items.csv"}, tabular={"numeric": ["n"]}, split={"train": 1.0, "val": 0, "test": 0}),
        raw,
        lake,
    )
    bad = quarantined(lake)
    assert {raw for _, raw in bad} == {value for value, good in NUMBERS.items() if not good}
    assert {reason.split(":")[0] for reason, _ in bad} == {"not a number", "not a finite float32"}


def test_dates_long_ago_and_far_ahead_survive_or_are_set_aside(tmp_path: Path) -> None:
    raw, lake = tmp_path / "raw", tmp_path / "lake"
    raw.mkdir()
    write_csv(raw / "items.csv", [["id"], *([f"i{i}"] for i in range(len(TIMES)))])
    rows = [[f"i{i}", time, str(i)] for i, time in enumerate(TIMES)] + [
        ["nobody", "2020-01-01", "1"],
        ["i0", "1678-01-01", "9"],
    ]
    write_csv(raw / "series.csv", [["id", "time", "v"], *rows])
    series = {"table": "series.csv", "id": "id", "time": "time", "values": ["v"]}
    recipe = recipe_of(
        {"main": "items.csv", "series": series}, timeseries={"max_steps": 4}, split={"train": 1.0, "val": 0, "test": 0}
    )
    gold = build(recipe, raw, lake)
    expected = Counter(reason for reason in TIMES.values() if isinstance(reason, str)) + Counter(
        ["unknown id", "duplicate point"]
    )
    assert Manifest.load(gold).quarantine == expected
    present = sum(s.n for s in Manifest.load(gold).shards) and sum(
        n for s in Manifest.load(gold).shards for mask, n in s.n_by_mask.items() if int(mask) & 1
    )
    assert present == sum(isinstance(time, float) for time in TIMES.values())


def png(width: int, height: int, data: bytes | None = None) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * (width + 1) * height, 9) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg(size: tuple[int, int] = (20, 30), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def bomb_jpeg() -> bytes:
    """A small file whose header says 65,000 x 65,000."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (9, 9)).save(buffer, "GIF")
    return buffer.getvalue()


def images() -> dict[str, tuple[bytes, bool]]:
    """File -> bytes, and whether it can be read."""
    rgba = io.BytesIO()
    Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(rgba, "PNG")
    return {
        "good.jpg": (jpeg(), True),
        "cmyk.jpg": ((lambda b: (Image.new("CMYK", (9, 9)).save(b, "JPEG"), b.getvalue())[1])(io.BytesIO()), True),
        "transparent.png": (rgba.getvalue(), True),
        "one.gif": (gif(), True),
        "one pixel.png": (png(1, 1), True),
        "wide.png": (png(30_000, 4), True),
        "zero.jpg": (b"", False),
        "cut.jpg": (jpeg((200, 200))[:400], False),
        "text.jpg": (b"<html>404</html>", False),
        "svg.jpg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", False),
        "bomb.jpg": (bomb_jpeg(), False),
        "30000.png": (png(30_000, 30_000, zlib.compress(b"\0")), False),
        "real 9000.png": (png(9_000, 9_000), False),
        "too wide for jpeg.png": (png(70_000, 4), False),
        "no data.png": (png(10, 10, b""), False),
        "bad zlib.png": (png(10, 10, b"\xff" * 30), False),
        "zero size.png": (png(0, 0, b""), False),
        "header.jpg": (b"\xff\xd8\xff", False),
        "gz.jpg": (gzip.compress(jpeg()), False),
        "noise.bmp": (b"BM" + bytes(range(256)), False),
        "noise.tif": (b"II*\0\xff\xff\xff\xff", False),
        "noise.gif": (b"GIF89a\xff\xff\xff\xff\xff\xff", False),
        "noise.webp": (b"RIFF\xff\xff\xff\xffWEBPVP8 ", False),
        "noise.ico": (b"\0\0\1\0\1\0\0\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", False),
        "noise.psd": (b"8BPS\0\1" + b"\xff" * 40, False),
        "noise.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", False),
    }


def test_image_names_cannot_leave_the_raw_folder_and_no_image_stops_a_build(tmp_path: Path) -> None:
    raw, lake, outside = tmp_path / "raw", tmp_path / "lake", tmp_path / "outside"
    for folder in (raw / "photos" / "folder.jpg", outside):
        folder.mkdir(parents=True)
    (outside / "secret.jpg").write_bytes(jpeg(comment=SECRET))
    made = images()
    for name, (data, _) in made.items():
        (raw / "photos" / name).write_bytes(data)
    os.mkfifo(raw / "photos" / "pipe.jpg")
    (raw / "photos" / "link.jpg").symlink_to(outside / "secret.jpg")
    (raw / "photos" / "linked").symlink_to(outside)
    (raw / "photos" / "loop.jpg").symlink_to(raw / "photos" / "loop.jpg")
    (raw / "photos" / "inside.jpg").symlink_to(raw / "photos" / "good.jpg")
    leaving = [
        "../outside/secret.jpg", "photos/../../outside/secret.jpg", str(outside / "secret.jpg"), "photos/link.jpg",
        "photos/linked/secret.jpg", "/etc/passwd", "/dev/zero", "/proc/self/environ", "..", "../", "photos/loop.jpg", "a\0b.jpg",
        "photos/good.jpg\0.png",
    ]  # fmt: skip
    absent = [
        "photos/none.jpg",
        "photos/folder.jpg",
        "photos/pipe.jpg",
        "photos/*.jpg",
        "http://localhost/x.jpg",
        "file:///etc/passwd",
        "",
        "photos/",
        ".",
    ]
    endless = ["photos/" + "x" * 300 + ".jpg", "x/" * 3000]
    names = [
        *(f"photos/{name}" for name in made),
        "photos/inside.jpg",
        "./photos/good.jpg",
        *leaving,
        *absent,
        *endless,
    ]
    rows = [json.dumps({"id": f"i{i}", "path": name}) for i, name in enumerate(names)]
    (raw / "items.jsonl").write_text("\n".join(rows))
    before = snapshot(tmp_path, lake)
    opened: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and watching and isinstance(arguments[0], str | bytes):
            opened.append(os.fsdecode(arguments[0]))

    watching = [True]
    sys.addaudithook(watch)
    gold = build(recipe_of({"main": "items.jsonl", "image": "{path}"}, image={"size": 16}), raw, lake)
    watching.clear()
    manifest = Manifest.load(gold)
    assert sum(shard.n for shard in manifest.shards) == len(names)
    with_image = sum(n for s in manifest.shards for mask, n in s.n_by_mask.items() if int(mask) & 1)
    assert with_image == sum(good for _, good in made.values()) + 2
    assert manifest.quarantine["broken image"] >= sum(not good for _, good in made.values())
    assert sum(manifest.quarantine.values()) == len(names) - with_image - len(absent)
    assert not [path for path in opened if str(outside) in path or path.startswith(("/etc/passwd", "/dev/zero"))]
    assert snapshot(tmp_path, lake) == before
    assert not any(SECRET in path.read_bytes() for path in lake.rglob("*") if path.is_file())
    assert verify(gold)[-1].startswith("ok")


RECIPE = {
    "name": "hostile",
    "source": {"kind": "table", "main": "t.csv", "id": "id"},
    "tabular": {"categorical": ["id"]},
}
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "t.csv: empty: not even a header"),
    "header only": (b"id\n", "no sample"),
    "no id column": (b"x\n1\n", "no column 'id'"),
    "ids all missing": (b"id,x\n,1\n,2\n", "no sample"),
    "utf-16 without a mark": ("id\n1\n".encode("utf-16-le"), "header is not readable: NUL byte"),
    "a jpeg": (jpeg(), "header is not readable"),
    "a zip bomb's beginning": (b"PK\x03\x04" + b"\0" * 100, "header is not readable"),
    "one endless line": (b"id," * 900_000, "there twice"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_hopeless_file_is_one_line_and_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, lake = tmp_path / "raw", tmp_path / "lake"
    raw.mkdir()
    (raw / "t.csv").write_bytes(FILES[case][0])
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["build", str(tmp_path / "r.yaml"), "--raw", str(raw), "--lake", str(lake), "--workers", "1"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    assert FILES[case][1] in said[-1]
    assert "Traceback" not in "".join(said)
    assert not (lake / "gold" / "hostile" / "manifest.json").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"main": "../t.csv"}, "outside of the raw folder"),
        ({"main": "/etc/passwd"}, "outside of the raw folder"),
        ({"main": "t.docx"}, "unknown kind of file .docx"),
        ({"main": "nothing://x/t.csv"}, "nothing"),
        ({"main": "memory://none/t.csv"}, "no such raw file"),
        ({"image": "{"}, "is not a template"),
        ({"image": "{}"}, "only column names"),
        ({"series": {"table": "s.csv", "id": "id", "time": "t"}}, "variable and value"),
        ({"keep": {"none": ["x"]}}, "no column 'none'"),
        ({"id": ["id", "ID"]}, "differs in case only"),
        ({"main": "t.csv", "id": "_row"}, "the name is reserved"),
    ],
)
def test_a_hopeless_recipe_is_one_line(
    change: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "t.csv").write_text("id\n1\n")
    (tmp_path / "raw" / "t.docx").write_text("id\n1\n")
    (tmp_path / "t.csv").write_text("id\n1\n")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**RECIPE, "source": {**RECIPE["source"], **change}}))
    assert (
        main(["build", str(tmp_path / "r.yaml"), "--raw", str(tmp_path / "raw"), "--lake", str(tmp_path / "lake")]) == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_truncated_file_stops_a_build_alone_is_set_aside_among_others_and_salvaged_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    table = b"id,n\n" + b"".join(b"%d,%d\n" % (i, i * i) for i in range(5000))
    (raw / "t-1.csv.gz").write_bytes(gzip.compress(table)[:9000])
    (raw / "t-2.csv.gz").write_bytes(gzip.compress(table.replace(b"\n", b"\nx")[:-1]))

    def attempt(main_table: str, *flags: str) -> tuple[int, str]:
        source = {"kind": "table", "main": main_table, "id": "id"}
        tree = {"name": "hostile", "source": source, "tabular": {"numeric": ["n"]}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
        arguments = [
            "build",
            str(tmp_path / "r.yaml"),
            "--raw",
            str(raw),
            "--lake",
            str(tmp_path / "lake"),
            "--workers",
            "1",
        ]
        code = main([*arguments, *flags])
        return code, capsys.readouterr().err

    code, said = attempt("t-1.csv.gz")
    assert code == 2
    assert "t-1.csv.gz: truncated or corrupt gzip" in said.splitlines()[-1]
    code, said = attempt("t-*.csv.gz")
    assert code == 0
    assert "quarantine: truncated or corrupt gzip: 1" in said
    manifest = Manifest.load(tmp_path / "lake" / "gold" / "hostile")
    assert (manifest.counts["rows of t-*.csv.gz"], manifest.quarantine) == (5000, {"truncated or corrupt gzip": 1})
    code, said = attempt("t-1.csv.gz", "--salvage")
    assert code == 0
    manifest = Manifest.load(tmp_path / "lake" / "gold" / "hostile")
    assert 500 < manifest.counts["rows of t-1.csv.gz"] < 5000
    assert manifest.quarantine == {"truncated or corrupt gzip": 1, "cut off: the file breaks here": 1}
    registered = pq.read_table(tmp_path / "lake" / "bronze" / "hostile" / "_files.parquet").to_pylist()
    assert [(f["name"], f["rows"], bool(f["broken"])) for f in registered] == [
        ("t-1.csv.gz", manifest.counts["rows of t-1.csv.gz"], True)
    ]
