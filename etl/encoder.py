"""A row of the silver tables -> the members of a sample, all of them through `lanistr.transforms`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lanistr.transforms import (
    ImageSpec,
    Point,
    SeriesSpec,
    TabularEncoder,
    TabularSpec,
    TextSpec,
    encode_image,
    encode_points,
    encode_text,
    load_tokenizer,
    read_npy,
)

MAX_IMAGE_BYTES = 256 << 20
RAW_TEXT = "txt"  # member with the raw text, on request; training does not read it


@dataclass(frozen=True)
class RawSample:
    """A row of the silver tables.

    Attributes:
        label: class id, -1 = unlabelled; 0 where ``target`` says what.
        target: the numbers of a multi-label target or a regression, None = unknown; empty with classes, or unlabelled.
        row: tabular values by column.
        series: points (time, variable, value), by time.
    """

    key: str
    group_hash: str
    label: int
    text: str | None
    image: str | None
    row: dict[str, Any] | None
    series: list[Point]
    source_file: str
    source_row: int
    target: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class EncodedSample:
    """Members in the order of the tar, and what was wrong with the image, if anything."""

    raw: RawSample
    members: dict[str, bytes]
    lengths: dict[str, int]
    bad_image: str | None = None


@dataclass(frozen=True)
class Encoder:
    """Encodes samples.

    Attributes:
        specs: of each modality, in bit order.
        raw: raw folder; no image outside of it is read.
        tokenizer: its file.
        max_chars: texts are cut to this many characters first.
        keep_raw: store the whole text too.
    """

    specs: Mapping[str, Any]
    raw: Path
    tokenizer: Path | None
    max_chars: int | None
    keep_raw: bool = False

    def encode(self, raw: RawSample) -> EncodedSample:
        """All members of a sample; a missing modality has none."""
        found: dict[str, dict[str, bytes]] = {}
        lengths: dict[str, int] = {}
        bad_image = None
        for name, spec in self.specs.items():
            members: dict[str, bytes] = {}
            if isinstance(spec, TextSpec) and raw.text:
                members = self._text(raw.text, spec)
            elif isinstance(spec, ImageSpec) and raw.image:
                members, bad_image = self._image(raw.image, spec)
            elif isinstance(spec, TabularSpec) and raw.row is not None:
                members = self._tabular.encode(raw.row)
            elif isinstance(spec, SeriesSpec) and raw.series:
                members = encode_points(raw.series, spec)
            found[name] = members
            lengths[name] = _length(members)
        present = [name for name, members in found.items() if members]
        header: dict[str, Any] = {"label": raw.label, "group": raw.group_hash, "modalities": present}
        if raw.target:
            header["target"] = list(raw.target)
        members = {
            "json": json.dumps(header).encode(),
            **{m: b for f in found.values() for m, b in f.items()},
        }
        return EncodedSample(raw, members, lengths, bad_image)

    def image_digest(self, name: str) -> bytes:
        """sha256 of an image file; empty where there is none that may be read."""
        path = self._inside(name)
        try:
            if path is None or not path.is_file():
                return b""
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError:
            return b""

    @cached_property
    def _tokenizer(self) -> Any:
        assert self.tokenizer is not None
        return load_tokenizer(self.tokenizer)

    @cached_property
    def _tabular(self) -> TabularEncoder:
        return TabularEncoder(next(spec for spec in self.specs.values() if isinstance(spec, TabularSpec)))

    def _text(self, text: str, spec: TextSpec) -> dict[str, bytes]:
        members = encode_text(text[: self.max_chars], self._tokenizer, spec)
        return members | ({RAW_TEXT: text.encode()} if self.keep_raw else {})

    def _inside(self, name: str) -> Path | None:
        try:
            path = (self.raw / name).resolve()
        except (OSError, ValueError, RuntimeError):  # a NUL byte, an endless name, a loop of links
            return None
        return path if path.is_relative_to(self.raw.resolve()) else None

    def _image(self, name: str, spec: ImageSpec) -> tuple[dict[str, bytes], str | None]:
        path = self._inside(name)
        if path is None:
            return {}, "image outside of the raw folder"
        try:
            if not path.is_file():
                return {}, None
            if path.stat().st_size > MAX_IMAGE_BYTES:
                return {}, "image file too large"
            return encode_image(path.read_bytes(), spec), None
        except (ValueError, OSError):
            return {}, "broken image"


def _length(members: dict[str, bytes]) -> int:
    """Tokens or steps; 1 for an image or a row; 0 where absent."""
    for name, data in members.items():
        if name in ("tok.npy", "ts.npy"):
            return len(read_npy(data))
    return int(bool(members))
