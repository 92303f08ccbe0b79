"""Long and wide tables of time series -> the canonical table ``series``."""

from typing import TYPE_CHECKING

from etl.ingest import cast_number, load
from etl.quarantine import Quarantine, column, literal
from etl.raw import RawTable
from etl.sources.models import SeriesTable
from etl.sources.table_time import TimeKind, time_column

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def read(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], tables: list[SeriesTable]
) -> tuple[dict[str, int], list[TimeKind | None]]:
    """Make ``series`` from all tables; needs ``samples``. A point that is there twice is kept once.

    Returns:
        Rows read, by table; and what each table's times are (None: it has none).
    """
    con.execute(
        "create table points (row_id varchar, time double, variable varchar, value double, _file varchar, _row bigint)"
    )
    counts: dict[str, int] = {}
    kinds: list[TimeKind | None] = []
    for table in tables:
        key = [table.id] if isinstance(table.id, str) else table.id
        values = table.values or [str(table.value)]
        needed = [*key, table.time, *([table.variable] if table.variable else []), *values]
        n = load(con, quarantine, files[table.table], "arrived", list(dict.fromkeys(needed)))
        counts[f"rows of {table.table}"] = n
        kinds.append(_drop_unusable(con, quarantine, table, key))
        for name in values:
            _add_points(con, quarantine, table, name)
        con.execute("drop table arrived")
        con.execute("drop table timed")
    _drop_repeats(con, quarantine)
    return counts, kinds


def _drop_unusable(
    con: "DuckDBPyConnection", quarantine: Quarantine, table: SeriesTable, key: list[str]
) -> TimeKind | None:
    """``timed``: the rows whose id, time and variable are usable, with ``_id`` and ``_time``."""
    identity = column(key[0]) if len(key) == 1 else f"nullif(concat_ws('|', {', '.join(map(column, key))}), '')"
    text = column(table.time)
    time = time_column(con, "arrived", table.time)
    variable = f"when {column(table.variable)} is null then 'no variable' " if table.variable else ""
    con.execute(
        f"create table timed as select *, {identity} as _id, {time.sql} as _time, case "
        f"when {identity} is null or {identity} not in (select row_id from samples) then 'unknown id' "
        f"when {text} is null then 'no time' when {time.sql} is null and {time.other} is not null then 'time: numbers and dates mixed' "
        f"when {time.sql} is null then 'not a time' {variable}end as _reason from arrived"
    )
    quarantine.add(
        table.table,
        f"select _file as file, _row as line, _reason as reason, concat_ws(' @ ', _id, {text}) as raw from timed "
        "where _reason is not null",
    )
    con.execute("delete from timed where _reason is not null")
    return time.kind


def _add_points(con: "DuckDBPyConnection", quarantine: Quarantine, table: SeriesTable, name: str) -> None:
    value = cast_number(con, quarantine, table.table, "timed", name)
    variable = column(table.variable) if table.variable else literal(name)
    con.execute(
        f"insert into points select * from (select _id, _time, {variable}, {value} as value, _file, _row from timed) "
        "where value is not null"
    )


def _drop_repeats(con: "DuckDBPyConnection", quarantine: Quarantine) -> None:
    """The first value of (sample, time, variable) is kept; the others are set aside."""
    order = "row_number() over (partition by row_id, time, variable order by _file, _row)"
    con.execute(f"create table ordered as select *, {order} as nth from points")
    quarantine.add(
        "series",
        "select _file as file, _row as line, 'duplicate point' as reason, "
        "concat_ws(' ', row_id, '@', time, variable, '=', value) as raw from ordered where nth > 1",
    )
    con.execute("create table series as select row_id, time, variable, value from ordered where nth = 1")
    con.execute("drop table ordered")
    con.execute("drop table points")
