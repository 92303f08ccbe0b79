"""The clinical series of a stay computed by brute force, with none of the project's code: csv, gzip, loops.

Follows Harutyunyan et al. (2019): itemid -> variable, cleaning, hourly bins, the last value of a bin, one-hots,
imputation by the previous else the normal value, flags.
"""

import csv
import gzip
import json
import math
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

OTHER_FLUIDS = {51478, 51491, 51094, 50831}
ANSWERS = {
    "Glascow coma scale eye opening": ["None", "To Pain", "To Speech", "Spontaneously"],
    "Glascow coma scale motor response": [
        "No response",
        "Abnormal extension",
        "Abnormal Flexion",
        "Flex-withdraws",
        "Localizes Pain",
        "Obeys Commands",
    ],
    "Glascow coma scale verbal response": [
        "No Response",
        "Incomprehensible sounds",
        "Inappropriate Words",
        "Confused",
        "Oriented",
    ],
}


def rows(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def time(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S")


class Benchmark:
    """The benchmark's own files, as published."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "discretizer_config.json").read_text())
        if "id_to_channel" not in config:  # the two JSON files were published under each other's name
            config = json.loads((folder / "channel_info.json").read_text())
        self.names: list[str] = config["id_to_channel"]
        self.categories: dict[str, list[str]] = config["possible_values"]
        self.normal: dict[str, str] = config["normal_values"]
        self.variable_of = {}
        with open(folder / "itemid_to_variable_map.csv", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["LEVEL2"] in self.names and row["STATUS"] == "ready" and int(row["COUNT"]) > 0:
                    self.variable_of[row["LINKSTO"], int(row["ITEMID"])] = (row["LEVEL2"], row["MIMIC LABEL"])
        self.range = {}
        with open(folder / "variable_ranges.csv", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                limits = [row[k] for k in ("OUTLIER LOW", "VALID LOW", "VALID HIGH", "OUTLIER HIGH")]
                if all(limits):
                    self.range.setdefault(row["LEVEL2"].lower(), [float(limit) for limit in limits])

    def clean(self, variable: str, label: str, number: float, unit: str) -> float | str | None:
        """A category, a number in range, or None."""
        if self.categories[variable]:
            return ANSWERS[variable][int(number) - 1]
        if variable == "Fraction inspired oxygen" and number > 1 and "torr" not in unit.lower():
            number /= 100
        if variable == "Oxygen saturation" and number <= 1:
            number *= 100
        if variable == "Temperature" and number >= 79:
            number = (number - 32) * 5 / 9
        if variable == "Weight" and ("lb" in unit.lower() or "lb" in label.lower()):
            number *= 0.453592
        if variable == "Height" and "in" in unit.lower():
            number = round(number * 2.54)
        far_low, low, high, far_high = self.range[variable.lower()]
        if number < far_low or number > far_high:
            return None
        return min(max(number, low), high)


def stays_of_48_hours(raw: Path) -> list[dict[str, str]]:
    died = {row["hadm_id"]: row["hospital_expire_flag"] for row in rows(raw / "hosp/admissions.csv.gz")}
    stays = [
        {**row, "died": died[row["hadm_id"]]}
        for row in rows(raw / "icu/icustays.csv.gz")
        if time(row["outtime"]) - time(row["intime"]) >= timedelta(hours=48)
    ]
    return sorted(stays, key=lambda stay: stay["stay_id"])


def tensors(
    raw: Path, chartevents: str, benchmark: Benchmark, stays: list[dict[str, str]]
) -> dict[str, tuple[list[list[float]], list[list[int]]]]:
    """Values (48, 76) and measured flags (48, 76) by stay_id."""
    events: dict[str, list] = {stay["stay_id"]: [] for stay in stays}
    subjects = {stay["subject_id"] for stay in stays}
    for table, path in (("chartevents", raw / chartevents), ("labevents", raw / "hosp/labevents.csv.gz")):
        for row in rows(path):
            item = int(row["itemid"])
            found = benchmark.variable_of.get((table, item))
            if found is None or item in OTHER_FLUIDS or row["subject_id"] not in subjects or not row["charttime"]:
                continue
            at = time(row["charttime"])
            for stay in stays:
                start = time(stay["intime"])
                end = start + timedelta(hours=48)
                if stay["subject_id"] != row["subject_id"] or not start <= at <= end:
                    continue
                if row.get("storetime") and time(row["storetime"]) > end:
                    continue
                number = row["valuenum"] or row.get("value") or ""
                try:
                    cleaned = benchmark.clean(*found, float(number), row["valueuom"])
                except ValueError:
                    continue
                if cleaned is not None:
                    events[stay["stay_id"]].append(((at - start).total_seconds(), found[0], cleaned))
    return {stay_id: _tensor(measured, benchmark) for stay_id, measured in events.items()}


def _tensor(events: list, benchmark: Benchmark) -> tuple[list[list[float]], list[list[int]]]:
    by_bin: dict[tuple[int, str], float | str] = {}
    for seconds, variable, value in sorted(events):
        by_bin[max(0, math.ceil(seconds / 3600) - 1), variable] = value
    values, measured = [], []
    previous = dict(benchmark.normal)
    for hour in range(48):
        row, seen_row, flags = [], [], []
        for variable in benchmark.names:
            seen = (hour, variable) in by_bin
            if seen:
                previous[variable] = by_bin[hour, variable]
            categories = benchmark.categories[variable]
            one_hot = [float(previous[variable] == category) for category in categories]
            row += one_hot or [float(previous[variable])]
            seen_row += [int(seen)] * max(1, len(categories))
            flags.append(float(seen))
        values.append(row + flags)
        measured.append(seen_row + [0] * len(flags))
    return values, measured
