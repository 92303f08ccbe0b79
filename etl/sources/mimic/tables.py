"""What the readers of MIMIC's tables share."""

from typing import TYPE_CHECKING

from etl.quarantine import Quarantine, literal

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def set_aside(
    con: "DuckDBPyConnection", quarantine: Quarantine, part: str, table: str, reason: str, condition: str, raw: str
) -> int:
    """Move the rows of ``table`` (it has ``_file`` and ``_row``) that meet a condition to the quarantine.

    Args:
        con: connection.
        quarantine: takes them.
        part: raw file that they come from.
        table: to take them from.
        reason: why.
        condition: SQL; null counts as false.
        raw: SQL for what to show of the row.

    Returns:
        How many.
    """
    n = quarantine.add(
        part,
        f"select _file as file, _row as line, {literal(reason)} as reason, cast({raw} as varchar) as raw "
        f"from {table} where {condition}",
    )
    if n:
        con.execute(f"delete from {table} where {condition}")
    return n


def parse_times(con: "DuckDBPyConnection", quarantine: Quarantine, part: str, table: str, names: list[str]) -> None:
    """Make text columns timestamps; a row with a text that is none is set aside, an empty cell stays empty."""
    for name in names:
        condition = f"{name} is not null and try_cast({name} as timestamp) is null"
        set_aside(con, quarantine, part, table, f"not a time: {name}", condition, name)
        con.execute(f"alter table {table} alter {name} type timestamp using try_cast({name} as timestamp)")


def count(con: "DuckDBPyConnection", query: str) -> int:
    """The single number that a query gives."""
    return con.execute(query).fetchall()[0][0]
