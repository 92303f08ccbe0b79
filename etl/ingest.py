"""Raw files -> DuckDB tables of text columns, with every bad record set aside.

Every value is read as text and cast later, in one place, where a failure can be counted. A clean file is read by
DuckDB, in one pass. A file that DuckDB would misread, or in which it finds a bad record, takes `etl.repair`.
"""

import itertools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from etl import repair
from etl.quarantine import Quarantine, column, literal
from etl.raw import COMPRESSED, RawFile, RawTable, filesystem, is_url, open_bytes, unpack
from etl.repair import MAX_LINE, Record

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

DELIMITERS = {"csv": ",", "tsv": "\t"}
JSON_LINES = ("jsonl", "json", "ndjson")
KINDS = (*DELIMITERS, *JSON_LINES, "parquet")
DUCKDB_SHARE = 0.6  # of the memory given, at most: its limit does not count all that it allocates
PER_THREAD = 100 * 10**6  # bytes that DuckDB works well with; it would keep as much more of the data as it may
USUAL_LINE = 4 << 20  # a file with longer lines is odd
FLOAT32_MAX = 3.4028234e38  # numbers are stored as float32
IS_OBJECT = "json_type(line) = 'OBJECT'"
BATCH = 10_000


class Unreadable(ValueError):
    """A file that cannot be read at all."""


def connect(
    folder: Path,
    *,
    spill: Path | None = None,
    memory: int | None = None,
    threads: int | None = None,
    frugal: bool = True,
) -> "DuckDBPyConnection":
    """A connection on a file in ``folder``, which works out of core and never asks the network for extensions.

    Args:
        folder: of ``build.duckdb``.
        spill: where intermediate results go that do not fit; ``folder / "spill"`` where absent.
        memory: bytes that the whole process may use; DuckDB gets `DUCKDB_SHARE` of them at most.
        threads: of DuckDB; all cores where absent.
        frugal: DuckDB gets `PER_THREAD` only, where that is less: the peak is then the same for any number of rows.
    """
    import duckdb

    con = duckdb.connect(str(folder / "build.duckdb"))
    con.execute("set autoinstall_known_extensions = false")
    con.execute("set preserve_insertion_order = true")
    con.execute("set timezone = 'UTC'")
    # Tables live for minutes: to pack them takes longer than to write.
    con.execute("set force_compression = 'uncompressed'")
    con.execute(f"set temp_directory = {literal(spill or folder / 'spill')}")
    if threads is not None:
        con.execute(f"set threads = {threads}")
    if memory is not None:
        (used,) = con.execute("select current_setting('threads')").fetchall()[0]
        limit = int(memory * DUCKDB_SHARE)
        con.execute(f"set memory_limit = '{min(limit, PER_THREAD * used) if frugal else limit}B'")
    return con


def load(
    con: "DuckDBPyConnection",
    quarantine: Quarantine,
    raw: RawTable,
    table: str,
    columns: list[str],
    optional: tuple[str, ...] = (),
    where: str = "true",
) -> int:
    """Read ``columns`` of a raw table as text into ``table``, with ``_file`` and ``_row``; "" becomes null.

    ``_row`` is the line number of json lines, else the number of the record (from 1; a csv's header is not counted).
    A broken file of several is set aside whole, or read up to its break if that is to be salvaged.

    Args:
        con: connection.
        quarantine: takes the bad records.
        raw: parquet; csv, tsv or jsonl/json/ndjson (one object per line), each plain, .gz or .zst.
        table: to make.
        columns: needed ones.
        optional: null where the files do not have them.
        where: SQL condition on the columns (as text): other rows are never stored.

    Returns:
        Good rows that were kept.

    Raises:
        ValueError: an unknown kind of file, a missing column (names those that are there), or no readable file.
    """
    before = quarantine.total()
    loader = _Loader(con, quarantine, raw, table, columns, [*columns, *optional], where)
    loader.create()
    for file in raw.files:
        loader.add(file)
    rows = loader.finish()
    quarantine.records += rows + quarantine.total() - before
    return rows


@dataclass(frozen=True)
class _Loader:
    """Appends the files of one raw table to one DuckDB table."""

    con: "DuckDBPyConnection"
    quarantine: Quarantine
    raw: RawTable
    table: str
    needed: list[str]
    wanted: list[str]
    where: str

    def create(self) -> None:
        low = [*(name.lower() for name in self.wanted), "_file", "_row", "_bad"]
        twice = [name for name in self.wanted if low.count(name.lower()) > 1]
        if "" in low:
            raise ValueError(f"{self.raw.name}: a column without a name cannot be used")
        if twice:
            raise ValueError(
                f"{self.raw.name}: column {twice[0]!r}: another one differs in case only, or the name is reserved"
            )
        types = [f"{column(name)} varchar" for name in self.wanted]
        self.con.execute(f"create table {self.table} ({', '.join(types)}, _file varchar, _row bigint, _bad varchar)")

    def add(self, file: RawFile) -> None:
        import duckdb

        if file.kind not in KINDS and file.sha256:
            raise ValueError(
                f"{file.name}: unknown kind of file .{file.kind}; allowed are {', '.join(KINDS)}, each also .gz and .zst"
            )
        if file.broken:
            self.quarantine.add_rows(self.raw.name, [(file.name, 0, file.broken.split(" (")[0], file.broken)])
            if not (self.raw.salvage and file.sha256):
                return
        try:
            self._json_lines(file) if file.kind in JSON_LINES else self._table(file)
        except Unreadable as error:
            if len(self.raw.files) == 1:
                raise ValueError(f"{file.name}: {error}") from None
            self.quarantine.add_rows(self.raw.name, [(file.name, 0, "not readable", str(error))])
        except duckdb.OutOfMemoryException:
            raise
        except (duckdb.Error, OSError) as error:  # out of disk: the machine's fault, not the file's
            raise ValueError(f"{file.name}: {_first_line(error)}") from None

    def finish(self) -> int:
        """Move bad rows out; returns the number of good ones."""
        reason = f"case when coalesce(try({IS_OBJECT}), false) then 'JSON key twice' else 'not a JSON object' end"
        self.quarantine.add(
            self.raw.name,
            f"select _file as file, _row as line, {reason} as reason, line as raw from "
            f"(select *, _bad as line from {self.table}) where trim(line, ' \t\r') <> ''",
        )
        self.con.execute(f"delete from {self.table} where _bad is not null")
        self.con.execute(f"alter table {self.table} drop column _bad")
        self._require_keys()
        rows = dict(self.con.execute(f"select _file, count(*) from {self.table} group by 1").fetchall())
        self.quarantine.rows |= rows
        return sum(rows.values())

    def _require_keys(self) -> None:
        """A column that is null in every row: is there such a key at all? To know is as costly as to read."""
        counts = ", ".join(["count(*)", *(f"count({column(name)})" for name in self.needed)])
        rows, *there = self.con.execute(f"select {counts} from {self.table}").fetchall()[0]
        empty = [name for name, n in zip(self.needed, there, strict=True) if not n]
        json_files = [file for file in self.raw.files if file.kind in JSON_LINES and not file.broken]
        if not (rows and empty and json_files):
            return
        keys = sorted({key for file in json_files for key in column_names(self.con, file)})
        absent = [name for name in empty if name not in keys]
        if absent:
            raise ValueError(f"{self.raw.name}: no column {absent[0]!r}; there are {', '.join(keys)}")

    def _json_lines(self, file: RawFile) -> None:
        if file.odd or file.broken:
            with scratch_file(self.con, ".jsonl") as copy:
                self._set_aside(file, repair.clean_json_lines(file, copy))
                self._insert_lines(file, _lines(str(copy), "", MAX_LINE))
        else:
            with _duckdb_path(self.con, file) as path:
                self._insert_lines(file, _lines(path, file.packing, USUAL_LINE))

    def _insert_lines(self, file: RawFile, lines: str) -> None:
        # One pass: DuckDB's own reader turns a bad line into a row of nulls, reads on after trailing garbage, and takes
        # the first of two values of one key.
        keys = ", ".join(literal(_pointer(name)) for name in self.wanted)
        unique = f"{IS_OBJECT} and list_unique(json_keys(line)) = len(json_keys(line))"
        good = f"case when json_valid(line) then {unique} end"  # where one row fails, try goes through its 2,048 one by one
        parsed = (
            f"select case when ok then json_extract_string(line, [{keys}]) end as x, case when not ok then line end as _bad, "
            f"_row from (select line, _row, coalesce(try({good}), false) as ok from "
            f"(select line, row_number() over () as _row from {lines}) where line is not null)"
        )
        self._insert(file, [f"x[{i + 1}]" for i in range(len(self.wanted))], parsed)

    def _table(self, file: RawFile) -> None:
        names = column_names(self.con, file)
        twice = [name for name in self.wanted if names.count(name) > 1]
        if twice:
            raise Unreadable(f"the column {twice[0]!r} is there twice")
        missing = [name for name in self.needed if name not in names]
        if missing and len(self.raw.files) == 1:
            raise ValueError(f"{file.name}: no column {missing[0]!r}; there are {', '.join(sorted(names))}")
        self.quarantine.add_rows(self.raw.name, [(file.name, 0, f"no column: {name}", None) for name in missing])
        self._parquet(file, names) if file.kind == "parquet" else self._delimited(file, names)

    def _parquet(self, file: RawFile, names: list[str]) -> None:
        import duckdb

        text = [f"cast({column(name)} as varchar)" if name in names else "null" for name in self.wanted]
        values = ", ".join(f"{value} as c{i}" for i, value in enumerate(text))
        try:
            with _duckdb_path(self.con, file) as path:
                source = f"read_parquet({literal(path)}, file_row_number = true)"
                rows = f"select {values}, file_row_number + 1 as _row, null as _bad from {source}"
                self._insert(file, [f"c{i}" for i in range(len(text))], rows)
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            raise Unreadable(f"not readable as parquet: {_first_line(error)}") from None

    def _delimited(self, file: RawFile, names: list[str]) -> None:
        values = [f"c{names.index(name)}" if name in names else "null" for name in self.wanted]
        if not (file.odd or file.broken) and self._clean_delimited(file, values, len(names)):
            return
        with scratch_file(self.con, ".parquet") as copy:
            self._set_aside(file, repair.clean_records(file, DELIMITERS[file.kind], copy))
            self._insert(file, values, f"select *, null as _bad from read_parquet({literal(copy)})")

    def _clean_delimited(self, file: RawFile, values: list[str], width: int) -> bool:
        """Let DuckDB read the file; False, and nothing added, where it found a bad record."""
        import duckdb

        types = ", ".join(f"'c{i}': 'VARCHAR'" for i in range(width))
        with _duckdb_path(self.con, file) as path:
            rows = (
                f"read_csv({literal(path)}, columns = {{{types}}}, auto_detect = false, header = true, strict_mode = true, "
                f"delim = {literal(DELIMITERS[file.kind])}, quote = '\"', escape = '\"', max_line_size = {USUAL_LINE}, "
                f"compression = {literal(COMPRESSED.get(file.packing, 'none'))}, store_rejects = true, rejects_limit = 1, "
                "rejects_table = 'csv_rejects', rejects_scan = 'csv_scans')"
            )
            try:
                self._insert(file, values, f"select *, row_number() over () as _row, null as _bad from {rows}")
            except duckdb.OutOfMemoryException:
                raise
            except duckdb.Error:
                bad = 1
            else:
                bad = self.con.execute("select count(*) from csv_rejects").fetchall()[0][0]
        self.con.execute("drop table if exists csv_rejects")
        self.con.execute("drop table if exists csv_scans")
        if bad:
            self.con.execute(f"delete from {self.table} where _file = {literal(file.name)}")
        return not bad

    def _insert(self, file: RawFile, values: list[str], rows: str) -> None:
        named = [f"nullif({value}, '') as {column(name)}" for value, name in zip(values, self.wanted, strict=True)]
        self.con.execute(
            f"insert into {self.table} select * from (select {', '.join(named)}, {literal(file.name)} as _file, _row, _bad "
            f"from ({rows})) where _bad is not null or ({self.where})"
        )

    def _set_aside(self, file: RawFile, bad: Iterator[Record]) -> None:
        while batch := list(itertools.islice(bad, BATCH)):
            rows = [(file.name, record.number, record.problem, record.raw) for record in batch]
            self.quarantine.add_rows(self.raw.name, rows)


def column_names(con: "DuckDBPyConnection", file: RawFile) -> list[str]:
    """Columns of a file; of json lines, the keys that occur.

    Raises:
        ValueError: the file is not readable.
    """
    import duckdb

    if file.kind in DELIMITERS:
        try:
            names = repair.header(file, DELIMITERS[file.kind])
        except ValueError as error:
            raise Unreadable(str(error)) from None
        return [name or f"column{i}" for i, name in enumerate(names)]
    with _duckdb_path(con, file) as path:
        if file.kind == "parquet":
            try:
                return [row[0] for row in con.execute(f"describe from read_parquet({literal(path)})").fetchall()]
            except duckdb.Error as error:
                raise Unreadable(f"not readable as parquet: {_first_line(error)}") from None
        keys = "case when json_valid(line) then json_keys(line) end"
        lines = _lines(path, file.packing, MAX_LINE)
        return [row[0] for row in con.execute(f"select distinct unnest({keys}) from {lines} order by 1").fetchall()]


def _lines(path: str, packing: str, longest: int) -> str:
    """SQL for a text file as rows of one column, ``line``; blank lines are nulls."""
    return (
        f"read_csv({literal(path)}, columns = {{'line': 'VARCHAR'}}, delim = chr(1), quote = '', escape = '', header = false, "
        f"auto_detect = false, strict_mode = false, null_padding = false, max_line_size = {longest}, "
        f"compression = {literal(COMPRESSED.get(packing, 'none'))})"
    )


def _pointer(key: str) -> str:
    """JSON pointer to a key of the top level (RFC 6901)."""
    return "/" + key.replace("~", "~0").replace("/", "~1")


@contextmanager
def scratch_file(con: "DuckDBPyConnection", suffix: str) -> Iterator[Path]:
    """A file name in the spill folder; what is there is removed afterwards."""
    folder = Path(con.execute("select current_setting('temp_directory')").fetchall()[0][0])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ingest-{uuid.uuid4().hex}{suffix}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _duckdb_path(con: "DuckDBPyConnection", file: RawFile) -> Iterator[str]:
    """A path at which DuckDB reads this file and nothing else: it would take ``[`` or ``*`` in a name for a pattern."""
    with scratch_file(con, f".{file.kind}{file.packing}") as path:
        if file.kind == "parquet" and file.packing:
            path = path.with_suffix("")
            with open_bytes(file.path) as stream, open(path, "wb") as out:
                out.writelines(unpack(stream, file.packing))
        elif is_url(file.path):
            remote = filesystem(file.path)
            if not con.filesystem_is_registered(
                remote.protocol if isinstance(remote.protocol, str) else remote.protocol[0]
            ):
                con.register_filesystem(remote)
            yield file.path
            return
        else:
            path.symlink_to(os.path.abspath(file.path))
        yield str(path)


def cast_number(
    con: "DuckDBPyConnection",
    quarantine: Quarantine,
    part: str,
    table: str,
    name: str,
    expression: str | None = None,
) -> str:
    """SQL for a text column as a finite double.

    A value that is not a number (or NaN, infinite, too large for the float32 it is stored as) is set aside and becomes
    a missing cell.
    """
    text = expression or column(name)
    number = f"case when not contains({text}, '_') then try_cast({text} as double) end"
    finite = f"case when abs({number}) <= {FLOAT32_MAX} then {number} end"
    problem = f"case when {number} is null then 'not a number: ' else 'not a finite float32: ' end || {literal(name)}"
    quarantine.add(
        part,
        f"select _file as file, _row as line, {problem} as reason, {text} as raw from {table} "
        f"where {text} is not null and {finite} is null",
    )
    return finite


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
