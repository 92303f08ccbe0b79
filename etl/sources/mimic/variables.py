"""The 17 clinical variables: channels, itemids, and how the benchmark cleans a raw value.

The table itself, its source and licence are in ``variables.yaml``.
"""

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import yaml
from pydantic import TypeAdapter

from etl.quarantine import literal
from etl.sources.models import MimicSource
from etl.sources.samples import SeriesLayout
from lanistr.manifest import Strict
from lanistr.transforms import SeriesGrid

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

# Conversions in SQL of the number n (a double), as the benchmark's preprocessing.py does them, by variable.
CONVERSIONS = {
    "Fraction inspired oxygen": "case when n > 1 and coalesce(uom not ilike '%torr%', true) then n / 100 else n end",
    "Oxygen saturation": "case when n <= 1 then n * 100 else n end",
    "Temperature": "case when n >= 79 then (n - 32) * 5 / 9 else n end",  # by value: Celsius items hold Fahrenheit too
    "Height": "case when inches then round_even(n * 2.54, 0) else n end",
    "Weight": "case when pounds then n * 0.453592 else n end",
}
# Which part of a blood pressure written as "120/80" belongs to a variable.
PRESSURE_PART = {"Systolic blood pressure": 1, "Diastolic blood pressure": 2}


class Variable(Strict):
    """One clinical variable; see the head of ``variables.yaml``."""

    name: str
    normal: float | str
    range: tuple[float, float, float, float] | None = None
    categories: list[str] = []
    texts: dict[str, str] = {}
    codes: dict[int, str] = {}
    chartevents: list[int] = []
    labevents: list[int] = []
    inches: list[int] = []
    pounds: list[int] = []

    @property
    def channels(self) -> list[str]:
        """Names of the value channels."""
        return [f"{self.name}->{category}" for category in self.categories] or [self.name]

    @property
    def normal_channels(self) -> list[float]:
        """The normal value on the value channels."""
        return [float(self.normal == category) for category in self.categories] or [float(self.normal)]


@cache
def benchmark_variables() -> tuple[Variable, ...]:
    """The packaged table."""
    text = (files("etl.sources.mimic") / "variables.yaml").read_text(encoding="utf-8")
    return tuple(TypeAdapter(list[Variable]).validate_python(yaml.safe_load(text)))


def layout(source: MimicSource) -> SeriesLayout:
    """59 value channels, then 17 flags."""
    variables = benchmark_variables()
    values = [channel for variable in variables for channel in variable.channels]
    groups, first = [], 0
    for i, variable in enumerate(variables):
        after = first + len(variable.channels)
        groups.append([*range(first, after), len(values) + i])
        first = after
    normal = [value for variable in variables for value in variable.normal_channels]
    return SeriesLayout(
        channels=[*values, *(f"measured->{variable.name}" for variable in variables)],
        groups=groups,
        grid=SeriesGrid(impute=source.impute, normal=[*normal, *[0.0] * len(variables)]),
    )


def itemids(source: MimicSource, table: str) -> dict[int, Variable]:
    """Items of ``chartevents`` or ``labevents`` that are read, with the recipe's additions and omissions.

    Raises:
        ValueError: ``add_items`` names an unknown variable, ``drop_items`` an item that is not in use.
    """
    by_name = {variable.name: variable for variable in benchmark_variables()}
    unknown = [name for name in source.add_items.values() if name not in by_name]
    if unknown:
        raise ValueError(f"source.add_items: no variable {unknown[0]!r}; there are {', '.join(by_name)}")
    everywhere = {
        item for variable in by_name.values() for item in (*variable.chartevents, *variable.labevents)
    } | source.add_items.keys()
    idle = [item for item in source.drop_items if item not in everywhere]
    if idle:
        raise ValueError(f"source.drop_items: itemid {idle[0]} belongs to no variable; remove it from the list")
    found = {item: variable for variable in by_name.values() for item in getattr(variable, table)}
    found |= {
        item: by_name[name] for item, name in source.add_items.items() if (item >= 220_000) == (table == "chartevents")
    }
    return {item: variable for item, variable in sorted(found.items()) if item not in source.drop_items}


def make_tables(con: "DuckDBPyConnection", source: MimicSource) -> None:
    """Tables ``items`` (itemid -> variable, units), ``ranges`` and ``categories`` (text or code -> category)."""
    con.execute("create table items (itemid varchar, variable varchar, inches boolean, pounds boolean)")
    con.execute("create table ranges (variable varchar, outer_low double, low double, high double, outer_high double)")
    con.execute("create table categories (variable varchar, answer varchar, code integer, category varchar)")
    for table in ("chartevents", "labevents"):
        for item, variable in itemids(source, table).items():
            row = [str(item), variable.name, item in variable.inches, item in variable.pounds]
            con.execute("insert into items values (?, ?, ?, ?)", row)
    for variable in benchmark_variables():
        if variable.range:
            con.execute("insert into ranges values (?, ?, ?, ?, ?)", [variable.name, *variable.range])
        answers = {category: category for category in variable.categories} | variable.texts
        for answer, category in answers.items():
            con.execute("insert into categories values (?, ?, null, ?)", [variable.name, answer, category])
        for code, category in variable.codes.items():
            con.execute("insert into categories values (?, null, ?, ?)", [variable.name, code, category])


def parsed_number() -> str:
    """SQL: the number in ``valuenum``, else in ``value`` (a part of it for a blood pressure such as "120/80")."""
    parts = " ".join(
        f"when variable = {literal(name)} and value like '%/%' then try_cast(split_part(value, '/', {part}) as double)"
        for name, part in PRESSURE_PART.items()
    )
    return f"coalesce(try_cast(valuenum as double), case {parts} else try_cast(value as double) end)"


def converted_number() -> str:
    """SQL: ``n`` in the benchmark's unit."""
    branches = " ".join(f"when variable = {literal(name)} then {sql}" for name, sql in CONVERSIONS.items())
    return f"case {branches} else n end"
