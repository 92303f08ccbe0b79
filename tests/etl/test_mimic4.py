import csv
import gzip
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from etl import recipe as recipes
from etl.__main__ import main
from etl.build import build
from etl.ingest import connect, load
from etl.quarantine import Quarantine
from etl.raw import register
from etl.sources.mimic.variables import benchmark_variables, itemids, layout
from etl.sources.models import MimicSource
from etl.verify import verify
from lanistr.manifest import Manifest, sample_key
from lanistr.transforms import load_tokenizer, read_npy
from tests.etl import mimic_oracle

DATA = Path(os.environ.get("LANISTR_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
DEMO = DATA / "mimic_iv_demo_2.2"
BENCHMARK = DATA / "mimic3_benchmark_resources"
needs_demo = pytest.mark.skipif(not DEMO.is_dir(), reason=f"no MIMIC-IV demo at {DEMO}")
needs_benchmark = pytest.mark.skipif(not BENCHMARK.is_dir(), reason=f"no benchmark files at {BENCHMARK}")

# Patient 10000001: an ICU stay of 72 h (S1), which began on 3 January at 12:00, so that the prediction time is
# 5 January at 12:00; and one of 10 h (S2) a month later. Patient 10000002: X-rays and reports, never in the ICU.
TABLES = {
    "icu/icustays.csv.gz": [
        "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
        "10000001,201,301,MICU,MICU,2150-01-03 12:00:00,2150-01-06 12:00:00,3.0",
        "10000001,202,302,SICU,SICU,2150-02-03 12:00:00,2150-02-03 22:00:00,0.4",
    ],
    "hosp/admissions.csv.gz": [
        "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,insurance,language,marital_status,race,"
        "edregtime,edouttime,hospital_expire_flag",
        "10000001,201,2150-01-03 08:00:00,2150-01-09 08:00:00,2150-01-09 07:00:00,URGENT,Other,ENGLISH,,WHITE,"
        "2150-01-03 02:00:00,2150-01-03 08:00:00,1",
        "10000001,202,2150-02-03 08:00:00,2150-02-09 08:00:00,,URGENT,Other,ENGLISH,,WHITE,,,0",
    ],
    "hosp/patients.csv.gz": [
        "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
        "10000001,F,70,2148,2011 - 2013,2150-01-09",
        "10000002,M,30,2150,2011 - 2013,",
    ],
    "icu/chartevents.csv.gz": [
        "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,warning"
    ],
    "hosp/labevents.csv.gz": [
        "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,charttime,storetime,value,valuenum,valueuom,"
        "ref_range_lower,ref_range_upper,flag,priority,comments"
    ],
    "note/radiology.csv.gz": ["note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text"],
    "note/discharge.csv.gz": [
        "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text",
        "10000001-DS-1,10000001,201,DS,1,2150-01-09 00:00:00,2150-01-10 09:00:00,patient expired",
    ],
    "mimic-cxr-jpg/mimic-cxr-2.0.0-metadata.csv.gz": [
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime"
    ],
}
RECIPE = {
    "name": "toy",
    "source": {"kind": "mimic4", "demographics": True},
    "split": {"train": 1.0, "val": 0.0, "test": 0.0},
    "text": {"tokenizer": {"train": 300}, "max_tokens": 64},
    "image": {"size": 32},
    "tabular": {},
    "timeseries": {"max_steps": 48},
}


def chart(time: str, item: int, value: str, number: str = "", unit: str = "", stored: str = "") -> str:
    return f"10000001,201,301,1,2150-{time}:00,{f'2150-{stored}:00' if stored else ''},{item},{value},{number},{unit},0"


def lab(time: str, item: int, value: str, number: str, stored: str) -> str:
    return f"1,10000001,201,1,{item},,2150-{time}:00,2150-{stored}:00,{value},{number},,,,,,"


def note(name: str, subject: int, time: str, text: str, stored: str = "") -> str:
    return f'{name},{subject},,RR,1,2150-{time}:00,{f"2150-{stored}:00" if stored else ""},"{text}"'


def xray(name: str, subject: int, date: str, clock: str, view: str = "AP") -> str:
    return f"{name},{subject},5{name},CHEST,{view},100,100,2150{date},{clock}"


def raw_folder(root: Path, **rows: list[str]) -> Path:
    """The tables above with more rows: chartevents, labevents, radiology, discharge, metadata; and the JPEGs."""
    for name, lines in TABLES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        more = next((rows[key] for key in rows if key in Path(name).name), [])
        (root / name).write_bytes(gzip.compress("\n".join([*lines, *more]).encode() + b"\n"))
    for shade, row in enumerate(rows.get("metadata", [])):
        dicom, subject, study = row.split(",")[:3]
        path = root / f"mimic-cxr-jpg/files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 40), 20 * shade + 10).save(path)
    return root


def recipe_of(**source: object) -> recipes.Recipe:
    tree = {**RECIPE, "source": {**RECIPE["source"], **source}}  # pyright: ignore[reportGeneralTypeIssues]
    for block, gone in (("text", source.get("radiology", "") is None), ("image", "image_metadata" in source)):
        if gone:
            tree.pop(block)
    if tree["source"]["demographics"] is False:
        tree.pop("tabular")
    return recipes.Recipe.model_validate(tree)


def samples_of(gold: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(gold.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".", 1)
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[suffix] = file.read()
    return found


class Built:
    """A gold dataset by the identifiers that it hides."""

    def __init__(self, raw: Path, lake: Path, recipe: recipes.Recipe):
        self.gold = build(recipe, raw, lake)
        self.lake = lake
        self.manifest = Manifest.load(self.gold)
        self.samples = samples_of(self.gold)

    def sample(self, row_id: str, subject: str = "10000001") -> dict[str, bytes]:
        return self.samples[sample_key(self.manifest.name, subject, row_id)]

    def text(self, row_id: str, subject: str = "10000001") -> str:
        ids = read_npy(self.sample(row_id, subject)["tok.npy"]).tolist()
        tokenizer = load_tokenizer(next(self.gold.glob("tokenizer-*.json")))
        return " ".join(str(tokenizer.id_to_token(i)) for i in ids[1:-1]).replace(" ##", "")

    def shade(self, row_id: str, subject: str = "10000001") -> int:
        """Position of the image among the rows given to `raw_folder`."""
        (self.lake / "one.jpg").write_bytes(self.sample(row_id, subject)["jpg"])
        return round((np.asarray(Image.open(self.lake / "one.jpg")).mean() - 10) / 20)

    def series(self, row_id: str) -> tuple[np.ndarray, np.ndarray]:
        sample = self.sample(row_id)
        return read_npy(sample["ts.npy"]), read_npy(sample["tsmask.npy"])

    def channel(self, name: str) -> int:
        return self.manifest.modalities["timeseries"].spec["variables"].index(name)


def built(tmp_path: Path, recipe: recipes.Recipe, **rows: list[str]) -> Built:
    return Built(raw_folder(tmp_path / "raw", **rows), tmp_path / "lake", recipe)


PULSE = chart("01-03 13:00", 220045, "90", "90", "bpm")


def test_a_filtered_read_stores_only_the_rows_asked_for_and_keeps_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("itemid,value\n1,a\n2,b\n1,c\n3,d\n")
    con = connect(tmp_path)
    n = load(
        con, Quarantine(con), register(tmp_path, "events.csv"), "t", ["itemid", "value"], where="itemid in ('1', '3')"
    )
    assert n == 3
    assert con.execute("select value, _row from t order by _row").fetchall() == [("a", 1), ("c", 3), ("d", 4)]


# The real demo tables


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(DEMO, tmp_path_factory.mktemp("demo"), recipes.load("mimic4_demo"))


@needs_demo
def test_the_demo_has_140_stays_of_which_74_last_48_hours_and_12_end_in_death(demo: Built) -> None:
    counts = demo.manifest.counts
    assert counts["ICU stays: read"] == 140
    assert counts["ICU stays: - shorter than 48 h"] == 66
    assert counts["ICU stays: = kept"] == 74 == len(demo.samples)
    assert counts["ICU stays: of them died in hospital"] == 12
    labels = Counter(json.loads(members["json"])["label"] for members in demo.samples.values())
    assert demo.manifest.labels == ["survived", "died"]
    assert labels == {0: 62, 1: 12}


def account(made: Built) -> int:
    """Measurements read, after a check that each was kept or lost for a reason."""
    counts = made.manifest.counts
    lost = [n for reason, n in counts.items() if reason.startswith("measurements: - ")]
    read = counts["measurements: read (items of the 17 variables)"]
    assert read == sum(lost) + counts["measurements: = kept"]
    return read


@needs_demo
def test_every_measurement_of_the_demo_is_accounted_for(demo: Built) -> None:
    read = account(demo)
    wanted = {table: set(itemids(recipes.load("mimic4_demo").source, table)) for table in ("chartevents", "labevents")}  # pyright: ignore[reportArgumentType]
    paths = {"chartevents": "meds_derived/chartevents_from_meds.csv.gz", "labevents": "hosp/labevents.csv.gz"}
    assert read == sum(
        int(row["itemid"]) in wanted[table] for table, path in paths.items() for row in mimic_oracle.rows(DEMO / path)
    )


@needs_demo
@needs_benchmark
def test_ten_real_stays_equal_a_brute_force_computation(demo: Built) -> None:
    benchmark = mimic_oracle.Benchmark(BENCHMARK)
    stays = mimic_oracle.stays_of_48_hours(DEMO)[::7][:10]
    assert len(stays) == 10
    expected = mimic_oracle.tensors(DEMO, "meds_derived/chartevents_from_meds.csv.gz", benchmark, stays)
    for stay in stays:
        sample = demo.sample(stay["stay_id"], stay["subject_id"])
        values, measured = expected[stay["stay_id"]]
        np.testing.assert_allclose(read_npy(sample["ts.npy"]), np.float32(values), rtol=1e-6)
        np.testing.assert_array_equal(read_npy(sample["tsmask.npy"]), measured)
        assert json.loads(sample["json"])["label"] == int(stay["died"])
        assert np.array(measured).sum() > 300


@needs_demo
def test_series_are_finite_whole_and_measured_on_the_hours(demo: Built) -> None:
    groups = demo.manifest.modalities["timeseries"].spec["groups"]
    for members in demo.samples.values():
        values, measured = read_npy(members["ts.npy"]), read_npy(members["tsmask.npy"])
        assert values.shape == measured.shape == (48, 76)
        assert np.isfinite(values).all()
        for *cells, flag in groups:
            assert (measured[:, cells] == values[:, [flag]]).all()
            if len(cells) > 1:
                assert (values[:, cells].sum(axis=1) == 1).all()


@needs_demo
def test_no_patient_lies_in_two_splits_and_no_key_or_log_names_one(
    demo: Built, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    subjects = {row["subject_id"] for row in mimic_oracle.rows(DEMO / "icu/icustays.csv.gz")}
    stays = {row["stay_id"] for row in mimic_oracle.rows(DEMO / "icu/icustays.csv.gz")}
    groups: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        for index in (demo.gold / split).glob("*.parquet"):
            groups.setdefault(split, set()).update(pq.read_table(index)["group_hash"].to_pylist())
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) > 50
    assert main(["build", "mimic4_demo", "--raw", str(DEMO), "--lake", str(tmp_path), "--workers", "1"]) == 0
    spoken = "".join(capfd.readouterr()) + (demo.gold / "manifest.json").read_text()
    assert not [name for name in subjects | stays if name in spoken or any(name in key for key in demo.samples)]


@needs_demo
def test_stays_found_by_time_equal_stays_found_by_their_id(demo: Built, tmp_path: Path) -> None:
    """The demo's chart events with stay_id, value and storetime put back, read without any switch."""
    stays = [
        (row["subject_id"], row["intime"], row["outtime"], row["stay_id"])
        for row in mimic_oracle.rows(DEMO / "icu/icustays.csv.gz")
    ]
    for name in ("icu/icustays", "hosp/admissions", "hosp/patients", "hosp/labevents"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.csv.gz").symlink_to((DEMO / f"{name}.csv.gz").resolve())
    by_subject: dict[str, list] = {}
    for subject, start, end, stay in stays:
        by_subject.setdefault(subject, []).append((start, end, stay))
    with gzip.open(tmp_path / "icu/chartevents.csv.gz", "wt", newline="", compresslevel=1) as file:
        writer = csv.writer(file)
        writer.writerow(
            ["subject_id", "hadm_id", "stay_id", "charttime", "storetime", "itemid", "value", "valuenum", "valueuom"]
        )
        for row in mimic_oracle.rows(DEMO / "meds_derived/chartevents_from_meds.csv.gz"):
            if not row["valuenum"]:
                continue
            at = row["charttime"]
            stay = next((s for a, b, s in by_subject.get(row["subject_id"], []) if a <= at <= b), "")
            writer.writerow(
                [row["subject_id"], "", stay, at, at, row["itemid"], row["valuenum"], row["valuenum"], row["valueuom"]]
            )
    overrides = ["source.chartevents=icu/chartevents.csv.gz", "source.chartevents_lacks=[value]"]
    again = Built(tmp_path, tmp_path / "lake", recipes.load("mimic4_demo", overrides))
    assert again.samples.keys() == demo.samples.keys()
    assert all(again.samples[key]["ts.npy"] == members["ts.npy"] for key, members in demo.samples.items())


@needs_benchmark
def test_the_packaged_table_is_the_benchmarks() -> None:
    benchmark = mimic_oracle.Benchmark(BENCHMARK)
    variables = benchmark_variables()
    assert [v.name for v in variables] == benchmark.names
    for v in variables:
        assert v.categories == benchmark.categories[v.name]
        assert v.normal == (benchmark.normal[v.name] if v.categories else float(benchmark.normal[v.name]))
        assert v.categories or list(v.range or ()) == benchmark.range[v.name.lower()]
        for table, low in (("chartevents", 220_000), ("labevents", 0)):
            theirs = {
                i for (t, i), (name, _) in benchmark.variable_of.items() if t == table and name == v.name and i >= low
            }
            assert set(getattr(v, table)) == theirs
        answers = mimic_oracle.ANSWERS.get(v.name)
        assert not answers or v.codes == dict(enumerate(answers, start=1))


def test_there_are_59_value_channels_and_17_flags_in_17_groups() -> None:
    source = recipe_of().source
    assert isinstance(source, MimicSource)
    made = layout(source)
    assert len(made.channels) == len(set(made.channels)) == len(made.grid.normal) == 76
    assert [group[-1] for group in made.groups] == list(range(59, 76))
    assert sorted(channel for group in made.groups for channel in group) == list(range(76))


# Schema-shaped tables: time


def test_a_note_counts_only_if_written_and_stored_between_arrival_and_prediction_time(tmp_path: Path) -> None:
    made = built(
        tmp_path,
        recipe_of(),
        chartevents=[PULSE],
        radiology=[
            note("a", 10000001, "01-03 05:00", "emergency film", "01-03 06:00"),  # in the emergency room
            note("b", 10000001, "01-05 12:00", "at the last second"),
            note("c", 10000001, "01-05 12:01", "after the cutoff"),
            note("d", 10000001, "01-05 11:00", "stored too late", "01-05 12:30"),
            note("e", 10000001, "01-02 05:00", "years before"),
            note("f", 10000002, "01-04 05:00", "somebody else"),
        ],
    )
    assert made.text("301") == "at the last second emergency film"
    assert made.manifest.counts["stays with a note"] == 1
    assert "jpg" not in made.sample("301")


def test_the_last_xray_of_the_window_is_chosen_and_none_after_it(tmp_path: Path) -> None:
    films = [
        xray("d0", 10000001, "0103", "80556.875"),  # 08:05:56, before the ICU
        xray("d1", 10000001, "0104", "93000"),  # 09:30:00
        xray("d2", 10000001, "0105", "115959.5"),
        xray("d3", 10000001, "0105", "120001"),  # one second late
        xray("d4", 10000001, "0105", "115959.5", "LATERAL"),
        xray("d5", 10000002, "0105", "100000"),
    ]
    recipe = recipe_of(views=["AP", "PA"])
    made = built(tmp_path, recipe, chartevents=[PULSE], metadata=films)
    assert made.shade("301") == 2
    assert made.manifest.counts["images: - view is not AP or PA"] == 1
    assert "tok.npy" not in made.sample("301")
    early = Built(raw_folder(tmp_path / "b", chartevents=[PULSE], metadata=films[:2]), tmp_path / "early", recipe)
    assert early.shade("301") == 1


def test_a_measurement_charted_or_stored_after_the_prediction_time_is_not_used(tmp_path: Path) -> None:
    made = built(
        tmp_path,
        recipe_of(),
        chartevents=[
            chart("01-03 12:00", 220045, "80", "80"),  # the first second of the first hour
            chart("01-03 13:00", 220045, "81", "81"),  # the last second of the first hour
            chart("01-05 12:00", 220045, "82", "82"),  # the last second of the last hour
            chart("01-05 12:01", 220045, "83", "83"),
            chart("01-04 12:00", 220045, "84", "84", stored="01-05 12:01"),
        ],
        labevents=[
            lab("01-05 11:30", 50931, "150", "150", "01-05 11:59"),
            lab("01-05 11:40", 50931, "170", "170", "01-05 12:10"),
        ],
    )
    values, measured = made.series("301")
    pulse, glucose = made.channel("Heart Rate"), made.channel("Glucose")
    assert np.flatnonzero(measured[:, pulse]).tolist() == [0, 47]
    assert values[[0, 23, 46, 47], pulse].tolist() == [81, 81, 81, 82]
    assert np.flatnonzero(measured[:, glucose]).tolist() == [47]
    assert values[[0, 46, 47], glucose].tolist() == [128, 128, 150]
    assert made.manifest.counts["measurements: - stored after the prediction time"] == 2
    assert made.manifest.counts["measurements: - outside of every window"] == 1


def test_only_the_leaky_switch_brings_the_discharge_summary(tmp_path: Path) -> None:
    report = [note("a", 10000001, "01-04 05:00", "clear lungs")]
    made = built(tmp_path, recipe_of(), chartevents=[PULSE], radiology=report)
    assert made.text("301") == "clear lungs"
    assert "note/discharge.csv.gz" not in {parent["file"] for parent in made.manifest.parents}
    leaky = Built(tmp_path / "raw", tmp_path / "leaky", recipe_of(leaky_reference_notes=True))
    assert leaky.text("301") == "patient expired"
    assert "note/radiology.csv.gz" not in {parent["file"] for parent in leaky.manifest.parents}
    assert verify(made.gold, deep=True)
    with pytest.raises(ValueError, match="times: in 1 samples the text is later than the label"):
        verify(leaky.gold, deep=True)


def silver_times(made: Built) -> list[dict]:
    files = sorted((made.lake / "silver" / made.manifest.name).rglob("*.parquet"))
    tables = [pq.read_table(file) for file in files if "grp" in pq.read_schema(file).names]
    return [row for table in tables for row in table.to_pylist()]


def too_late(row: dict) -> list[str]:
    return [name for name, at in row.items() if name.startswith("t:") and at is not None and at > row["time"]]


@needs_demo
def test_silver_says_when_each_part_was_known_and_only_the_leaky_text_was_late(demo: Built, tmp_path: Path) -> None:
    rows = silver_times(demo)
    assert len(rows) == 74
    assert not [name for row in rows for name in too_late(row)]
    assert all(row["time"] - row["t:timeseries"] < 24 * 3600 for row in rows)
    made = built(
        tmp_path,
        recipe_of(),
        chartevents=[PULSE],
        radiology=[note("a", 10000001, "01-04 05:00", "clear lungs", "01-04 06:00")],
        metadata=[xray("d", 10000001, "0105", "115959.5")],
    )
    (row,) = silver_times(made)
    assert (row["time"] - row["t:text"], row["time"] - row["t:image"]) == (30 * 3600, 1)
    assert row["time"] - row["t:timeseries"] == 47 * 3600
    (row,) = silver_times(Built(tmp_path / "raw", tmp_path / "leaky", recipe_of(leaky_reference_notes=True)))
    assert too_late(row) == ["t:text"]


def test_a_stay_that_ends_before_its_prediction_time_is_no_cohort(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path / "raw", chartevents=[PULSE])
    died_early = [
        line.replace("2150-01-09 07:00:00", "2150-01-05 07:00:00") for line in TABLES["hosp/admissions.csv.gz"]
    ]
    (raw / "hosp/admissions.csv.gz").write_bytes(gzip.compress("\n".join(died_early).encode()))
    with pytest.raises(ValueError, match="died before the prediction time"):
        build(recipe_of(), raw, tmp_path / "lake")


# Schema-shaped tables: values


def test_values_are_cleaned_as_the_benchmark_does(tmp_path: Path) -> None:
    at = "01-03 12:30"
    made = built(
        tmp_path,
        recipe_of(add_items={223951: "Capillary refill rate"}),
        chartevents=[
            chart(at, 223761, "99.5", "99.5"),  # Fahrenheit
            chart(at, 226707, "75", "75", "Inch"),
            chart(at, 226531, "200", "200"),  # pounds
            chart(at, 223835, "40", "40"),  # per cent
            chart(at, 220277, "0.97", "0.97"),  # a fraction
            chart(at, 220179, "120/80"),
            chart(at, 220180, "120/80"),
            chart(at, 220739, "To Speech", "3"),
            chart(at, 223901, "", "6"),  # a number without its text
            chart(at, 223900, "No Response-ETT", "1"),
            chart(at, 223951, "Normal <3 Seconds"),
            chart(at, 220052, "5", "5"),  # a mean pressure below the valid range
        ],
    )
    values, measured = made.series("301")
    expected = {
        "Temperature": 37.5,
        "Height": 190,
        "Weight": 90.7184,
        "Fraction inspired oxygen": 0.4,
        "Oxygen saturation": 97,
        "Systolic blood pressure": 120,
        "Diastolic blood pressure": 80,
        "Glascow coma scale eye opening->To Speech": 1,
        "Glascow coma scale eye opening->3 To speech": 0,
        "Glascow coma scale motor response->Obeys Commands": 1,
        "Glascow coma scale verbal response->No Response-ETT": 1,
        "Glascow coma scale verbal response->No Response": 0,
        "Capillary refill rate->0.0": 1,
        "Mean blood pressure": 14,
    }
    for name, value in expected.items():
        assert values[0, made.channel(name)] == pytest.approx(value), name
        assert measured[0, made.channel(name)] == 1, name
    assert values[0, made.channel("Glascow coma scale total->15")] == 1  # normal, never measured
    assert measured[:, made.channel("Glascow coma scale total->15")].sum() == 0
    assert made.manifest.counts["measurements: of them moved to the edge of the valid range"] == 1
    assert made.manifest.quarantine == {}


def test_an_impossible_value_is_set_aside_with_its_line(tmp_path: Path) -> None:
    made = built(
        tmp_path,
        recipe_of(),
        chartevents=[
            PULSE,
            chart("01-03 12:10", 220045, "900", "900"),
            chart("01-03 12:20", 220045, "ERROR"),
            chart("01-03 12:20", 220739, "asleep"),
            chart("01-03 12:20", 220045, ""),
            "10000001,201,301,1,not a time,,220045,80,80,bpm,0",
        ],
    )
    assert made.manifest.quarantine == {
        "out of range: Heart Rate": 1,
        "not a number: Heart Rate": 1,
        "unknown answer: Glascow coma scale eye opening": 1,
        "not a time: charttime": 1,
    }
    assert made.manifest.counts["measurements: - without a value"] == 1
    assert account(made) == 6
    table = pq.read_table(made.lake / "quarantine/toy/icu__chartevents.csv.gz.parquet").to_pylist()
    assert {(row["line"], row["raw"]) for row in table} == {(2, "900"), (3, "ERROR"), (4, "asleep"), (6, "not a time")}


def test_the_latest_value_of_an_hour_counts_and_of_two_at_once_the_greater(tmp_path: Path) -> None:
    made = built(
        tmp_path,
        recipe_of(impute="none"),
        chartevents=[
            chart("01-03 12:50", 220045, "99", "99"),
            chart("01-03 12:10", 220045, "120", "120"),
            chart("01-03 13:30", 220179, "100", "100"),
            chart("01-03 13:30", 220050, "110", "110"),
        ],
    )
    values, _ = made.series("301")
    assert values[0, made.channel("Heart Rate")] == 99
    assert values[1, made.channel("Systolic blood pressure")] == 110
    assert np.isnan(values[1:, made.channel("Heart Rate")]).all()


def test_a_stay_without_a_single_measurement_has_no_series(tmp_path: Path) -> None:
    made = built(tmp_path, recipe_of(), chartevents=[chart("02-20 12:50", 220045, "99", "99")])
    assert set(made.sample("301")) == {"json", "tab.npy"}


def test_demographics_are_as_of_the_stay(tmp_path: Path) -> None:
    made = built(tmp_path, recipe_of(), chartevents=[PULSE])
    spec = made.manifest.modalities["tabular"].spec
    row = dict(
        zip(
            [c["name"] for c in [*spec["numeric"], *spec["categorical"]]],
            read_npy(made.sample("301")["tab.npy"]),
            strict=True,
        )
    )
    assert row["age"] == 72
    assert np.isnan(row["marital_status"])
    assert spec["categorical"][0] == {"name": "gender", "values": ["F"], "buckets": 0}
    without = Built(tmp_path / "raw", tmp_path / "off", recipe_of(demographics=False))
    assert "tab.npy" not in without.sample("301")
    assert "hosp/patients.csv.gz" not in {parent["file"] for parent in without.manifest.parents}


# The pool


def test_the_pool_holds_every_stay_note_and_image_exactly_once(tmp_path: Path) -> None:
    films = [
        xray("d0", 10000001, "0104", "100000"),
        xray("d1", 10000001, "0105", "100000"),  # the last one in the window of 301
        xray("d2", 10000001, "0203", "230000"),  # after 302 ended
        xray("d3", 10000002, "0601", "100000"),
        xray("d4", 10000002, "0601", "100000", "LATERAL"),
    ]
    notes = [
        note("n0", 10000001, "01-04 11:00", "first report"),
        note("n1", 10000001, "01-05 09:00", "second report"),  # the last one in the window of 301
        note("n2", 10000002, "06-01 12:00", "frontal report"),
        note("n3", 10000002, "06-09 12:00", "lonely report"),
    ]
    made = built(tmp_path, recipe_of(samples="pool"), chartevents=[PULSE], metadata=films, radiology=notes)
    parts = {key: set(members) - {"json", "tab.npy", "tsmask.npy"} for key, members in made.samples.items()}
    assert Counter(part for members in parts.values() for part in members) == {"jpg": 5, "tok.npy": 4, "ts.npy": 1}
    assert len(parts) == 7
    assert made.text("301") == "second report"
    assert made.shade("301") == 1
    assert made.series("301")[0].shape == (48, 76)
    assert made.text("image:d0") == "first report"
    assert made.shade("image:d0") == 0
    assert made.text("image:d3", "10000002") == "frontal report"
    assert set(made.sample("302")) == {"json", "tab.npy"}
    for name, subject in (("image:d2", "10000001"), ("image:d4", "10000002")):
        assert "tok.npy" not in made.sample(name, subject)
    assert set(made.sample("note:n3", "10000002")) == {"json", "tok.npy", "tab.npy"}
    assert made.manifest.labels == []
    assert all(json.loads(members["json"])["label"] == -1 for members in made.samples.values())


def test_the_series_of_a_short_stay_is_as_long_as_the_stay(tmp_path: Path) -> None:
    event = "10000001,202,302,1,2150-02-03 14:30:00,,220045,77,77,bpm,0"
    made = built(tmp_path, recipe_of(samples="pool"), chartevents=[event])
    values, measured = made.series("302")
    assert values.shape == (10, 76)
    assert np.flatnonzero(measured[:, made.channel("Heart Rate")]).tolist() == [2]


@needs_demo
def test_a_patient_is_in_the_same_split_of_pool_and_cohort(demo: Built, tmp_path: Path) -> None:
    pool = Built(DEMO, tmp_path, recipes.load("mimic4_demo", ["name=pool", "source.samples=pool"]))
    assert pool.manifest.counts["ICU stays: = kept"] == 140 == len(pool.samples)
    split_of: dict[str, dict[str, str]] = {}
    stays = {row["stay_id"]: row["subject_id"] for row in mimic_oracle.rows(DEMO / "icu/icustays.csv.gz")}
    for made in (pool, demo):
        found = split_of.setdefault(made.manifest.name, {})
        for split in ("train", "val", "test"):
            for index in (made.gold / split).glob("*.parquet"):
                found.update(dict.fromkeys(pq.read_table(index)["key"].to_pylist(), split))
    for stay, subject in stays.items():
        key = sample_key("mimic4_demo", subject, stay)
        if key in split_of["mimic4_demo"]:
            assert split_of["mimic4_demo"][key] == split_of["pool"][sample_key("pool", subject, stay)]


# Recipes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("source.hours=72", "cuts the 72 hours"),
        ("source.radiology=null", "needs source.radiology"),
        ("source.image_metadata=null", "needs source.image_metadata"),
        ("tabular={}", "needs source.demographics: true"),
        ("timeseries.variables=[pH]", "its own 76 channels"),
        ("source.leaky_notes=true", "did you mean 'leaky_reference_notes'"),
    ],
)
def test_a_recipe_that_cannot_be_built_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.load("mimic4", [override])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"add_items": {223951: "Capilary refill"}}, "no variable 'Capilary refill'"),
        ({"drop_items": [1]}, "itemid 1 belongs to no variable"),
    ],
)
def test_an_unknown_item_is_refused(tmp_path: Path, source: dict, message: str) -> None:
    raw = raw_folder(tmp_path / "raw", chartevents=[PULSE])
    with pytest.raises(ValueError, match=message):
        build(recipe_of(**source), raw, tmp_path / "lake")


def test_a_column_that_is_lacking_must_be_named_in_the_recipe(tmp_path: Path) -> None:
    raw = raw_folder(tmp_path / "raw")
    lines = [
        "subject_id,charttime,storetime,itemid,value,valuenum,valueuom",
        "10000001,2150-01-03 13:00:00,,220045,90,90,bpm",
    ]
    (raw / "icu/chartevents.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(ValueError, match="no column 'stay_id'"):
        build(recipe_of(), raw, tmp_path / "lake")
    made = Built(raw, tmp_path / "lake", recipe_of(chartevents_lacks=["stay_id"]))
    assert made.series("301")[1].sum() == 1


def test_another_imputation_needs_a_new_fit(tmp_path: Path) -> None:
    made = built(tmp_path, recipe_of(), chartevents=[PULSE])
    with pytest.raises(ValueError, match=r"another grid.*--refit"):
        build(recipe_of(impute="normal"), tmp_path / "raw", made.lake)


@pytest.mark.parametrize("name", ["mimic4", "mimic4_pretrain"])
def test_the_recipes_for_the_real_data_run_on_its_layout(tmp_path: Path, name: str) -> None:
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    raw = raw_folder(
        tmp_path / "raw", chartevents=[PULSE], radiology=[note("a", 10000001, "01-04 05:00", "clear lungs")]
    )
    (raw / "vocab.txt").write_text("\n".join(vocabulary))
    recipe = recipes.load(name, ["text.tokenizer={path: vocab.txt}", "split={train: 1.0, val: 0.0, test: 0.0}"])
    made = Built(raw, tmp_path / "lake", recipe)
    assert {"ts.npy", "tsmask.npy", "tok.npy"} <= set(made.sample("301"))
    assert yaml.safe_load((Path(recipes.__file__).parent / "recipes" / f"{name}.yaml").read_text())["name"] == name
