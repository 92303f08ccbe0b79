"""Raw files -> DuckDB tables of text columns, with every bad record set aside.

A raw file stays where it is; it is registered with size, time and sha256. Every value is read as text and cast later,
in one place, where a failure can be counted.
"""

import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from etl.quarantine import Quarantine, column, literal

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

CHUNK = 1 << 20
MAX_LINE = 64 << 20
DUCKDB_SHARE = 0.6  # of the memory given: its limit does not count all that it allocates, and Python needs some
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class RawFile:
    """A registered raw file."""

    name: str
    path: Path
    bytes: int
    mtime: int
    sha256: str


def connect(
    folder: Path, *, spill: Path | None = None, memory: int | None = None, threads: int | None = None
) -> "DuckDBPyConnection":
    """A connection on a file in ``folder``, which works out of core and never asks the network for extensions.

    Args:
        folder: of ``build.duckdb``.
        spill: where intermediate results go that do not fit; ``folder / "spill"`` where absent.
        memory: bytes that the whole process may use; DuckDB gets `DUCKDB_SHARE` of them.
        threads: of DuckDB.
    """
    import duckdb

    con = duckdb.connect(str(folder / "build.duckdb"))
    con.execute("set autoinstall_known_extensions = false")
    con.execute("set preserve_insertion_order = true")
    con.execute("set timezone = 'UTC'")
    con.execute(f"set temp_directory = {literal(spill or folder / 'spill')}")
    if memory is not None:
        con.execute(f"set memory_limit = '{int(memory * DUCKDB_SHARE)}B'")
    if threads is not None:
        con.execute(f"set threads = {threads}")
    return con


def register(raw: Path, name: str) -> RawFile:
    """Hash a raw file and, if it is compressed, prove that it is whole.

    Raises:
        ValueError: no such file, or a truncated or corrupt .gz or .zst.
    """
    path = raw / name
    if not path.is_file():
        raise ValueError(f"{path}: no such raw file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    _prove_whole(path)
    stat = path.stat()
    return RawFile(name, path, stat.st_size, int(stat.st_mtime), digest.hexdigest())


def _prove_whole(path: Path) -> None:
    if path.suffix not in COMPRESSED:
        return
    import pyarrow

    try:
        with gzip.open(path) if path.suffix == ".gz" else pyarrow.input_stream(path, compression="zstd") as unpacked:
            while unpacked.read(CHUNK):
                pass
    except (EOFError, OSError, zlib.error) as error:
        kind = COMPRESSED[path.suffix]
        raise ValueError(f"{path}: truncated or corrupt {kind} ({error}); fetch it again") from None


def load(
    con: "DuckDBPyConnection",
    quarantine: Quarantine,
    file: RawFile,
    table: str,
    columns: list[str],
    optional: tuple[str, ...] = (),
    where: str = "true",
) -> int:
    """Read ``columns`` of a raw file as text into ``table``, with ``_file`` and ``_row`` (1-based); "" becomes null.

    Args:
        con: connection.
        quarantine: takes the bad records.
        file: parquet; csv, tsv or jsonl/json/ndjson (one object per line), each plain, .gz or .zst.
        table: to make.
        columns: needed ones.
        optional: null where the file does not have them.
        where: SQL condition on the file's columns (as text): other rows are never stored. Not for json lines.

    Returns:
        Good rows that were kept.

    Raises:
        ValueError: an unknown kind of file, or a missing column (names those that are there).
    """
    plain = file.path.with_suffix("") if file.path.suffix in COMPRESSED else file.path
    suffix = plain.suffix.removeprefix(".").lower()
    readers = {
        "parquet": partial(_parquet, where=where),
        "csv": partial(_csv, delimiter=",", where=where),
        "tsv": partial(_csv, delimiter="\t", where=where),
        "jsonl": _json_lines,
        "json": _json_lines,
        "ndjson": _json_lines,
    }
    if suffix not in readers:
        raise ValueError(
            f"{file.path}: unknown kind of file .{suffix}; allowed are {', '.join(readers)}, all but parquet also .gz "
            "and .zst"
        )
    before = quarantine.total()
    there = readers[suffix](con, quarantine, file)
    missing = [name for name in columns if name not in there]
    if missing:
        raise ValueError(f"{file.path}: no column {missing[0]!r}; there are {', '.join(sorted(there))}")
    picked = [
        f"nullif({there[name]}, '') as {column(name)}" if name in there else f"cast(null as varchar) as {column(name)}"
        for name in [*columns, *optional]
    ]
    con.execute(f"create table {table} as select {', '.join(picked)}, {literal(file.name)} as _file, _row from good")
    con.execute("drop table good")
    rows = con.execute(f"select count(*) from {table}").fetchall()[0][0]
    quarantine.records += rows + quarantine.total() - before
    return rows


def _parquet(con: "DuckDBPyConnection", quarantine: Quarantine, file: RawFile, where: str) -> dict[str, str]:
    import duckdb

    try:
        con.execute(
            f"create table good as from (select *, row_number() over () as _row from read_parquet({literal(file.path)})) "
            f"where {where}"
        )
    except duckdb.Error as error:
        raise ValueError(f"{file.path}: not readable as parquet: {_first_line(error)}") from None
    return _as_text(con)


def _csv(
    con: "DuckDBPyConnection", quarantine: Quarantine, file: RawFile, delimiter: str, where: str
) -> dict[str, str]:
    import duckdb

    try:
        con.execute(
            f"create table good as from (select *, row_number() over () as _row from read_csv({literal(file.path)}, "
            f"header = true, all_varchar = true, delim = {literal(delimiter)}, quote = '\"', escape = '\"', "
            "store_rejects = true, rejects_table = 'csv_rejects', rejects_scan = 'csv_scans')) "
            f"where {where}"
        )
    except duckdb.Error as error:
        raise ValueError(f"{file.path}: not readable as a delimited table: {_first_line(error)}") from None
    quarantine.add(
        file.name,
        f"select distinct {literal(file.name)} as file, line, 'csv: ' || lower(error_type::varchar) as reason, csv_line as raw "
        "from csv_rejects",
    )
    con.execute("drop table csv_rejects")
    con.execute("drop table csv_scans")
    return _as_text(con)


def _as_text(con: "DuckDBPyConnection") -> dict[str, str]:
    names = [row[0] for row in con.execute("describe good").fetchall()]
    return {name: f"cast({column(name)} as varchar)" for name in names if name != "_row"}


def _json_lines(con: "DuckDBPyConnection", quarantine: Quarantine, file: RawFile) -> dict[str, str]:
    """Lines are read as text first: DuckDB's own reader turns a bad line into a row of nulls."""
    con.execute(
        f"create temp table lines as select line, row_number() over () as _row from read_csv({literal(file.path)}, "
        "columns = {'line': 'VARCHAR'}, delim = chr(1), quote = '', escape = '', header = false, auto_detect = false, "
        f"strict_mode = false, null_padding = false, max_line_size = {MAX_LINE})"
    )
    is_object = "case when json_valid(line) then json_type(line) = 'OBJECT' else false end"
    quarantine.add(
        file.name,
        f"select {literal(file.name)} as file, _row as line, 'not a JSON object' as reason, line as raw from lines "
        f"where trim(line) <> '' and not {is_object}",
    )
    con.execute(f"create table good as select line::json as line, _row from lines where {is_object}")
    con.execute("drop table lines")
    keys = con.execute("select distinct unnest(json_keys(line)) from good").fetchall()
    return {key: f"(line ->> {literal('$.' + json.dumps(key))})" for (key,) in keys}


def cast_number(
    con: "DuckDBPyConnection",
    quarantine: Quarantine,
    part: str,
    table: str,
    name: str,
    expression: str | None = None,
) -> str:
    """SQL for a text column as a finite double; a value that is not a number is set aside and becomes a missing cell."""
    text = expression or column(name)
    number = f"try_cast({text} as double)"
    finite = f"case when isfinite({number}) then {number} end"
    quarantine.add(
        part,
        f"select _file as file, _row as line, {literal(f'not a number: {name}')} as reason, {text} as raw from {table} "
        f"where {text} is not null and {number} is null",
    )
    return finite


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
