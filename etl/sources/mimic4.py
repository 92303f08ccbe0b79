"""Source ``mimic4``: MIMIC-IV v2.2 as published: hosp, icu, note and mimic-cxr-jpg (Johnson et al. 2023).

Raw files -> ``stays`` (`mimic.cohort`) -> ``series`` (`mimic.series`) and ``documents`` (`mimic.documents`) ->
the canonical tables. All joins run in DuckDB; of chart events only the rows of the wanted items are ever stored.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from etl.ingest import cast_number
from etl.quarantine import Quarantine, column
from etl.raw import RawTable
from etl.recipe import Recipe
from etl.sources.mimic import cohort, documents, series
from etl.sources.mimic.tables import count
from etl.sources.mimic.variables import layout
from etl.sources.models import MimicSource
from etl.sources.samples import Samples

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def raw_files(source: MimicSource) -> list[str]:
    """Raw files that the source reads."""
    tables = [source.icustays, source.admissions, source.chartevents, source.labevents]
    side = [source.patients if source.demographics else None, source.notes, source.image_metadata]
    return [*tables, *(name for name in side if name)]


def read(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], recipe: Recipe, raw: Path
) -> Samples:
    """Make the canonical tables.

    Raises:
        ValueError: a missing column, an unknown variable or itemid, or tabular columns that this source does not have.
    """
    source = recipe.source
    assert isinstance(source, MimicSource)
    flow = cohort.read(con, quarantine, files, source)
    flow |= series.read(con, quarantine, files, source)
    flow |= documents.read_notes(con, quarantine, files, source.notes)
    flow |= documents.read_images(con, quarantine, files, source)
    pool = source.samples == "pool"
    flow |= documents.join_pool(con, source) if pool else documents.join_cohort(con, source)
    flow["stays with a series"] = count(con, "select count(distinct row_id) from series")
    numeric, categorical = _columns(recipe, source)
    _select(con, quarantine, source, labelled=not pool)
    return Samples(numeric, categorical, [] if pool else cohort.LABELS, "subject_id", flow, layout(source))


def _columns(recipe: Recipe, source: MimicSource) -> tuple[list[str], list[str]]:
    if recipe.tabular is None:
        return [], []
    chosen = []
    for kind, there in (("numeric", cohort.NUMERIC), ("categorical", cohort.CATEGORICAL)):
        named = getattr(recipe.tabular, kind)
        unknown = [name for name in named or [] if name not in there]
        if unknown:
            raise ValueError(f"tabular.{kind}: mimic4 has no {unknown[0]!r}; there are {', '.join(there)}")
        chosen.append(there if named is None else named)
    return chosen[0], chosen[1]


def _select(con: "DuckDBPyConnection", quarantine: Quarantine, source: MimicSource, labelled: bool) -> None:
    """Make ``samples`` of ``documents``."""
    facts, joined = "", ""
    if source.demographics:
        part = source.patients
        age, year = (cast_number(con, quarantine, part, "patients", name) for name in ("anchor_age", "anchor_year"))
        names = ["first_careunit", *cohort.ADMISSION_FACTS]
        # Of a note or an image outside of a stay, no admission is known: its cells stay missing.
        facts = f", {age} + year(intime) - {year} as {column('n:age')}, gender as {column('c:gender')}" + "".join(
            f", {name} as {column(f'c:{name}')}" for name in names
        )
        joined = "left join patients p on p.subject_id = d.subject_id"
    label, time = ("s.outcome", "epoch(s.cutoff)") if labelled else ("null::varchar", "null::double")
    con.execute(
        f"""create table samples as select d.row_id, d.subject_id as grp, {label} as label, {time} as time,
            nullif(trim(d.text), '') as text, d.image {facts},
            epoch(d.text_known) as "t:text", epoch(d.image_taken) as "t:image",
            epoch(s.intime) + latest.seconds as "t:timeseries", d._file, d._row
        from documents d left join stays s on s.stay_id = d.row_id {joined}
        left join (select stay_id, max(seconds) as seconds from readings group by 1) latest on latest.stay_id = d.row_id"""
    )
