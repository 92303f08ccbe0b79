"""Dirty text files, line by line: the good records go on, each bad one is named with its number and reason.

The fast road (`etl.ingest`) reads clean files in DuckDB. A file that DuckDB would misread, or in which it found a
bad record, takes this one: slower, and exact about what is lost. A broken quote costs one line, not the rest.
"""

import codecs
import csv
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from etl.raw import ODD_BYTES, Damaged, RawFile, open_bytes, unpack

if TYPE_CHECKING:
    import pyarrow as pa

MAX_LINE = 64 << 20
MAX_RECORD_LINES = 10_000  # a quoted field that goes on for longer is a broken quote
BATCH = 10_000
BOMS = {  # longest first: UTF-32's little-endian mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
NO_TEXT = ("NUL byte", "not UTF-8")
CUT_OFF = "cut off: the file breaks here"


class Line(NamedTuple):
    """A line without its newline, and what is wrong with it, if anything (then ``data`` may be its beginning)."""

    data: bytes
    problem: str | None = None


class Record(NamedTuple):
    """A record of a delimited file: its values, or what is wrong with it.

    Attributes:
        number: 1-based, the header not counted, bad ones counted.
        raw: its text, where it is bad.
    """

    number: int
    values: list[str]
    problem: str | None = None
    raw: str = ""


def lines(file: RawFile) -> Iterator[Line]:
    """Lines of a text file, up to its break if it has one. A byte order mark says the encoding; else it is UTF-8."""
    with open_bytes(file.path) as stream:
        for line in _split(_utf8(unpack(stream, file.packing))):
            yield line if line.problem else Line(line.data, _problem(line.data))


def _utf8(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks as UTF-8, without a byte order mark."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= 4:
            break
    encoding = next((name for mark, name in BOMS.items() if head.startswith(mark)), None)
    if encoding in (None, "utf-8-sig"):
        yield head.removeprefix(codecs.BOM_UTF8)
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(str(encoding))()
    try:
        yield decoder.decode(head).encode()
        for chunk in chunks:
            yield decoder.decode(chunk).encode()
        yield decoder.decode(b"", True).encode()
    except UnicodeError as error:
        raise Damaged(f"not {encoding}: {error}") from None


def _split(chunks: Iterator[bytes]) -> Iterator[Line]:
    parts: list[bytes] = []
    size = 0
    problem = None
    try:
        for chunk in chunks:
            head, *rest = chunk.split(b"\n")
            parts.append(head if size <= MAX_LINE else b"")
            size += len(head)
            if rest:
                yield _line(parts, size)
                yield from map(Line, rest[:-1])
                parts, size = rest[-1:], len(rest[-1])
    except Damaged:
        problem = CUT_OFF
    if size or problem:
        last = _line(parts, size)
        yield Line(last.data, problem or last.problem)


def _line(parts: list[bytes], size: int) -> Line:
    return Line(b"".join(parts), f"longer than {MAX_LINE >> 20} MiB" if size > MAX_LINE else None)


def _problem(data: bytes) -> str | None:
    if b"\0" in data:
        return NO_TEXT[0]
    try:
        data.decode()
    except UnicodeDecodeError:
        return NO_TEXT[1]
    return None


def readable(data: bytes) -> str:
    """Any bytes as text, for the quarantine."""
    return data.decode("utf-8", "backslashreplace").replace("\0", "\\x00")


def clean_json_lines(file: RawFile, target: Path) -> Iterator[Record]:
    """Write a copy in which bad lines are empty, so that line numbers stay; yields the bad ones."""
    with open(target, "wb") as out:
        for number, line in enumerate(lines(file), start=1):
            problem = line.problem
            if problem is None and any(byte in line.data for byte in ODD_BYTES):
                problem = "not a JSON object"  # JSON escapes its control characters
            out.write(b"\n" if problem else line.data + b"\n")
            if problem:
                yield Record(number, [], problem, readable(line.data))


def header(file: RawFile, delimiter: str) -> list[str]:
    """Column names of a delimited file.

    Raises:
        ValueError: it has no readable first record.
    """
    first = next(records(file, delimiter), None)
    if first is None:
        raise ValueError("empty: not even a header")
    if first.problem:
        raise ValueError(f"its header is not readable: {first.problem}")
    return first.values


def clean_records(file: RawFile, delimiter: str, target: Path) -> Iterator[Record]:
    """Write the good records as Parquet: text columns ``c0, c1, ...`` and ``_row``; yields the bad ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = records(file, delimiter)
    head = next(found)
    names = [f"c{i}" for i in range(len(head.values))]
    schema = pa.schema([*((name, pa.string()) for name in names), ("_row", pa.int64())])
    with pq.ParquetWriter(target, schema) as writer:
        batch: list[Record] = []
        for record in found:
            if record.problem:
                yield record
                continue
            batch.append(record)
            if len(batch) == BATCH:
                writer.write_table(_columns(batch, schema))
                batch = []
        writer.write_table(_columns(batch, schema))


def _columns(batch: list[Record], schema: "pa.Schema") -> "pa.Table":
    import pyarrow as pa

    width = len(schema) - 1
    columns = [pa.array([record.values[i] for record in batch], pa.string()) for i in range(width)]
    return pa.table([*columns, pa.array([record.number for record in batch], pa.int64())], schema=schema)


class _Pending:
    """Lines that can be given back."""

    def __init__(self, source: Iterator[Line]):
        self.source = source
        self.returned: deque[Line] = deque()

    def take(self) -> Line | None:
        return self.returned.popleft() if self.returned else next(self.source, None)

    def give_back(self, taken: list[Line]) -> None:
        self.returned.extendleft(reversed(taken))


def records(file: RawFile, delimiter: str) -> Iterator[Record]:
    """The header as record 0, then every record, good or bad. Blank lines are none."""
    csv.field_size_limit(sys.maxsize)  # the lines are bounded
    pending = _Pending(lines(file))
    number, width = -1, None
    while (line := pending.take()) is not None:
        if not line.problem and not line.data.strip():
            continue
        number += 1
        values, problem = _values(line, pending, delimiter)
        width = len(values) if width is None else width
        while len(values) > width and not values[-1]:  # separators at the end of a line are no fields, as for DuckDB
            values.pop()
        if not problem and len(values) != width:
            problem = f"csv: too {'few' if len(values) < width else 'many'} fields"
        yield Record(number, values, problem, readable(line.data) if problem else "")


def _values(first: Line, pending: _Pending, delimiter: str) -> tuple[list[str], str | None]:
    """Fields of a record, which takes further lines while a quote is open, and what is wrong with it.

    Lines that are no text end a record as others do; where the quotes do not fit, the first line alone is bad.
    """
    taken: list[Line] = []
    values = _fields(first.data, delimiter)
    if values is None and first.problem in (None, *NO_TEXT):
        taken = _rest(first, pending)
        values = _fields(b"\n".join([first.data, *(line.data for line in taken)]), delimiter) if taken else None
    if values is None:
        pending.give_back(taken)
        return [], first.problem or "csv: broken quotes"
    return values, next((line.problem for line in (first, *taken) if line.problem), None)


def _rest(first: Line, pending: _Pending) -> list[Line]:
    """The lines up to the one that closes the open quote; none where it is not closed."""
    taken: list[Line] = []
    size = len(first.data)
    is_open = first.data.count(b'"') % 2 == 1
    while is_open and len(taken) < MAX_RECORD_LINES and size < MAX_LINE:
        line = pending.take()
        if line is None:
            break
        taken.append(line)
        if line.problem not in (None, *NO_TEXT):
            break
        size += len(line.data)
        is_open ^= line.data.count(b'"') % 2 == 1
    else:
        if not is_open:
            return taken
    pending.give_back(taken)
    return []


def _fields(data: bytes, delimiter: str) -> list[str] | None:
    try:
        rows = list(csv.reader([data.decode(errors="replace")], delimiter=delimiter, strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None
