"""Who is studied: ICU stays, their window of time, their outcome, and what is known of the patient at admission."""

from typing import TYPE_CHECKING

from etl.ingest import load
from etl.quarantine import Quarantine
from etl.raw import RawTable
from etl.sources.mimic.tables import count, parse_times, set_aside
from etl.sources.models import MimicSource

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

ADMISSION_FACTS = ["admission_type", "insurance", "language", "marital_status", "race"]
NUMERIC = ["age"]
CATEGORICAL = ["gender", "first_careunit", *ADMISSION_FACTS]
LABELS = ["survived", "died"]


def read(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], source: MimicSource
) -> dict[str, int]:
    """Make ``stays``; returns the flow of counts.

    ``stays``: stay_id, subject_id, intime, admitted (arrival in the hospital), cutoff (``hours`` after intime: the
    prediction time), until (end of the window: cutoff, or the end of a shorter stay), outcome, demographics.
    """
    n = _load_stays(con, quarantine, files, source)
    _load_admissions(con, quarantine, files, source)
    name = source.icustays
    orphan = "hadm_id is null or hadm_id not in (select hadm_id from admissions)"
    without = set_aside(con, quarantine, name, "icustays", "no such admission", orphan, "hadm_id")
    _join(con, source)
    flow = {"ICU stays: read": n, "ICU stays: - no admission": without}
    if source.samples == "cohort":
        flow |= _exclude(con, source)
    flow["ICU stays: = kept"] = count(con, "select count(*) from stays")
    if source.samples == "cohort":
        flow["ICU stays: of them died in hospital"] = count(con, "select count(*) from stays where outcome = 'died'")
    return flow


def _load_stays(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], source: MimicSource
) -> int:
    name = source.icustays
    columns = ["subject_id", "hadm_id", "stay_id", "first_careunit", "intime", "outtime"]
    n = load(con, quarantine, files[name], "icustays", columns)
    parse_times(con, quarantine, name, "icustays", ["intime", "outtime"])
    for key in ("subject_id", "stay_id", "intime"):
        set_aside(con, quarantine, name, "icustays", f"no {key}", f"{key} is null", "stay_id")
    later = "(select _row from icustays qualify row_number() over (partition by stay_id order by _row) > 1)"
    set_aside(con, quarantine, name, "icustays", "duplicate stay_id", f"_row in {later}", "stay_id")
    return n


def _load_admissions(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], source: MimicSource
) -> None:
    name = source.admissions
    columns = ["hadm_id", "admittime", "edregtime", "deathtime", "hospital_expire_flag"]
    load(con, quarantine, files[name], "admissions", [*columns, *(ADMISSION_FACTS if source.demographics else [])])
    parse_times(con, quarantine, name, "admissions", ["admittime", "edregtime", "deathtime"])
    odd = "coalesce(hospital_expire_flag, '') not in ('0', '1')"
    set_aside(con, quarantine, name, "admissions", "hospital_expire_flag is not 0 or 1", odd, "hospital_expire_flag")
    later = "(select _row from admissions qualify row_number() over (partition by hadm_id order by _row) > 1)"
    set_aside(con, quarantine, name, "admissions", "duplicate hadm_id", f"_row in {later}", "hadm_id")
    if source.demographics:
        columns = ["subject_id", "gender", "anchor_age", "anchor_year"]
        load(con, quarantine, files[source.patients], "patients", columns)
        later = "(select _row from patients qualify row_number() over (partition by subject_id order by _row) > 1)"
        set_aside(con, quarantine, source.patients, "patients", "duplicate subject_id", f"_row in {later}", "null")


def _join(con: "DuckDBPyConnection", source: MimicSource) -> None:
    facts = ", ".join(["first_careunit", *ADMISSION_FACTS]) if source.demographics else "first_careunit"
    cutoff = f"intime + interval {source.hours} hours"
    con.execute(
        f"""create table stays as select
            stay_id, subject_id, intime, outtime, deathtime, {cutoff} as cutoff,
            least({cutoff}, outtime) as until,
            least(intime, admittime, edregtime) as admitted,
            case hospital_expire_flag when '1' then 'died' else 'survived' end as outcome,
            {facts}, i._file, i._row
        from icustays i join admissions using (hadm_id)"""
    )


def _exclude(con: "DuckDBPyConnection", source: MimicSource) -> dict[str, int]:
    reasons = {
        "ICU stays: - no end": "outtime is null",
        f"ICU stays: - shorter than {source.hours} h": "outtime < cutoff",
        "ICU stays: - died before the prediction time": "deathtime <= cutoff",
    }
    flow = {}
    for reason, condition in reasons.items():
        flow[reason] = count(con, f"select count(*) from stays where {condition}")
        con.execute(f"delete from stays where {condition}")
    return flow
