"""Source ``table``: a user's own tables, photos and series, without a line of Python."""

import string
from pathlib import Path
from typing import TYPE_CHECKING

from etl.ingest import cast_number, column_names, load
from etl.quarantine import Quarantine, column, literal
from etl.raw import RawTable
from etl.recipe import Recipe
from etl.sources import table_series
from etl.sources.models import TableSource
from etl.sources.samples import Samples
from etl.sources.table_target import as_list, label_names, target_sql
from etl.sources.table_time import TimeKind, read_time

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def raw_files(source: TableSource) -> list[str]:
    """Raw tables that the source reads."""
    side = [source.text.table] if source.text and source.text.table else []
    names = [*as_list(source.main), *(j.table for j in source.join), *side, *(s.table for s in source.series_tables)]
    return list(dict.fromkeys(names))


def read(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], recipe: Recipe, raw: Path
) -> Samples:
    """Make the canonical tables.

    Raises:
        ValueError: a missing column, or one that two tables have.
    """
    source = recipe.source
    assert isinstance(source, TableSource)
    numeric = list(recipe.tabular.numeric or []) if recipe.tabular else []
    categorical = list(recipe.tabular.categorical or []) if recipe.tabular else []
    counts = _load_main(con, quarantine, files, source, _main_columns(source, recipe, numeric, categorical))
    counts |= _keep(con, source)
    counts |= _unique_ids(con, quarantine, source)
    for side in source.join:
        counts |= _join(con, quarantine, files, side.table, side.on, side.id or side.on, side.columns)
    selected = _columns(con, quarantine, source, recipe, numeric, categorical)
    time = read_time(con, quarantine, as_list(source.main)[0], "main", source.time) if source.time else None
    selected += [f"{time.sql} as time"] if time else []
    con.execute(f"create table samples as select {', '.join(selected)}, _file, _row from main")
    con.execute("drop table main")
    if source.text and source.text.table and recipe.text:
        counts |= _join_text(con, quarantine, files, source)
    if recipe.image:
        counts["images named"] = _count(con, "samples where image is not null")
    tables = source.series_tables if recipe.timeseries else []
    series_counts, kinds = table_series.read(con, quarantine, files, tables)
    counts |= series_counts
    if tables and time and time.kind and _same_clock(source, time.kind, kinds):
        _add_latest_point(con, recipe)
    labels = label_names(con, source)
    group = source.group or ", ".join(as_list(source.id))
    return Samples(numeric, categorical, labels, group, counts, target=source.target)


def _count(con: "DuckDBPyConnection", what: str) -> int:
    return con.execute(f"select count(*) from {what}").fetchall()[0][0]


def _main_columns(source: TableSource, recipe: Recipe, numeric: list[str], categorical: list[str]) -> list[str]:
    """Columns that the main tables must have: all that are named, less what is joined."""
    text = source.text.columns if source.text and not source.text.table and recipe.text else []
    fields = [f for _, f, _, _ in string.Formatter().parse(source.image or "") if f] if recipe.image else []
    named = [
        *as_list(source.id),
        source.group,
        *as_list(source.label),
        source.time,
        *numeric,
        *categorical,
        *text,
        *fields,
    ]
    joined = [name for side in source.join for name in side.columns]
    twice = [name for name in joined if joined.count(name) > 1]
    if twice:
        raise ValueError(f"source.join: the column {twice[0]!r} is joined twice")
    own = [name for name in named if name and name not in joined]
    return list(dict.fromkeys([*own, *source.keep, *(side.on for side in source.join)]))


def _load_main(
    con: "DuckDBPyConnection",
    quarantine: Quarantine,
    files: dict[str, RawTable],
    source: TableSource,
    columns: list[str],
) -> dict[str, int]:
    names = as_list(source.main)
    if len(names) == 1:
        return {f"rows of {names[0]}": load(con, quarantine, files[names[0]], "main", columns)}
    there = {
        name: {c for file in files[name].files if not file.broken for c in column_names(con, file)} for name in names
    }
    for name in columns:
        if not any(name in found for found in there.values()):
            known = ", ".join(sorted(set().union(*there.values())))
            raise ValueError(f"{', '.join(names)}: no column {name!r}; there are {known}")
    counts = {}
    for i, name in enumerate(names):
        own = [c for c in columns if c in there[name]]
        other = tuple(c for c in columns if c not in there[name])
        counts[f"rows of {name}"] = load(con, quarantine, files[name], f"main_{i}", own, other)
    parts = " union all by name ".join(f"from main_{i}" for i in range(len(names)))
    con.execute(f"create table main as {parts}")
    for i in range(len(names)):
        con.execute(f"drop table main_{i}")
    return counts


def _keep(con: "DuckDBPyConnection", source: TableSource) -> dict[str, int]:
    """Leave out the rows whose column has none of the values wanted."""
    counts = {}
    for name, values in source.keep.items():
        known = ", ".join(literal(value) for value in values if value is not None) or "null"
        kept = f"coalesce({column(name)} in ({known}), false){f' or {column(name)} is null' if None in values else ''}"
        before = _count(con, "main")
        con.execute(f"delete from main where not ({kept})")
        counts[f"left out by keep: {name}"] = before - _count(con, "main")
    return counts


def key_sql(names: list[str]) -> str:
    """SQL for an id of one or several columns; null where none is there."""
    return column(names[0]) if len(names) == 1 else f"nullif(concat_ws('|', {', '.join(map(column, names))}), '')"


def _unique_ids(con: "DuckDBPyConnection", quarantine: Quarantine, source: TableSource) -> dict[str, int]:
    """Rows without an id, and later rows of an id that was there before, are set aside."""
    part = as_list(source.main)[0]
    con.execute("alter table main add column _id varchar")
    con.execute(f"update main set _id = {key_sql(as_list(source.id))}")
    quarantine.add(
        part, "select _file as file, _row as line, 'no id' as reason, null as raw from main where _id is null"
    )
    con.execute("delete from main where _id is null")
    n = _set_aside_later(con, quarantine, part, "main", "_id")
    return {"duplicates": n}


def _set_aside_later(con: "DuckDBPyConnection", quarantine: Quarantine, part: str, table: str, key: str) -> int:
    """Set aside and delete all but the first row of each key."""
    con.execute(
        f"create temp table later as select rowid as later_id, _file, _row, {column(key)} as id from {table} "
        f"qualify row_number() over (partition by {column(key)} order by _file, _row) > 1"
    )
    reason = "select _file as file, _row as line, 'duplicate id' as reason, id as raw from later"
    n = quarantine.add(part, reason)
    con.execute(f"delete from {table} where rowid in (select later_id from later)")
    con.execute("drop table later")
    return n


def _join(
    con: "DuckDBPyConnection",
    quarantine: Quarantine,
    files: dict[str, RawTable],
    name: str,
    on: str,
    key: str,
    columns: list[str],
) -> dict[str, int]:
    """Add the columns of a side table to ``main``."""
    n = load(con, quarantine, files[name], "side", list(dict.fromkeys([key, *columns])))
    quarantine.add(
        name,
        f"select _file as file, _row as line, 'no id' as reason, null as raw from side where {column(key)} is null",
    )
    con.execute(f"delete from side where {column(key)} is null")
    _set_aside_later(con, quarantine, name, "side", key)
    picked = ", ".join(f"side.{column(c)}" for c in columns if c != on)
    con.execute(
        f"create table joined as select main.*{', ' + picked if picked else ''} from main left join side "
        f"on main.{column(on)} = side.{column(key)}"
    )
    matched = _count(con, f"main where {column(on)} in (select {column(key)} from side)")
    con.execute("drop table main")
    con.execute("drop table side")
    con.execute("alter table joined rename to main")
    return {f"rows of {name}": n, f"rows joined with {name}": matched}


def _columns(
    con: "DuckDBPyConnection",
    quarantine: Quarantine,
    source: TableSource,
    recipe: Recipe,
    numeric: list[str],
    categorical: list[str],
) -> list[str]:
    part = as_list(source.main)[0]
    text = "null::varchar"
    if source.text and not source.text.table and recipe.text:
        text = f"nullif(trim(concat_ws(' ', {', '.join(map(column, source.text.columns))})), '')"
    return [
        "_id as row_id",
        f"{_group(source)} as grp",
        f"{target_sql(con, quarantine, source)} as label",
        f"{text} as text",
        f"{_template(source.image)} as image" if source.image and recipe.image else "null::varchar as image",
        *(f"{cast_number(con, quarantine, part, 'main', name)} as {column(f'n:{name}')}" for name in numeric),
        *(f"{column(name)} as {column(f'c:{name}')}" for name in categorical),
    ]


def _group(source: TableSource) -> str:
    if not source.group:
        return "_id"
    named = column(source.group)
    return f"coalesce({f'left({named}, {source.group_chars})' if source.group_chars else named}, _id)"


def _template(template: str) -> str:
    """SQL that fills a template such as ``photos/{product_id}.jpg``; null where a field is null."""
    parts = []
    for text, name, _, _ in string.Formatter().parse(template):
        parts += [literal(text)] if text else []
        parts += [column(name)] if name else []
    return " || ".join(parts)


def _join_text(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], source: TableSource
) -> dict[str, int]:
    assert source.text
    assert source.text.table
    name, key = source.text.table, as_list(source.text.id or source.id)
    n = load(con, quarantine, files[name], "texts", list(dict.fromkeys([*key, *source.text.columns])))
    text = f"nullif(trim(concat_ws(' ', {', '.join(map(column, source.text.columns))})), '')"
    con.execute(f"create table side as select {key_sql(key)} as row_id, {text} as text, _file, _row from texts")
    unknown = "row_id is null or row_id not in (select row_id from samples)"
    quarantine.add(
        name, f"select _file as file, _row as line, 'unknown id' as reason, row_id as raw from side where {unknown}"
    )
    con.execute(f"delete from side where {unknown}")
    _set_aside_later(con, quarantine, name, "side", "row_id")
    con.execute("update samples set text = side.text from side where side.row_id = samples.row_id")
    con.execute("drop table side")
    con.execute("drop table texts")
    return {f"rows of {name}": n}


def _same_clock(source: TableSource, own: TimeKind, kinds: list[TimeKind | None]) -> bool:
    """Whether the times of all series tables can be held against the samples' own.

    Raises:
        ValueError: a table that the recipe calls absolute has times of another kind.
    """
    tables = source.series_tables
    for table, kind in zip(tables, kinds, strict=True):
        if table.absolute and kind not in (own, None):
            raise ValueError(
                f"source.series: {table.table} is called absolute, but its {table.time!r} holds {kind} and source.time "
                f"({source.time!r}) {own}: give both the same kind, or leave absolute out"
            )
    return all(
        kind in (own, None) and (own == "timestamps" or table.absolute)
        for table, kind in zip(tables, kinds, strict=True)
    )


def _add_latest_point(con: "DuckDBPyConnection", recipe: Recipe) -> None:
    """``t:timeseries``: the time of a sample's last point, of the variables that are built."""
    assert recipe.timeseries
    wanted = recipe.timeseries.variables
    built = f"where variable in ({', '.join(map(literal, wanted))})" if wanted else ""
    con.execute('alter table samples add column "t:timeseries" double')
    con.execute(
        f'update samples set "t:timeseries" = last.time from (select row_id, max(time) as time from series {built} '
        "group by row_id) as last where last.row_id = samples.row_id"
    )
