"""What every source makes: the canonical sample table.

Table ``samples``: row_id, grp, label (a class, or a JSON list of numbers and nulls where there are several), text, image
(path relative to the raw folder), ``n:<column>`` doubles, ``c:<column>`` texts, _file, _row. Table ``series``: row_id, time,
variable, value; empty without series. Nulls are missing; on a grid, a point without a value says that the series reaches to
its time.

A source that knows times adds, as doubles in seconds since 1970 (source ``table``: or in the numbers' own unit): ``time``,
when the prediction is made or the label becomes known (``split.time`` cuts by it), and ``t:<modality>``, when the latest
part of that modality became known. No ``t:`` may exceed ``time``: `etl verify --deep` proves it.
"""

from dataclasses import dataclass, field

from lanistr.manifest import Target
from lanistr.transforms import SeriesGrid


@dataclass(frozen=True)
class SeriesLayout:
    """The channels of a series that lies on a grid.

    Attributes:
        channels: names, in order.
        groups: per variable its value channels, then its flag.
        grid: imputation.
    """

    channels: list[str]
    groups: list[list[int]]
    grid: SeriesGrid


@dataclass(frozen=True)
class Samples:
    """What a source reports.

    Attributes:
        numeric, categorical: columns of the tabular modality, in order.
        labels: class names in id order, or what the numbers of ``label`` stand for.
        target: of the manifest.
        counts: for people: rows read, joined, duplicates.
        group: name of the grouping, for the split rule.
        series: where the source fixes the channels; None = the recipe or the train split says which there are.
    """

    numeric: list[str]
    categorical: list[str]
    labels: list[str]
    group: str
    counts: dict[str, int] = field(default_factory=dict)
    series: SeriesLayout | None = None
    target: Target = "class"
