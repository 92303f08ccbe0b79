"""Source ``table``: a user's own tables, photos and series, without a line of Python."""

import string
from pathlib import Path
from typing import TYPE_CHECKING

from etl.ingest import RawFile, cast_number, load
from etl.quarantine import Quarantine, column, literal
from etl.recipe import Recipe, TableSource
from etl.sources.samples import Samples

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def raw_files(source: TableSource) -> list[str]:
    """Raw files that the source reads."""
    side = [source.text.table] if source.text and source.text.table else []
    return [source.main, *side, *([source.series.table] if source.series else [])]


def read(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawFile], recipe: Recipe, raw: Path
) -> Samples:
    """Make the canonical tables.

    Raises:
        ValueError: a missing column.
    """
    source = recipe.source
    assert isinstance(source, TableSource)
    numeric = list(recipe.tabular.numeric or []) if recipe.tabular else []
    categorical = list(recipe.tabular.categorical or []) if recipe.tabular else []
    own_text = source.text.columns if source.text and not source.text.table and recipe.text else []
    fields = [f for _, f, _, _ in string.Formatter().parse(source.image or "") if f] if recipe.image else []
    named = [source.id, source.group, source.label, *numeric, *categorical, *own_text, *fields]
    columns = list(dict.fromkeys(name for name in named if name))
    counts = {f"rows of {source.main}": load(con, quarantine, files[source.main], "main", columns)}
    counts |= _unique_ids(con, quarantine, source)
    selected = _columns(con, quarantine, source, recipe, numeric, categorical)
    con.execute(f"create table samples as select {', '.join(selected)}, _file, _row from main")
    if source.text and source.text.table and recipe.text:
        counts |= _join_text(con, quarantine, files, source)
    counts |= _read_series(con, quarantine, files, recipe)
    labels = [
        row[0]
        for row in con.execute("select distinct label from samples where label is not null order by 1").fetchall()
    ]
    return Samples(numeric, categorical, labels, source.group or source.id, counts)


def _unique_ids(con: "DuckDBPyConnection", quarantine: Quarantine, source: TableSource) -> dict[str, int]:
    """Rows without an id, and later rows of an id that was there before, are set aside."""
    key = column(source.id)
    quarantine.add(
        source.main,
        f"select _file as file, _row as line, 'no id' as reason, null as raw from main where {key} is null",
    )
    con.execute(f"delete from main where {key} is null")
    later = (
        f"select _file, _row, {key} as id from main qualify row_number() over (partition by {key} order by _row) > 1"
    )
    n = quarantine.add(
        source.main, f"select _file as file, _row as line, 'duplicate id' as reason, id as raw from ({later})"
    )
    con.execute(f"delete from main where _row in (select _row from ({later}))")
    return {"duplicates": n}


def _columns(
    con: "DuckDBPyConnection",
    quarantine: Quarantine,
    source: TableSource,
    recipe: Recipe,
    numeric: list[str],
    categorical: list[str],
) -> list[str]:
    text = "null::varchar"
    if source.text and not source.text.table and recipe.text:
        text = f"nullif(trim(concat_ws(' ', {', '.join(map(column, source.text.columns))})), '')"
    return [
        f"{column(source.id)} as row_id",
        f"coalesce({column(source.group)}, {column(source.id)}) as grp"
        if source.group
        else f"{column(source.id)} as grp",
        f"{column(source.label)} as label" if source.label else "null::varchar as label",
        f"{text} as text",
        f"{_template(source.image)} as image" if source.image and recipe.image else "null::varchar as image",
        *(f"{cast_number(con, quarantine, source.main, 'main', name)} as {column(f'n:{name}')}" for name in numeric),
        *(f"{column(name)} as {column(f'c:{name}')}" for name in categorical),
    ]


def _template(template: str) -> str:
    """SQL that fills a template such as ``photos/{product_id}.jpg``; null where a field is null."""
    parts = []
    for text, name, _, _ in string.Formatter().parse(template):
        parts += [literal(text)] if text else []
        parts += [column(name)] if name else []
    return " || ".join(parts)


def _join_text(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawFile], source: TableSource
) -> dict[str, int]:
    assert source.text
    assert source.text.table
    name, key = source.text.table, source.text.id or source.id
    n = load(con, quarantine, files[name], "texts", [key, *source.text.columns])
    text = f"nullif(trim(concat_ws(' ', {', '.join(map(column, source.text.columns))})), '')"
    con.execute(f"create table side as select {column(key)} as row_id, {text} as text, _file, _row from texts")
    known = "row_id in (select row_id from samples)"
    quarantine.add(
        name,
        f"select _file as file, _row as line, 'unknown id' as reason, row_id as raw from side where not coalesce({known}, false)",
    )
    later = f"select * from side where {known} qualify row_number() over (partition by row_id order by _row) > 1"
    quarantine.add(name, f"select _file as file, _row as line, 'duplicate id' as reason, row_id as raw from ({later})")
    con.execute(
        "update samples set text = side.text from (select * from side qualify row_number() over "
        "(partition by row_id order by _row) = 1) side where side.row_id = samples.row_id"
    )
    return {f"rows of {name}": n}


def _read_series(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawFile], recipe: Recipe
) -> dict[str, int]:
    source = recipe.source
    assert isinstance(source, TableSource)
    if source.series is None or recipe.timeseries is None:
        con.execute("create table series (row_id varchar, time double, variable varchar, value double)")
        return {}
    s = source.series
    n = load(con, quarantine, files[s.table], "long", [s.id, s.time, s.variable, s.value])
    value = cast_number(con, quarantine, s.table, "long", s.value)
    time = f"coalesce(try_cast({column(s.time)} as double), epoch(try_cast({column(s.time)} as timestamp)))"
    con.execute(
        f"create table points as select {column(s.id)} as row_id, {time} as time, {column(s.variable)} as variable, "
        f"{value} as value, _file, _row from long"
    )
    bad = {
        "unknown id": "not coalesce(row_id in (select row_id from samples), false)",
        "no time": "time is null",
        "no variable": "variable is null",
    }
    for reason, condition in bad.items():
        quarantine.add(
            s.table,
            f"select _file as file, _row as line, {literal(reason)} as reason, row_id as raw from points where {condition}",
        )
        con.execute(f"delete from points where {condition}")
    con.execute(
        "create table series as select row_id, time, variable, value from points where value is not null "
        "qualify row_number() over (partition by row_id, time, variable order by _row desc) = 1"
    )
    return {f"rows of {s.table}": n}
