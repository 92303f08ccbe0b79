"""Hostile tables: no crash, no loss, every record read or set aside and counted."""

import csv
import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etl.ingest import connect, load
from etl.quarantine import Quarantine
from etl.raw import register

PACK = {"": bytes, ".gz": gzip.compress, ".zst": lambda b: pa.Codec("zstd").compress(b, asbytes=True)}
BIG = "x" * 3_000_000  # longer than what DuckDB is told to expect

# name -> (bytes, good rows, reasons of the bad ones); columns a and b
CSV: dict[str, tuple[bytes, int, list[str]]] = {
    "plain": (b"a,b\n1,x\n2,y\n", 2, []),
    "no last newline": (b"a,b\n1,x\n2,y", 2, []),
    "crlf": (b"a,b\r\n1,x\r\n2,y\r\n", 2, []),
    "byte order mark": (b"\xef\xbb\xbfa,b\n1,x\n", 1, []),
    "byte order mark, quoted header": (b'\xef\xbb\xbf"a","b"\n1,x\n', 1, []),
    "header only": (b"a,b\n", 0, []),
    "header only, no newline": (b"a,b", 0, []),
    "blank lines": (b"\n\na,b\n\n1,x\n\n\n2,y\n\n", 2, []),
    "too few fields": (b"a,b\n1\n2,y\n", 1, ["csv: too few fields"]),
    "too many fields": (b"a,b\n1,x,z\n2,y\n", 1, ["csv: too many fields"]),
    "trailing comma": (b"a,b\n1,x,\n2,y\n", 2, []),
    "trailing comma in a dirty file": (b"a,b\n1,x,\n2\n", 1, ["csv: too few fields"]),
    "two trailing commas": (b"a,b\n1,x,,\n2,y\n", 2, []),
    "two trailing commas in a dirty file": (b"a,b\n1,x,,\n2\n", 1, ["csv: too few fields"]),
    "only commas": (b"a,b\n,\n2,y\n", 2, []),
    "open quote": (b'a,b\n1,"x\n2,y\n3,z\n', 2, ["csv: broken quotes"]),
    "open quote in the last line": (b'a,b\n1,x\n2,"y', 1, ["csv: broken quotes"]),
    "text after a quote": (b'a,b\n1,"x"y\n2,y\n', 1, ["csv: broken quotes"]),
    "quote inside": (b'a,b\n1,5" disk\n2,y\n', 2, []),
    "newline in a field": (b'a,b\n1,"x\ny"\n2,y\n', 2, []),
    "crlf in a field": (b'a,b\r\n1,"x\r\ny"\r\n2,y\r\n', 2, []),
    "doubled quotes": (b'a,b\n1,"say ""x"""\n', 1, []),
    "newline in the header": (b'a,b,"c\nd"\n1,x,y\n', 1, []),
    "NUL byte": (b"a,b\n1,x\0y\n2,y\n", 1, ["NUL byte"]),
    "separator that DuckDB is told": (b'a,b\n1,x\x01y\n2,"\x01"\n', 2, []),
    "latin-1": (b"a,b\n1,caf\xe9\n2,y\n", 1, ["not UTF-8"]),
    "latin-1 in the middle of a field": (
        b'a,b\n1,"x\ncaf\xe9\ny"\n2,y\n',
        1,
        ["not UTF-8"],
    ),
    "utf-16": ("a,b\n1,é\n2,y\n".encode("utf-16"), 2, []),
    "utf-16 big endian": (b"\xfe\xff" + "a,b\n1,é\n".encode("utf-16-be"), 1, []),
    "utf-32": ("a,b\n1,é\n".encode("utf-32"), 1, []),
    "utf-8 that is cut": (b"a,b\n1,x\n2,\xc3", 1, ["not UTF-8"]),
    "overlong utf-8": (b"a,b\n1,\xc0\xaf\n2,y\n", 1, ["not UTF-8"]),
    "huge field": (f"a,b\n1,{BIG}\n2,y\n".encode(), 2, []),
    "quoted field of 5,000 lines": (b'a,b\n1,"' + b"word\n" * 5000 + b'"\n2,y\n', 2, []),
    "spaces": (b"a,b\n 1 , x \n", 1, []),
    "sql": (b"a,b\n1,'); drop table t; --\n", 1, []),
    "dots and slashes": (b"a,b\n../../etc/passwd,/\n.,..\n", 2, []),
    "more columns": (b"z,b,y,a\n0,x,0,1\n", 1, []),
    "empty column name": (b"a,,b\n1,0,x\n", 1, []),
    "columns that differ in case": (b"a,A,b\n1,2,x\n", 1, []),
    "another column twice": (b"a,b,c,c\n1,x,0,0\n", 1, []),
    "lone carriage returns": (b"a,b\n1,x\ry\n2,y\n", 1, ["csv: broken quotes"]),
}
JSON: dict[str, tuple[bytes, int, list[str]]] = {
    "plain": (b'{"a":1,"b":"x"}\n{"a":2,"b":"y"}', 2, []),
    "crlf and blank lines": (b'{"a":1}\r\n\r\n   \n{"a":2,"b":1}\r\n', 2, []),
    "byte order mark": (b'\xef\xbb\xbf{"a":1,"b":2}\n', 1, []),
    "cut": (b'{"a":1,"b":2}\n{"a":1,"b', 1, ["not a JSON object"]),
    "trailing garbage": (b'{"a":1,"b":2} x\n{"a":1,"b":2}\n', 1, ["not a JSON object"]),
    "two objects": (b'{"a":1,"b":2}{"a":3}\n{"a":1,"b":2}\n', 1, ["not a JSON object"]),
    "a list": (b'[1]\n{"a":1,"b":2}\n', 1, ["not a JSON object"]),
    "a number, a text, null": (b'1\n"x"\nnull\n{"a":1,"b":2}\n', 1, ["not a JSON object"] * 3),
    "key twice": (b'{"a":1,"a":2,"b":1}\n{"a":1,"b":2}\n', 1, ["JSON key twice"]),
    "control character": (b'{"a":1,"b":"x\x01y"}\n{"a":1,"b":2}\n', 1, ["not a JSON object"]),
    "garbage after the separator that DuckDB is told": (
        b'{"a":1,"b":2}\x01x\n{"a":1,"b":2}\n',
        1,
        ["not a JSON object"],
    ),
    "NUL byte": (b'{"a":1,"b":"x\0y"}\n{"a":1,"b":2}\n', 1, ["NUL byte"]),
    "escaped NUL": (b'{"a":1,"b":"x\\u0000y"}\n', 1, []),
    "lone surrogate": (b'{"a":1,"b":"\\ud800"}\n{"a":1,"b":2}\n', 1, ["not a JSON object"]),
    "latin-1": (b'{"a":1,"b":"caf\xe9"}\n{"a":1,"b":2}\n', 1, ["not UTF-8"]),
    "utf-16": ('{"a":1,"b":"é"}\n{"a":2,"b":1}\n'.encode("utf-16"), 2, []),
    "single quotes": (b"{'a':1,'b':2}\n" + b'{"a":1,"b":2}\n', 1, ["not a JSON object"]),
    "comment": (b'// x\n{"a":1,"b":2}\n', 1, ["not a JSON object"]),
    "nested": (b'{"a":{"b":[1,{"c":null}]},"b":[[]]}\n', 1, []),
    "deep": (b'{"a":' + b"[" * 300 + b"]" * 300 + b',"b":1}\n', 1, []),
    "huge field": (f'{{"a":1,"b":"{BIG}"}}\n{{"a":2,"b":1}}\n'.encode(), 2, []),
    "huge number": (b'{"a":1e999,"b":' + b"9" * 400 + b"}\n", 1, []),
    "mixed types": (b'{"a":1,"b":"x"}\n{"a":"1","b":2}\n{"a":true,"b":null}\n{"a":[1],"b":{}}\n', 4, []),
    "other keys": (b'{"a":1,"b":2,"c.d":3,"e/f":4,"":5,"g~h":6}\n', 1, []),
    "empty object": (b'{}\n{"a":1,"b":2}\n', 2, []),
}


class Lake:
    """One connection for many loads."""

    def __init__(self, folder: Path):
        self.raw = folder / "raw"
        self.raw.mkdir()
        self.con = connect(folder, threads=1)

    def load(self, name: str, columns: list[str], **options: bool) -> tuple[list[dict], Counter[str]]:
        """Rows and reasons."""
        for table in ("t", "quarantine"):
            self.con.execute(f"drop table if exists {table}")
        quarantine = Quarantine(self.con)
        load(self.con, quarantine, register(self.raw, name, **options), "t", columns)
        cursor = self.con.execute("select * from t order by _file, _row")
        names = [column[0] for column in cursor.description or []]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()], Counter(quarantine.by_reason())


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lake]:
    made = Lake(tmp_path_factory.mktemp("lake"))
    yield made
    made.con.close()


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind, cases", [("csv", CSV), ("jsonl", JSON)])
def test_every_record_is_read_or_set_aside_with_its_reason(lake: Lake, kind: str, cases: dict, packing: str) -> None:
    name = f"t.{kind}{packing}"
    for case, (data, good, reasons) in cases.items():
        (lake.raw / name).write_bytes(PACK[packing](data))
        rows, bad = lake.load(name, ["a", "b"])
        assert (len(rows), bad) == (good, Counter(reasons)), case


def test_values_survive_as_they_are(lake: Lake) -> None:
    (lake.raw / "v.csv").write_bytes(CSV["crlf in a field"][0])
    assert lake.load("v.csv", ["b"])[0][0]["b"] == "x\r\ny"
    (lake.raw / "v.csv").write_bytes("a,b\n1,é\n".encode("utf-16"))
    assert lake.load("v.csv", ["b"])[0][0]["b"] == "é"
    (lake.raw / "v.csv").write_bytes(CSV["huge field"][0])
    assert lake.load("v.csv", ["b"])[0][0]["b"] == BIG
    (lake.raw / "v.jsonl").write_bytes(
        b'{"a":9007199254740993,"b":"x\\u0000y","c.d":" 1 ","e/f":"~","d":"","g~h":1e5}\n'
    )
    row = lake.load("v.jsonl", ["a", "b", "c.d", "e/f", "d", "g~h"])[0][0]
    assert [row[k] for k in ("a", "b", "c.d", "e/f", "d")] == ["9007199254740993", "x\0y", " 1 ", "~", None]


def test_a_bad_record_is_named_by_file_record_and_text(lake: Lake) -> None:
    (lake.raw / "n.csv").write_bytes(b'a,b\n1,"x\ny"\n2\n3,z\n')
    lake.load("n.csv", ["a", "b"])
    found = lake.con.execute("select file, line, reason, raw from quarantine").fetchall()
    assert found == [("n.csv", 2, "csv: too few fields", "2")]
    assert [r["_row"] for r in lake.load("n.csv", ["a", "b"])[0]] == [1, 3]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"a,a,b\n1,2,3\n", "there twice"),
        (b"x,y\n1,2\n", "no column 'a'; there are x, y"),
        (b'"a,b\n1,2\n', "header is not readable"),
        (b"\0\0\0\0", "header is not readable"),
        (b"a\0,b\n1,2\n", "header is not readable"),
        (b"\xff\xfe\x00", "header is not readable"),
        (b"PK\x03\x04\x00\xff", "header is not readable"),
    ],
)
def test_a_single_file_without_its_columns_is_one_line(lake: Lake, data: bytes, message: str) -> None:
    (lake.raw / "e.csv").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        lake.load("e.csv", ["a", "b"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1" * 9, b"not parquet at all", b"PAR1\x00\x00\x00\x00\xff\xff\xff\x7fPAR1"]
)
def test_a_parquet_that_is_none_is_one_line(lake: Lake, data: bytes) -> None:
    (lake.raw / "e.parquet").write_bytes(data)
    with pytest.raises(ValueError, match="not readable as parquet") as error:
        lake.load("e.parquet", ["a"])
    assert "\n" not in str(error.value)


def test_a_parquet_whose_pages_are_damaged_is_one_line(lake: Lake) -> None:
    pq.write_table(pa.table({"a": list(range(5000))}), lake.raw / "d.parquet", compression="zstd")
    data = bytearray((lake.raw / "d.parquet").read_bytes())
    data[4:200] = b"\xff" * 196
    (lake.raw / "d.parquet").write_bytes(data)
    with pytest.raises(ValueError, match="not readable as parquet"):
        lake.load("d.parquet", ["a"])


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_parquet_is_read_plain_and_packed(lake: Lake, packing: str) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [1, None], "b.c/d": ["x", ""], "A'": [1.5, float("nan")]}), buffer)
    (lake.raw / f"p.parquet{packing}").write_bytes(PACK[packing](buffer.getvalue()))
    rows, bad = lake.load(f"p.parquet{packing}", ["a", "b.c/d", "A'"])
    assert [[r["a"], r["b.c/d"], r["A'"], r["_row"]] for r in rows] == [["1", "x", "1.5", 1], [None, None, "nan", 2]]
    assert not bad


def test_a_glob_is_one_table_and_its_hostile_names_are_only_names(lake: Lake) -> None:
    folder = lake.raw / "many"
    folder.mkdir()
    names = [
        "a[1].csv",
        "a1.csv",
        "x*.csv",
        "x1.csv",
        "it's.csv",
        "new\nline.csv",
        "-dash.csv",
        " .csv",
        "{a,b}.csv",
        '"q".csv',
        "%s.csv",
        "$(x).csv",
    ]
    for i, name in enumerate(names):
        (folder / name).write_text(f"a,b\n{i},x\n")
    (folder / os.fsdecode(b"caf\xe9.csv")).write_text("a,b\n99,x\n")
    (folder / "empty.csv").write_text("")
    (folder / "lacks.csv").write_text("b\nx\n")
    (folder / "cut.csv.gz").write_bytes(gzip.compress(b"a,b\n1,x\n" * 1000)[:-20])
    (folder / "loop.csv").symlink_to(folder / "loop.csv")
    (folder / "out.csv").symlink_to("/etc/passwd")
    (folder / "dangling.csv").symlink_to(folder / "nothing")
    (folder / "folder.csv").mkdir()
    os.mkfifo(folder / "pipe.csv")
    rows, bad = lake.load("many/*.csv*", ["a", "b"])
    assert Counter(r["a"] for r in rows) == Counter([*map(str, range(len(names))), "99", None])
    assert len({r["_file"] for r in rows}) == len(names) + 2
    files = dict(lake.con.execute("select file, reason from quarantine").fetchall())
    assert {Path(f).name: r for f, r in files.items()} == {
        "empty.csv": "not readable",
        "lacks.csv": "no column: a",
        "cut.csv.gz": "truncated or corrupt gzip",
        "loop.csv": "outside of the raw folder",
        "out.csv": "outside of the raw folder",
        "dangling.csv": "not readable: not a regular file",
        "pipe.csv": "not readable: not a regular file",
    }
    assert bad.total() == 7


@pytest.mark.parametrize(
    "name", ["../secret.csv", "/etc/passwd", "x/../../secret.csv", "../*.csv", "/etc/pass*", "none.csv", "none*.csv"]
)
def test_a_name_outside_of_the_raw_folder_is_one_line(lake: Lake, name: str) -> None:
    (lake.raw.parent / "secret.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"outside of the raw folder|no such raw file") as error:
        lake.load(name, ["a"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_the_readable_part_of_a_truncated_file_is_salvaged_on_request(lake: Lake, kind: str, packing: str) -> None:
    lines = [
        f"{i},{os.urandom(40).hex()}" if kind == "csv" else json.dumps({"a": i, "b": os.urandom(40).hex()})
        for i in range(20_000)
    ]
    data = "\n".join((["a,b"] if kind == "csv" else []) + lines).encode()
    name = f"s.{kind}{packing}"
    whole = PACK[packing](data)
    (lake.raw / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or corrupt"):
        lake.load(name, ["a", "b"])
    rows, bad = lake.load(name, ["a", "b"], salvage=True)
    assert 5_000 < len(rows) < 15_000
    assert [int(r["a"]) for r in rows] == list(range(len(rows)))
    assert bad.total() == 2
    assert any(reason.startswith("cut off") for reason in bad)
    assert any(reason.startswith("truncated or corrupt") for reason in bad)


def test_many_gzip_members_and_padding_are_one_file(lake: Lake) -> None:
    (lake.raw / "m.csv.gz").write_bytes(gzip.compress(b"a,b\n1,x\n") + gzip.compress(b"2,y\n3,z\n") + b"\0" * 512)
    rows, bad = lake.load("m.csv.gz", ["a", "b"])
    assert ([r["a"] for r in rows], bad) == (["1", "2", "3"], Counter())


def test_a_flipped_byte_in_a_gzip_is_noticed(lake: Lake) -> None:
    data = bytearray(gzip.compress(b"a,b\n" + b"1,x\n" * 1000))
    data[-6] ^= 1  # the checksum
    (lake.raw / "f.csv.gz").write_bytes(data)
    with pytest.raises(ValueError, match="truncated or corrupt gzip"):
        lake.load("f.csv.gz", ["a"])


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12)
DAMAGES = {
    "too few": lambda row: _encoded(row[:-1]),
    "too many": lambda row: _encoded([*row, "x"]),
    "latin-1": lambda row: _encoded(row) + b"\xe9",
    "NUL": lambda row: _encoded(row) + b"\0",
    "after quote": lambda row: b'"q"x' + _encoded(row),
}


def _encoded(row: list[str]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="", quoting=csv.QUOTE_ALL).writerow(row)
    return out.getvalue().encode()


def check_csv(lake: Lake, rows: list[tuple[list[str], str]]) -> None:
    """Rows and what happens to each, against what the csv module would say."""
    lines = [DAMAGES[damage](row) if damage else _encoded(row) for row, damage in rows]
    (lake.raw / "h.csv").write_bytes(b"\n".join([b"a,b,c", *lines, b""]))
    found, bad = lake.load("h.csv", ["a", "b", "c"])
    good = [[v or None for v in row] for row, damage in rows if not damage]
    assert [[r["a"], r["b"], r["c"]] for r in found] == good
    assert bad.total() == sum(bool(damage) for _, damage in rows)


# Damaged rows hold no newline: of a broken record of several lines, each line would count.
ROWS = st.lists(
    st.one_of(
        st.tuples(st.lists(TEXT, min_size=3, max_size=3), st.just("")),
        st.tuples(st.lists(st.text("ab ,é", max_size=5), min_size=3, max_size=3), st.sampled_from(sorted(DAMAGES))),
    ),
    max_size=8,
)
LINES = st.lists(
    st.one_of(
        st.dictionaries(
            st.sampled_from(["a", "b", "c.d"]), st.one_of(st.none(), st.integers(), TEXT, st.lists(TEXT, max_size=2))
        ).map(lambda d: json.dumps(d, ensure_ascii=False).encode()),
        st.binary(max_size=20).map(lambda b: b.replace(b"\n", b" ").replace(b"\r", b" ")),
        st.sampled_from([b'{"a":1', b"[]", b"{} {}", b'{"a":1}x', b"\xff", b"\0", b"nul", b"{", b"", b"  "]),
    ),
    max_size=10,
)


def check_json(lake: Lake, lines: list[bytes]) -> None:
    """Every line that is not blank is read or set aside; what Python reads is read with its value."""
    lines = [line for line in lines if not line.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf"))] + [
        b'{"a":"last"}'
    ]
    (lake.raw / "h.jsonl").write_bytes(b"\n".join(lines))
    found, bad = lake.load("h.jsonl", ["a"])
    assert len(found) + bad.total() == sum(bool(line.strip(b" \t")) for line in lines)
    by_row = {r["_row"]: r["a"] for r in found}
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            assert number in by_row
            if isinstance(value.get("a"), str):
                assert by_row[number] == (value["a"] or None)


QUICK = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = settings(QUICK, max_examples=300)


@QUICK
@given(rows=ROWS)
def test_any_csv_gives_its_good_rows_and_counts_its_bad_ones(lake: Lake, rows: list[tuple[list[str], str]]) -> None:
    check_csv(lake, rows)


@QUICK
@given(lines=LINES)
def test_any_json_lines_are_read_or_counted(lake: Lake, lines: list[bytes]) -> None:
    check_json(lake, lines)


@pytest.mark.slow
@LONG
@given(rows=ROWS)
def test_300_csvs(lake: Lake, rows: list[tuple[list[str], str]]) -> None:
    check_csv(lake, rows)


@pytest.mark.slow
@LONG
@given(lines=LINES)
def test_300_json_lines(lake: Lake, lines: list[bytes]) -> None:
    check_json(lake, lines)


@QUICK
@given(
    data=st.binary(max_size=300),
    kind=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]),
    packing=st.sampled_from(["", ".gz", ".zst"]),
    packed=st.booleans(),
)
def test_any_bytes_are_a_table_or_one_line(lake: Lake, data: bytes, kind: str, packing: str, packed: bool) -> None:
    name = f"any.{kind}{packing}"
    (lake.raw / name).write_bytes(PACK[packing](data) if packed else data)
    said = ""
    try:
        lake.load(name, ["a"])
    except ValueError as error:
        said = str(error)
    assert "\n" not in said


def test_a_file_for_which_there_is_no_memory_is_not_a_bad_file(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb

    from etl.ingest import _Loader

    def starve(*arguments: object) -> None:
        raise duckdb.OutOfMemoryException("Out of Memory Error: could not allocate block\nmore")

    (lake.raw / "o-1.csv").write_text("a\n1\n")
    (lake.raw / "o-2.csv").write_text("a\n1\n")
    monkeypatch.setattr(_Loader, "_insert", starve)
    with pytest.raises(duckdb.OutOfMemoryException):
        lake.load("o-*.csv", ["a"])
    assert not lake.con.execute("select count(*) from quarantine").fetchall()[0][0]
