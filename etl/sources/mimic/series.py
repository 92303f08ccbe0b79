"""Chart and lab events -> points of the 17 variables on hourly bins, cleaned as the benchmark cleans them."""

from typing import TYPE_CHECKING

from etl.ingest import load
from etl.quarantine import Quarantine, literal
from etl.raw import RawTable
from etl.sources.mimic.tables import count, parse_times, set_aside
from etl.sources.mimic.variables import converted_number, itemids, make_tables, parsed_number
from etl.sources.models import MimicSource

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# A bin is (k, k + 1] hours after admission to the ICU, and the first one has its left end, as the benchmark has it.
BIN = "greatest((seconds - 1) // 3600, 0)"
REACH = ""  # the variable of a point that only says how far the series reaches


def read(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], source: MimicSource
) -> dict[str, int]:
    """Make ``series`` from ``stays``; returns the flow of counts.

    In a bin, the latest measurement of a variable counts; of several at that time the greatest, as in the benchmark.
    """
    make_tables(con, source)
    con.execute(
        "create table events (part varchar, stay_id varchar, seconds bigint, variable varchar, inches boolean, "
        "pounds boolean, value varchar, valuenum varchar, uom varchar, _file varchar, _row bigint)"
    )
    parts = [_locate(con, quarantine, files, source, table) for table in ("chartevents", "labevents")]
    flow = {reason: sum(part[reason] for part in parts) for reason in parts[0]}
    flow |= _clean(con, quarantine, source)
    _bin(con)
    flow["hours with a measurement, summed over variables"] = count(con, f"select count(*) from ({_LAST})")
    return flow


def _locate(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], source: MimicSource, table: str
) -> dict[str, int]:
    """Add a raw table's events that lie inside of a stay's window and were stored in time; returns the flow of counts."""
    name = getattr(source, table)
    lacks = source.chartevents_lacks if table == "chartevents" else ["stay_id"]
    columns = ["subject_id", "stay_id", "charttime", "storetime", "itemid", "value", "valuenum", "valueuom"]
    wanted = ", ".join(literal(item) for item in itemids(source, table)) or "null"
    n = load(
        con,
        quarantine,
        files[name],
        table,
        [column for column in columns if column not in lacks],
        where=f"itemid in ({wanted})",
    )
    parse_times(con, quarantine, name, table, [t for t in ("charttime", "storetime") if t not in lacks])
    set_aside(con, quarantine, name, table, "no charttime", "charttime is null", "itemid")
    timed = count(con, f"select count(*) from {table}")
    if "stay_id" in lacks:
        stay = "asof join stays s on s.subject_id = e.subject_id and e.charttime >= s.intime"
    else:
        stay = "join stays s on s.stay_id = e.stay_id and e.charttime >= s.intime"
    inside = f"from {table} e {stay} join items i on i.itemid = e.itemid where e.charttime <= s.until"
    known = "true" if "storetime" in lacks else "(e.storetime is null or e.storetime <= s.cutoff)"
    here, in_store = con.execute(f"select count(*), count(*) filter ({known}) {inside}").fetchall()[0]
    seconds = "epoch(e.charttime)::bigint - epoch(s.intime)::bigint"
    value = "null" if "value" in lacks else "value"
    con.execute(
        f"insert into events select {literal(name)}, s.stay_id, {seconds}, variable, inches, pounds, {value}, valuenum, "
        f"valueuom, e._file, e._row {inside} and {known}"
    )
    con.execute(f"drop table {table}")
    return {
        "measurements: read (items of the 17 variables)": n,
        "measurements: - set aside (no readable time)": n - timed,
        "measurements: - outside of every window": timed - here,
        "measurements: - stored after the prediction time": here - in_store,
    }


def _clean(con: "DuckDBPyConnection", quarantine: Quarantine, source: MimicSource) -> dict[str, int]:
    """Make ``readings`` of ``events``: a number in range or a category each."""
    answered = "lower(trim(value)) = lower(answer) or (value is null and try_cast(valuenum as double) = code)"
    con.execute(
        f"""create table readings as
        with parsed as (select *, {parsed_number()} as n from events),
        converted as (select *, {converted_number()} as converted from parsed)
        select part, c.stay_id, seconds, c.variable, coalesce(value, valuenum) as raw, category, c._file, c._row,
            case when low is not null then least(greatest(converted, low), high) end as number,
            number <> converted as moved,
            case when raw is null then 'empty'
                when low is null then case when category is null then 'unknown answer: ' || c.variable end
                when converted is null or not isfinite(converted) then 'not a number: ' || c.variable
                when converted < outer_low or converted > outer_high then 'out of range: ' || c.variable
            end as fault
        from converted c left join ranges r on r.variable = c.variable
        left join categories a on a.variable = c.variable and low is null and ({answered})"""
    )
    con.execute("drop table events")
    bad = sum(
        quarantine.add(
            name,
            f"select _file as file, _row as line, fault as reason, raw from readings "
            f"where part = {literal(name)} and fault <> 'empty'",
        )
        for name in (source.chartevents, source.labevents)
    )
    empty = count(con, "select count(*) from readings where fault = 'empty'")
    con.execute("delete from readings where fault is not null")
    return {
        "measurements: - without a value": empty,
        "measurements: - set aside (no number, unknown answer, out of range)": bad,
        "measurements: = kept": count(con, "select count(*) from readings"),
        "measurements: of them moved to the edge of the valid range": count(
            con, "select count(*) from readings where moved"
        ),
    }


_LAST = f"""select stay_id, {BIN} as bin, variable, number, category from readings
    qualify row_number() over (partition by stay_id, bin, variable order by seconds desc, number desc, category desc) = 1"""


def _bin(con: "DuckDBPyConnection") -> None:
    con.execute(
        f"""create table series as
        select stay_id as row_id, bin::double as time,
            variable || coalesce('->' || category, '') as variable, coalesce(number, 1) as value
        from ({_LAST})
        union all
        select stay_id, {BIN}::double, {literal(REACH)}, null
        from (select stay_id, epoch(until)::bigint - epoch(intime)::bigint as seconds from stays)
        where stay_id in (select stay_id from readings)"""
    )
