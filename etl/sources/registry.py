"""One line per source: ``kind`` in the recipe -> the module that reads it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from etl.quarantine import Quarantine
from etl.raw import RawTable
from etl.recipe import Recipe
from etl.sources import amazon2018, mimic4, table
from etl.sources.samples import Samples

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


class Source(Protocol):
    """What the module of a source offers."""

    def raw_files(self, source: Any) -> list[str]:
        """Raw files that this ``source`` block of a recipe reads, relative to the raw folder."""
        ...

    def read(
        self, con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], recipe: Recipe, raw: Path
    ) -> Samples:
        """Make the canonical tables (see `etl.sources.samples`)."""
        ...


SOURCES: dict[str, Source] = {
    "table": table,
    "amazon2018": amazon2018,
    "mimic4": mimic4,
}
