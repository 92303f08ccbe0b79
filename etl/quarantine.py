"""Records that are set aside, with the reason: never dropped in silence, never passed on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

MAX_RAW_CHARS = 4096  # enough to see what was wrong; a broken line can be a gigabyte


class Quarantine:
    """The quarantine of one build: a table ``quarantine(part, file, line, reason, raw)`` in its DuckDB connection.

    ``part`` names the Parquet that a row goes to (a raw table, or ``images``), ``line`` is the 1-based line or record
    number in ``file`` (0: the file itself), ``raw`` the record's beginning.

    Attributes:
        records: raw records read so far, good and bad.
        rows: good rows read, by file.
    """

    def __init__(self, con: "DuckDBPyConnection"):
        self.con = con
        self.records = 0
        self.rows: dict[str, int] = {}
        con.execute("create table quarantine (part varchar, file varchar, line bigint, reason varchar, raw varchar)")

    def add(self, part: str, select: str) -> int:
        """Add the rows (file, line, reason, raw) of a SELECT; returns how many."""
        before = self.total()
        self.con.execute(
            f"insert into quarantine select {literal(part)}, file, line, reason, left(raw, {MAX_RAW_CHARS}) from ({select})"
        )
        return self.total() - before

    def add_rows(self, part: str, rows: Sequence[tuple[str, int, str | None, str | None]]) -> None:
        """Add rows (file, line, reason, raw)."""
        if not rows:
            return
        import pyarrow as pa

        names = ("file", "line", "reason", "raw")
        arrived = pa.table(dict(zip(names, (list(values) for values in zip(*rows, strict=True)), strict=True)))
        arrived = arrived.cast(
            pa.schema([("file", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("raw", pa.string())])
        )
        self.con.register("arrived", arrived)
        self.add(part, "from arrived")
        self.con.unregister("arrived")

    def total(self) -> int:
        """Number of records set aside."""
        return self.con.execute("select count(*) from quarantine").fetchall()[0][0]

    def by_reason(self) -> dict[str, int]:
        """Number of records per reason, most frequent first."""
        rows = self.con.execute("select reason, count(*) n from quarantine group by 1 order by n desc, reason")
        return dict(rows.fetchall())

    def write(self, folder: Path) -> None:
        """Write one Parquet per part into ``folder``; makes nothing where nothing was set aside."""
        for (part,) in self.con.execute("select distinct part from quarantine order by 1").fetchall():
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / f"{part.replace('/', '__')}.parquet"
            self.con.execute(
                f"copy (select file, line, reason, raw from quarantine where part = {literal(part)}"
                f" order by all) to {literal(target)} (format parquet, compression zstd)"
            )


def literal(value: object) -> str:
    """A SQL string literal."""
    return "'" + str(value).replace("'", "''") + "'"


def column(name: str) -> str:
    """A quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'
