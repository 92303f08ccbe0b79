"""Contract 1: what a gold dataset is. Pure data; imports neither torch nor an ETL engine.

A gold dataset is a folder::

    manifest.json                      written last, atomically: a folder without one is unfinished
    tokenizer-<hash>.json              where the dataset has text
    train/<name>-train-b00007-00000-<hash>.tar       plain WebDataset: USTAR, members of a sample share a key
    train/<name>-train-b00007-00000-<hash>.parquet   one index row per sample (columns: see ``index_columns``)
    val/ test/                         the same
    reports/                           what the finished tasks of the build wrote; training does not read them

A file that a manifest names is never overwritten with other content: a new build writes new files beside the old ones
and then replaces the manifest. `python -m etl gc` removes the files that the manifest no longer names.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SCHEMA_VERSION = 1
SPLITS = ("train", "val", "test")
MANIFEST_NAME = "manifest.json"
KEY_PATTERN = r"[0-9a-f]{16}"
Target = Literal["class", "multilabel", "regression"]


class Strict(BaseModel):
    """A pydantic model in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid")


class ModalitySchema(Strict):
    """How one modality lies in the shards.

    Attributes:
        kind: the transform and the model class that understand it (``text``, ``image``, ...).
        members: tar member suffixes, for example ``["ts.npy", "tsmask.npy"]``. The first one exists
            exactly when the modality is present; all of ``members`` exist together.
        items: the most texts, images, ... that one sample has; those after the first lie in members that start with
            their number (``1.jpg``, ``2.jpg``).
        extras: members that are stored and indexed beside them, but that training does not read (the raw text).
        spec: what decoding and modelling need (vocabulary, statistics, sizes), fitted on train only. Its
            type is the ``*Spec`` of `lanistr.transforms` for ``kind``.
    """

    kind: str
    members: list[str]
    items: int = Field(default=1, ge=1)
    extras: list[str] = []
    spec: dict[str, Any]

    @property
    def stored(self) -> list[str]:
        """All members in the tars."""
        return [*(name for i in range(self.items) for name in item_members(self.members, i)), *self.extras]


def item_members(members: Sequence[str], item: int) -> list[str]:
    """Names of the members of a sample's ``item``-th text, image, ...; the first ones (0) carry no number."""
    return [f"{item}.{member}" if item else member for member in members]


class Shard(Strict):
    """One tar and its index. Paths are relative to the manifest; hashes are sha256 in hex.

    Attributes:
        n_by_mask: number of samples per presence bitmask (decimal string).
    """

    split: str
    path: str
    index: str
    n: int
    bytes: int
    sha256: str
    index_sha256: str
    n_by_mask: dict[str, int]


class Tokenizer(Strict):
    """The tokenizer file beside the manifest and the sha256 of its bytes."""

    file: str
    sha256: str


class Manifest(Strict):
    """The identity card of a gold dataset.

    Attributes:
        modalities: by name, **in bit order**: bit ``i`` of a presence mask is the ``i``-th modality.
        labels: class names in id order, the labels of a multi-label target, or the columns of a regression; empty without
            a label.
        target: what is predicted. One ``class``: ``label`` of an index row is its id. Otherwise ``target`` of the row holds
            a number per entry of ``labels`` (0 or 1, or any; NaN = unknown), and ``label`` is 0 where one of them is known.
        fit: what statistics, vocabularies and tokenizer were made from: ``from`` is ``train`` or names another dataset,
            ``train`` a digest of the samples; for `etl verify --deep`.
        quarantine: number of records set aside, by reason.
        private: holds data of people: previews and statistics hide texts, images and identifying values.
        counts: rows at each stage of the build, for people (read, duplicates, joined, ...).
        content_id: sha256 over shards, indices, schema, tokenizer and fit; not over time, paths or host.
    """

    schema_version: int = SCHEMA_VERSION
    name: str
    modalities: dict[str, ModalitySchema]
    tokenizer: Tokenizer | None = None
    labels: list[str]
    target: Target = "class"
    split_rule: dict[str, Any]
    fit: dict[str, str] = {}
    private: bool = False
    shards: list[Shard]
    quarantine: dict[str, int]
    counts: dict[str, int]
    parents: list[dict[str, str]]
    created_by: dict[str, str]
    content_id: str = ""

    def bit(self, modality: str) -> int:
        """Value of the modality's bit in a presence mask."""
        return 1 << list(self.modalities).index(modality)

    def shards_of(self, split: str) -> list[Shard]:
        """Shards of one split, in order. Raises ValueError for an unknown split."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r}: allowed are {', '.join(SPLITS)}")
        return [s for s in self.shards if s.split == split]

    def n(self, split: str) -> int:
        """Number of samples in a split."""
        return sum(s.n for s in self.shards_of(split))

    def compute_content_id(self) -> str:
        """The content id that these contents should have."""
        keep = self.model_dump(include={"schema_version", "name", "modalities", "labels", "split_rule"})
        if self.target != "class":  # earlier datasets keep their identity
            keep["target"] = self.target
        keep["tokenizer"] = self.tokenizer.sha256 if self.tokenizer else None
        keep["shards"] = [(s.path, s.sha256, s.index_sha256) for s in self.shards]
        return hashlib.sha256(json.dumps(keep, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` atomically (temporary file, fsync, rename)."""
        temporary = folder / f".{MANIFEST_NAME}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(self.model_dump_json(indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST_NAME)

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read and validate ``folder/manifest.json``.

        Raises:
            ValueError: no manifest (unfinished build or wrong folder), unreadable, or another schema version.
        """
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            raise ValueError(
                f"{folder}: no {MANIFEST_NAME}; this is not a finished gold dataset (build one with `python -m etl build`)"
            )
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path}: not a valid manifest: {where}: {first['msg']}") from None
        if manifest.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"{path}: schema_version {manifest.schema_version}, this version reads {SCHEMA_VERSION}; rebuild the dataset"
            )
        return manifest


def sample_key(dataset: str, group: str, row_id: str) -> str:
    """16 hex digits that name a sample and reveal no identifier."""
    return hashlib.sha256(f"{dataset}|{group}|{row_id}".encode()).hexdigest()[:16]


def index_columns(modalities: dict[str, ModalitySchema], target: Target = "class") -> list[tuple[str, str]]:
    """Names and Arrow types of an index Parquet, in order.

    ``length/<modality>`` counts tokens, steps or rows (0 = absent); ``offset/<member>`` is the byte position of the
    member's *content* in the tar (-1 = absent); ``crc32/<member>`` is `zlib.crc32` of it.
    """
    columns = [
        ("key", "string"),
        ("group_hash", "string"),
        ("presence", "uint32"),
        ("label", "int32"),  # -1: unlabelled
        *([("target", "list<float32>")] if target != "class" else []),  # empty: unlabelled
        ("cost", "float32"),
        ("source_file", "string"),
        ("source_row", "int64"),
        ("tab", "list<float32>"),  # the tabular row (empty = absent): readable without touching the tar
        ("offset/json", "int64"),
        ("size/json", "int64"),
        ("crc32/json", "uint32"),
    ]
    for name, schema in modalities.items():
        columns.append((f"length/{name}", "int32"))
        for member in schema.stored:
            columns += [
                (f"offset/{member}", "int64"),
                (f"size/{member}", "int64"),
                (f"crc32/{member}", "uint32"),
            ]
    return columns
