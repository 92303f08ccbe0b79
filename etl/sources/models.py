"""The ``source`` block of a recipe, by kind: what each source can be told. `etl.recipe` is the tree around it."""

import string
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lanistr.manifest import Strict, Target

Key = str | Annotated[list[str], Field(min_length=1)]


class TextTable(Strict):
    """Text columns, joined by a space.

    Attributes:
        table: raw table with the texts; the main table itself where absent.
        id: column or columns that name the sample; the main table's ``id`` where absent.
    """

    columns: list[str] = Field(min_length=1)
    table: str | None = None
    id: Key | None = None


class SideTable(Strict):
    """A table with facts about what several samples share (a product, a place); its columns join the main table's.

    Attributes:
        on: column of the main table.
        id: column of this table that holds the same values, once each; ``on`` where absent.
    """

    table: str
    on: str
    id: str | None = None
    columns: list[str] = Field(min_length=1)


class SeriesTable(Strict):
    """A long table (one row per sample, time and variable) or a wide one (one row per sample and time).

    Attributes:
        time: column of numbers or timestamps (without a zone: UTC).
        variable, value: columns of a long table.
        values: columns of a wide table, one per variable.
        absolute: the numbers in ``time`` have the unit and origin of ``source.time``, so that the two can be compared.
            Timestamps always can; numbers may as well be steps or hours since an admission.
    """

    table: str
    id: Key
    time: str
    variable: str | None = None
    value: str | None = None
    values: list[str] | None = Field(default=None, min_length=1)
    absolute: bool = False

    @model_validator(mode="after")
    def _long_or_wide(self) -> "SeriesTable":
        long = self.variable is not None and self.value is not None
        if long == (self.values is not None) or (self.variable is None) != (self.value is None):
            raise ValueError("give variable and value (a long table), or values (a wide one)")
        return self


class TableSource(Strict):
    """Any user's own tables: main tables with one row per sample, and optional side tables, images and series.

    A table is a file, a glob (``part-*.parquet``) or an fsspec URL: ``.parquet``, ``.csv``, ``.tsv`` or ``.jsonl``,
    each plain, ``.gz`` or ``.zst``, relative to the raw folder.

    Attributes:
        main: one table, or several whose columns differ (a column that one of them lacks is missing there).
        id: column or columns that identify a row; of several, those that are there are joined by ``|``.
        group: column whose values never straddle splits (a patient, a customer); ``id`` where absent.
        group_chars: only so many first characters of the group tell groups apart.
        label: column with the class; a null is an unlabelled sample. See ``target`` for more than one column.
        target: ``class``; ``multilabel`` = columns of 0 and 1 (true and false), or one with names between
            ``label_separator``; ``regression`` = columns of numbers. A null cell is unknown, and with all of them null the
            sample is unlabelled.
        label_separator: between the names in one multi-label column, for example ``;``.
        time: column of numbers or timestamps (without a zone: UTC): when the prediction is made, or the label of the row
            became known. ``split.time`` cuts by it, and no point of the series may be later (`etl verify --deep`).
        keep: column -> values: other rows of ``main`` are left out, and counted; null stands for a missing value.
        join: side tables.
        image: template of an image's path, for example ``photos/{product_id}.jpg`` or ``{path}``; its fields are columns.
        series: long or wide tables; their variables are put together.
    """

    kind: Literal["table"]
    main: Key
    id: Key
    group: str | None = None
    group_chars: int | None = Field(default=None, ge=1)
    label: Key | None = None
    target: Target = "class"
    label_separator: str | None = Field(default=None, min_length=1)
    time: str | None = None
    keep: dict[str, list[str | None]] = {}
    join: list[SideTable] = []
    text: TextTable | None = None
    image: str | None = None
    series: SeriesTable | Annotated[list[SeriesTable], Field(min_length=1)] | None = None

    @property
    def series_tables(self) -> list[SeriesTable]:
        """``series`` as a list."""
        return self.series if isinstance(self.series, list) else [self.series] if self.series else []

    @model_validator(mode="after")
    def _absolute_needs_time(self) -> "TableSource":
        if self.time is None and any(table.absolute for table in self.series_tables):
            raise ValueError("series.absolute compares with source.time: name that column, or leave absolute out")
        return self

    @model_validator(mode="after")
    def _label_fits_target(self) -> "TableSource":
        if self.target == "class" and isinstance(self.label, list):
            raise ValueError("label: a class is one column; give target: multilabel or regression for several")
        if self.target != "class" and self.label is None:
            raise ValueError(f"target {self.target} needs label: a column or several")
        if self.label_separator and (self.target != "multilabel" or isinstance(self.label, list)):
            raise ValueError("label_separator: only for one column of a multilabel target")
        if self.target == "multilabel" and isinstance(self.label, str) and not self.label_separator:
            raise ValueError("target multilabel with one column needs label_separator; or give several columns")
        return self

    @field_validator("image")
    @classmethod
    def _is_template(cls, template: str | None) -> str | None:
        try:
            parts = list(string.Formatter().parse(template or ""))
        except ValueError as error:
            raise ValueError(f"{template!r} is not a template such as photos/{{id}}.jpg: {error}") from None
        if any(name == "" or form or conversion for _, name, form, conversion in parts):
            raise ValueError(f"{template!r}: write only column names between braces, as in photos/{{id}}.jpg")
        return template


class AmazonSource(Strict):
    """Amazon reviews of 2018. Text is the summary and the review; the label is the number of stars.

    Attributes:
        reviews, metadata: raw files; metadata may be absent.
        images: raw folder with ``<asin>.jpg``; `python -m etl images` fills it.
        summary: the review's summary belongs to the text (paper). It often spells the label out: "Five Stars".
        text_chars: summary and review together are cut to this many characters.
        title: put the product's title before the text (not in the paper). It is not cut.
        brand, price: add these metadata columns to the tabular modality (not in the paper).
        style: add these keys of a review's style, for example ``[Color, Size]``, as categorical columns ``style.Color``,
            ... (not in the paper).
        group: what never straddles splits.
    """

    kind: Literal["amazon2018"]
    reviews: str
    metadata: str | None = None
    images: str | None = None
    summary: bool = True
    text_chars: int = Field(default=512, ge=1)
    title: bool = False
    brand: bool = False
    price: bool = False
    style: list[str] = []
    group: Literal["reviewer", "product"] = "reviewer"

    @model_validator(mode="after")
    def _switches_need_metadata(self) -> "AmazonSource":
        if self.metadata is None and (self.title or self.brand or self.price):
            raise ValueError("title, brand and price come from the metadata: give source.metadata, or switch them off")
        return self


class MimicSource(Strict):
    """MIMIC-IV v2.2. A stay's window is its first ``hours`` in the ICU; its end is the prediction time.

    Nothing from after the prediction time is used: a note or a measurement must have been stored by then (where the
    table says when), an image taken. Files are relative to the raw folder.

    Attributes:
        samples: ``cohort`` = stays of at least ``hours``, labelled with in-hospital mortality; ``pool`` = every stay, note
            and image without a label, for pretraining.
        chartevents_lacks: columns that this copy of chartevents does not have. Without ``stay_id``, patient and time find
            the stay; without ``value``, coma-scale answers come from their numbers.
        add_items, drop_items: chart (220000 and above) or lab itemids beside the benchmark's, with their variable; and
            itemids of the benchmark to leave out.
        impute: what stands in an hour without a measurement: the ``previous`` one (before the first, a normal value) as
            in the benchmark, always the ``normal`` value, or ``none``.
        radiology: radiology reports, the text; null = no text.
        image_metadata, images: of mimic-cxr-jpg: its metadata table (null = no images) and its folder ``files``.
        views: use only these ViewPositions (published: [AP]); null = any.
        align_hours: pool only: how far apart a note and an image may be to share a sample.
        demographics: age, sex, race, insurance, language, marital status, kind of admission and first care unit as the
            tabular modality (not in the paper). Needs ``patients``.
        leaky_reference_notes: the published setting: the text is the patient's last discharge summary, which was written
            after the outcome that is to be predicted. Reads ``discharge`` instead of ``radiology``.
    """

    kind: Literal["mimic4"]
    samples: Literal["cohort", "pool"] = "cohort"
    hours: int = Field(default=48, ge=1, le=720)
    icustays: str = "icu/icustays.csv.gz"
    admissions: str = "hosp/admissions.csv.gz"
    patients: str = "hosp/patients.csv.gz"
    chartevents: str = "icu/chartevents.csv.gz"
    chartevents_lacks: list[Literal["value", "stay_id", "storetime"]] = []
    labevents: str = "hosp/labevents.csv.gz"
    add_items: dict[int, str] = {}
    drop_items: list[int] = []
    impute: Literal["previous", "normal", "none"] = "previous"
    radiology: str | None = "note/radiology.csv.gz"
    discharge: str = "note/discharge.csv.gz"
    image_metadata: str | None = "mimic-cxr-jpg/mimic-cxr-2.0.0-metadata.csv.gz"
    images: str = "mimic-cxr-jpg/files"
    views: list[str] | None = Field(default=None, min_length=1)
    align_hours: int = Field(default=24, ge=0)
    demographics: bool = False
    leaky_reference_notes: bool = False

    @property
    def notes(self) -> str | None:
        """The file that the text comes from."""
        return self.discharge if self.leaky_reference_notes else self.radiology
