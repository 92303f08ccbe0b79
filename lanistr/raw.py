"""Raw values as people give them, checked and brought into the form that `lanistr.transforms` takes. Imports no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lanistr.transforms import Point, SeriesSpec, TabularSpec

MAX_IMAGE_BYTES = 256 << 20


def read_image_file(folder: Path, name: str | Path) -> bytes:
    """The bytes of an image file; none for an empty name.

    Raises:
        ValueError: no such file, larger than 256 MiB, or it cannot be read.
    """
    if not str(name):
        return b""
    path = folder / name
    try:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise ValueError(f"{path}: {path.stat().st_size:,} bytes; at most {MAX_IMAGE_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def read_row(record: Mapping[str, Any], spec: TabularSpec) -> dict[str, Any]:
    """The cells of a table's columns; None or NaN is a missing cell.

    Raises:
        ValueError: a cell that is no number in a numeric column, or neither text nor number in a categorical one.
    """
    row: dict[str, Any] = {c.name: _number(c.name, record.get(c.name)) for c in spec.numeric}
    for column in spec.categorical:
        value = record.get(column.name)
        if isinstance(value, float) and np.isnan(value):
            value = None
        if value is not None and not isinstance(value, str | bool | int | float | np.generic):
            raise ValueError(f"{column.name}: {type(value).__name__} is neither text nor number")
        row[column.name] = value
    return row


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | bool | int | float | np.generic):
        try:
            return float(value)
        except (ValueError, TypeError, OverflowError):
            pass
    raise ValueError(f"{name}: {str(value)[:40]!r} is not a number")


def read_points(value: Any, spec: SeriesSpec) -> list[Point]:
    """The points of a series.

    Args:
        value: points ``(time, variable, value)`` in any order, or ``{variable: values}``, one value per step (None = not
            measured).
        spec: of the modality.

    Raises:
        ValueError: another form, an unknown variable, series of several lengths, or something that is no number.
    """
    if isinstance(value, Mapping):
        lengths = {len(steps) if isinstance(steps, Sequence | np.ndarray) else -1 for steps in value.values()}
        if len(lengths) != 1 or -1 in lengths:
            raise ValueError(f"{{variable: values}} needs equally many values of each variable, got {sorted(lengths)}")
        points = [(step, variable, one) for variable, steps in value.items() for step, one in enumerate(steps)]
    elif isinstance(value, Sequence | np.ndarray) and not isinstance(value, str):
        points = [_point(point) for point in value]
    else:
        raise ValueError(f"{type(value).__name__}: give points (time, variable, value), or {{variable: values}}")
    unknown = sorted({str(variable) for _, variable, _ in points} - set(spec.variables))
    if unknown:
        raise ValueError(f"unknown variable {unknown[0]!r}; known are {', '.join(spec.variables[:20])}")
    return [(_time(time), variable, _number(variable, one)) for time, variable, one in points]


def _point(point: Any) -> tuple[Any, str, Any]:
    if isinstance(point, Mapping):
        point = [point.get(key) for key in ("time", "variable", "value")]
    if not isinstance(point, Sequence) or isinstance(point, str) or len(point) != 3 or not isinstance(point[1], str):
        raise ValueError(f"{str(point)[:40]!r}: a point is (time, variable, value)")
    return point[0], point[1], point[2]


def _time(value: Any) -> float:
    time = _number("time", value)
    if time is None or not np.isfinite(time):
        raise ValueError(f"time {value!r} is not a number")
    return time
