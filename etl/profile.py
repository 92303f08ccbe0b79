"""What the columns of raw tables look like: the facts that `etl.init` guesses from."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from etl.ingest import column_names, load
from etl.quarantine import Quarantine, column, literal
from etl.raw import RawTable, register

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ROWS = 200_000  # are looked at, per file
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
MOSTLY = 0.98  # of the values must be of a kind
TEXT_WORDS = 2.5  # mean words above which a column is text
MAX_CLASSES = 200

Kind = Literal["empty", "number", "time", "image", "text", "category", "key"]


@dataclass(frozen=True)
class Column:
    """A column: its kind, values present, distinct values, mean and high (95 %) number of words."""

    name: str
    kind: Kind
    present: int
    distinct: int
    words: float
    high_words: int

    @property
    def unique(self) -> bool:
        """Names its row, but for at most one in a hundred."""
        return self.kind not in ("text", "time", "empty") and self.distinct >= 0.99 * self.present > 1


@dataclass(frozen=True)
class Table:
    """A profiled table; its rows are in the DuckDB table ``sql``.

    Attributes:
        bad: rows set aside while reading.
    """

    name: str
    sql: str
    rows: int
    bad: int
    columns: dict[str, Column]

    def of(self, *kinds: Kind) -> list[Column]:
        """Columns of some kinds, in order."""
        return [c for c in self.columns.values() if c.kind in kinds]


def profile(con: "DuckDBPyConnection", raw: Path, name: str, number: int) -> Table:
    """Read the beginning of a table and describe its columns. Raises ValueError for one that cannot be read."""
    registered = register(raw, name)
    names = _names(con, registered)
    if not names:
        raise ValueError(f"{raw / name}: no columns")
    sql = f"t{number}"
    quarantine = Quarantine(con)
    rows = load(con, quarantine, registered, sql, [], tuple(names), where=f"_row <= {ROWS}")
    bad = quarantine.total()
    con.execute("drop table quarantine")
    return Table(name, sql, rows, bad, {c: _column(con, sql, c) for c in names})


def _names(con: "DuckDBPyConnection", table: RawTable) -> list[str]:
    """Columns of all files, each once, whatever the case."""
    names: dict[str, str] = {}
    for file in table.files:
        if not file.broken:
            for name in column_names(con, file):
                names.setdefault(name.lower(), name)
    return list(names.values())


def _column(con: "DuckDBPyConnection", sql: str, name: str) -> Column:
    c = column(name)
    words = f"len(string_split(trim({c}), ' '))"
    suffix = literal(rf"\.({'|'.join(IMAGE_SUFFIXES)})$")
    present, distinct, numbers, whole, times, images, mean, high = con.execute(
        f"select count({c}), count(distinct {c}), count(*) filter (isfinite(try_cast({c} as double))), "
        f"count(*) filter (regexp_full_match({c}, '[-+]?\\d+')), count(try_cast({c} as timestamptz)), "
        f"count(*) filter (regexp_matches(lower({c}), {suffix})), coalesce(avg({words}), 0), "
        f"coalesce(quantile_cont({words}, 0.95), 0) from {sql}"
    ).fetchall()[0]
    enough = MOSTLY * present
    kind: Kind = "key"
    if not present:
        kind = "empty"
    elif numbers >= enough:
        kind = "key" if whole == present and distinct == present and _names_things(name) else "number"
    elif times >= enough:
        kind = "time"
    elif images >= enough:
        kind = "image"
    elif mean >= TEXT_WORDS and distinct > 0.3 * present:
        kind = "text"
    elif distinct <= min(max(MAX_CLASSES, 0.05 * present), 0.5 * present):
        kind = "category"
    return Column(name, kind, present, distinct, mean, int(high))


def _names_things(name: str) -> bool:
    return (
        re.search(r"(^|[_\W])(id|key|no|nr|uuid|code)$|[a-z]I[Dd]$|^id", name.lower() if name.islower() else name)
        is not None
    )


def overlap(con: "DuckDBPyConnection", a: Table, a_column: str, b: Table, b_column: str) -> float:
    """Share of the distinct values of ``a``'s column that ``b``'s has."""
    left, right = column(a_column), column(b_column)
    found, all_ = con.execute(
        f"select count(*) filter ({left} in (select {right} from {b.sql})), count(*) "
        f"from (select distinct {left} from {a.sql} where {left} is not null)"
    ).fetchall()[0]
    return found / all_ if all_ else 0.0


def told_by(con: "DuckDBPyConnection", table: Table, name: str, label: str) -> float:
    """Share of the labelled rows whose label follows from this column's value (the most frequent label of each value)."""
    c, y = column(name), column(label)
    right, all_ = con.execute(
        f"select sum(most), sum(n) from (select max(n) as most, sum(n) as n from (select {c}, {y}, count(*) as n from {table.sql} "
        f"where {y} is not null group by all) group by {c})"
    ).fetchall()[0]
    return (right or 0) / all_ if all_ else 0.0
