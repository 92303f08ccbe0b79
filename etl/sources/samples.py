"""What every source makes: the canonical sample table.

Table ``samples``: row_id, grp, label, text, image (path relative to the raw folder), ``n:<column>`` doubles, ``c:<column>``
texts, _file, _row. Table ``series``: row_id, time, variable, value; empty without series. Nulls are missing.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Samples:
    """What a source reports.

    Attributes:
        numeric, categorical: columns of the tabular modality, in order.
        labels: class names in id order.
        counts: for people: rows read, joined, duplicates.
        group: name of the grouping, for the split rule.
    """

    numeric: list[str]
    categorical: list[str]
    labels: list[str]
    group: str
    counts: dict[str, int] = field(default_factory=dict)
