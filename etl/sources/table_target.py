"""The target of a ``table`` source: a class, or a JSON list with a number (or null) per label or column."""

from typing import TYPE_CHECKING

from etl.ingest import cast_number
from etl.quarantine import Quarantine, column, literal
from etl.sources.models import TableSource

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def as_list(value: "str | list[str] | None") -> list[str]:
    """One or many as a list."""
    return [] if value is None else [value] if isinstance(value, str) else value


def target_sql(con: "DuckDBPyConnection", quarantine: Quarantine, source: TableSource) -> str:
    """SQL for the canonical ``label`` of a row of ``main``; cells that cannot be read are set aside and unknown."""
    names = as_list(source.label)
    if not names:
        return "null::varchar"
    if source.label_separator:
        return column(names[0])  # `label_names` knows what stands in it
    if source.target == "class":
        return column(names[0])
    part = as_list(source.main)[0]
    read = _zero_or_one if source.target == "multilabel" else _number
    cells = [read(con, quarantine, part, name) for name in names]
    known = " or ".join(f"({cell}) is not null" for cell in cells)
    return f"case when {known} then {_json(cells)} end"


def label_names(con: "DuckDBPyConnection", source: TableSource) -> list[str]:
    """Class names in id order, or what the numbers stand for. Names between separators become numbers here.

    Args:
        con: has ``samples``.
        source: of the recipe.
    """
    if source.target == "class":
        rows = con.execute("select distinct label from samples where label is not null order by 1").fetchall()
        return [row[0] for row in rows]
    if not source.label_separator:
        return as_list(source.label)
    parts = f"list_transform(string_split(label, {literal(source.label_separator)}), lambda x: trim(x))"
    rows = con.execute(f"select distinct unnest({parts}) as name from samples order by 1").fetchall()
    names = [row[0] for row in rows if row[0]]
    cells = [f"list_contains({parts}, {literal(name)})::integer" for name in names]
    con.execute(f"update samples set label = {_json(cells)} where label is not null")
    return names


def _json(cells: list[str]) -> str:
    return "'[' || " + " || ',' || ".join(f"coalesce(({cell})::varchar, 'null')" for cell in cells) + " || ']'"


def _number(con: "DuckDBPyConnection", quarantine: Quarantine, part: str, name: str) -> str:
    return cast_number(con, quarantine, part, "main", name)


def _zero_or_one(con: "DuckDBPyConnection", quarantine: Quarantine, part: str, name: str) -> str:
    text = column(name)
    flag = (
        f"case when lower({text}) in ('1', '1.0', 'true') then 1 when lower({text}) in ('0', '0.0', 'false') then 0 end"
    )
    quarantine.add(
        part,
        f"select _file as file, _row as line, {literal(f'not 0 or 1: {name}')} as reason, {text} as raw from main "
        f"where {text} is not null and ({flag}) is null",
    )
    return flag
