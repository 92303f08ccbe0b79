"""Columns of times: numbers or timestamps, whichever most of a column's values are."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from etl.quarantine import Quarantine, column, literal

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

TimeKind = Literal["numbers", "timestamps"]


@dataclass(frozen=True)
class TimeColumn:
    """How to read a text column of times.

    Attributes:
        kind: what most of its values are; None where none is a time.
        sql: the time as a finite double, of a timestamp the seconds since 1970 (without a zone: UTC); null if unreadable.
        other: the same for the other kind: not null where the kinds are mixed.
    """

    kind: TimeKind | None
    sql: str
    other: str


def time_column(con: "DuckDBPyConnection", table: str, name: str) -> TimeColumn:
    """Look at all values of a column of a DuckDB table of texts."""
    text = column(name)
    number = f"case when not contains({text}, '_') and isfinite(try_cast({text} as double)) then try_cast({text} as double) end"
    stamp = f"epoch(try_cast({text} as timestamptz))"
    numbers, stamps = con.execute(f"select count({number}), count({stamp}) from {table}").fetchall()[0]
    if numbers >= stamps:
        return TimeColumn("numbers" if numbers else None, number, stamp)
    return TimeColumn("timestamps", stamp, number)


def read_time(con: "DuckDBPyConnection", quarantine: Quarantine, part: str, table: str, name: str) -> TimeColumn:
    """`time_column`, for rows that stay without a time: a value that cannot be read is set aside and becomes null."""
    time = time_column(con, table, name)
    mixed, bad = literal(f"numbers and timestamps mixed: {name}"), literal(f"not a time: {name}")
    quarantine.add(
        part,
        f"select _file as file, _row as line, case when {time.other} is not null then {mixed} else {bad} end as reason, "
        f"{column(name)} as raw from {table} where {column(name)} is not null and {time.sql} is null",
    )
    return time
