"""Records that are set aside, with the reason: never dropped in silence, never passed on."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MAX_RAW_CHARS = 4096  # enough to see what was wrong; a broken line can be a gigabyte


class Quarantine:
    """The quarantine of one build: a table ``quarantine(file, line, reason, raw)`` in its DuckDB connection.

    ``line`` is the 1-based line or record number in ``file`` (0: the file itself), ``raw`` the record's beginning.
    """

    def __init__(self, con: "DuckDBPyConnection"):
        self.con = con
        con.execute("create table quarantine (file varchar, line bigint, reason varchar, raw varchar)")

    def add(self, select: str, parameters: list[object] | None = None) -> int:
        """Add the rows (file, line, reason, raw) of a SELECT; returns how many."""
        before = self.total()
        self.con.execute(
            f'insert into quarantine select file, line, reason, left("raw", {MAX_RAW_CHARS}) from ({select})',
            parameters or [],
        )
        return self.total() - before

    def total(self) -> int:
        """Number of records set aside."""
        return self.con.execute("select count(*) from quarantine").fetchall()[0][0]

    def by_reason(self) -> dict[str, int]:
        """Number of records per reason, most frequent first."""
        rows = self.con.execute("select reason, count(*) n from quarantine group by 1 order by n desc, reason")
        return dict(rows.fetchall())

    def write(self, folder: Path) -> None:
        """Write one Parquet per raw file into ``folder``; makes nothing where nothing was set aside."""
        names = self.con.execute("select distinct file from quarantine order by 1").fetchall()
        for (name,) in names:
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / f"{name.replace('/', '__')}.parquet"
            self.con.execute(
                "copy (select * from quarantine where file = $1 order by line, reason, raw)"
                f" to {literal(target)} (format parquet, compression zstd)",
                [name],
            )


def literal(value: object) -> str:
    """A SQL string literal."""
    return "'" + str(value).replace("'", "''") + "'"


def column(name: str) -> str:
    """A quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'
