"""What `etl verify --deep` proves beyond checksums: members, content across splits, the fit, the lake, leaks.

Works on the gold dataset alone; where the lake it was built in is around it, silver and quarantine are held against it
too. Checks of single samples look at no more than `LOOK_INTO` of them, spread over the dataset.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from etl import refit
from etl.leaks import probe
from etl.members import Members
from etl.provenance import verify_lake
from etl.summary import read_indices
from lanistr.manifest import SPLITS, Manifest, ModalitySchema
from lanistr.transforms import FIRST_KNOWN_ID, ImageSpec, SeriesSpec, TabularSpec, TextSpec

LOOK_INTO = 20_000
DECODE = 500
LONG_TEXT = 20  # tokens; shorter ones ("Great!") recur by chance
SPECIAL_TOKENS = 2  # [CLS] and [SEP]


def verify_deep(gold: Path, manifest: Manifest) -> list[str]:
    """Lines that say what was proved, then what the leak probe found.

    Raises:
        ValueError: the first thing that is wrong.
    """
    index = read_indices(gold, manifest)
    lines = [_members(gold, manifest, index), *_content(gold, manifest, index)]
    lines += refit.verify_fit(gold, manifest, index)
    lines += verify_lake(gold, manifest, index)
    leaks = probe(gold, manifest, index)
    return lines + (
        [f"leak? {leak}" for leak in leaks] or ["leaks: no column or phrase is suspiciously good by itself"]
    )


def _members(gold: Path, manifest: Manifest, index: pl.DataFrame) -> str:
    rows = index.sort("key").head(LOOK_INTO)
    images = 0
    with Members(gold) as members:
        for row in rows.iter_rows(named=True):
            try:
                _header(row, members, manifest)
                for name, schema in manifest.modalities.items():
                    if row["presence"] & manifest.bit(name) and schema.kind in CHECKS:
                        decode = schema.kind == "image" and images < DECODE
                        images += decode
                        CHECKS[schema.kind](row, name, schema, members, decode)
            except (ValueError, KeyError, OSError) as error:
                raise ValueError(f"{gold / row['shard']}: sample {row['key']}: {error}") from None
    decoded = f", {images:,} images decoded" if images else ""
    return f"members: {rows.height:,} of {index.height:,} samples looked into, all as the schema says{decoded}"


def _header(row: Mapping[str, Any], members: Members, manifest: Manifest) -> None:
    header = json.loads(members.read(row, "json"))
    present = [name for name in manifest.modalities if row["presence"] & manifest.bit(name)]
    expected = {"label": row["label"], "group": row["group_hash"], "modalities": present}
    if manifest.target != "class":
        header = header | {"target": [np.float32(np.nan if x is None else x) for x in header.get("target", [])]}
        _must(np.array_equal(header["target"], row["target"], equal_nan=True), "its target is not the index's")
        _must(len(row["target"]) in (0, len(manifest.labels)), f"{len(row['target'])} numbers in its target")
    _must({k: header.get(k) for k in expected} == expected, f"its .json says {header}, the index {expected}")
    classes = len(manifest.labels) if manifest.target == "class" else 1
    _must(-1 <= row["label"] < classes, f"label {row['label']} of {len(manifest.labels)} classes")


def _must(condition: Any, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _text(row: Mapping[str, Any], name: str, schema: ModalitySchema, members: Members, _: bool) -> None:
    spec = TextSpec.model_validate(schema.spec)
    ids = members.array(row, "tok.npy")
    _must(ids.ndim == 1 and ids.dtype in (np.uint16, np.int32), f"tokens of {ids.dtype}, shape {ids.shape}")
    _must(len(ids) == row[f"length/{name}"] <= spec.max_tokens, f"{len(ids)} tokens, the index says otherwise")
    _must(ids.min() >= 0 and ids.max() < spec.vocab_size, "a token beyond the vocabulary")
    _must(ids[0] == spec.cls_id and ids[-1] == spec.sep_id, "tokens do not run from [CLS] to [SEP]")


def _image(row: Mapping[str, Any], _: str, schema: ModalitySchema, members: Members, decode: bool) -> None:
    from PIL import Image

    spec = ImageSpec.model_validate(schema.spec)
    with Image.open(io.BytesIO(members.read(row, "jpg"))) as image:
        _must((image.format, image.mode) == ("JPEG", "RGB"), f"a {image.format} of mode {image.mode}")
        _must(min(image.size) <= spec.size, f"an image of {image.size}, its shorter side above {spec.size}")
        if decode:
            image.load()


def _tabular(row: Mapping[str, Any], _: str, schema: ModalitySchema, members: Members, __: bool) -> None:
    spec = TabularSpec.model_validate(schema.spec)
    values = members.array(row, "tab.npy")
    _must(values.dtype == np.float32, f"a row of {values.dtype}")
    _must(values.tobytes() == np.array(row["tab"], dtype=np.float32).tobytes(), "tab.npy and the index differ")
    _must(values.shape == (len(spec.numeric) + len(spec.categorical),), f"a row of shape {values.shape}")
    _must(not np.isinf(values).any(), "an infinite number")
    ids = values[len(spec.numeric) :]
    limits = np.array([column.cardinality for column in spec.categorical])
    known = ~np.isnan(ids)
    _must(((ids >= FIRST_KNOWN_ID - 1) & (ids < limits) & (ids % 1 == 0))[known].all(), f"category ids {ids.tolist()}")


def _series(row: Mapping[str, Any], name: str, schema: ModalitySchema, members: Members, _: bool) -> None:
    spec = SeriesSpec.model_validate(schema.spec)
    values, observed = members.array(row, "ts.npy"), members.array(row, "tsmask.npy")
    _must(values.dtype == np.float32 and observed.dtype == np.uint8, f"series of {values.dtype}, {observed.dtype}")
    _must(values.shape == observed.shape == (row[f"length/{name}"], len(spec.variables)), f"shape {values.shape}")
    _must(len(values) <= spec.max_steps, f"{len(values)} steps, at most {spec.max_steps}")
    _must(observed.max(initial=0) <= 1 and np.isfinite(values[observed == 1]).all(), "an observed value is not finite")
    _must(not np.isinf(values).any(), "an infinite value")


Check = Callable[[Mapping[str, Any], str, ModalitySchema, Members, bool], None]
CHECKS: dict[str, Check] = {"text": _text, "image": _image, "tabular": _tabular, "timeseries": _series}


def _content(gold: Path, manifest: Manifest, index: pl.DataFrame) -> list[str]:
    """No whole sample in two splits; overlap of texts and images alone is reported.

    A sample that is nothing but a short text and a row (a "Great!" of no identifiable person) may well recur, and is
    reported only.
    """
    hashes = _hashes(gold, manifest, index)
    table = index.select("key", "split").with_columns(**{name: pl.Series(values) for name, values in hashes.items()})
    rich = pl.lit(False)
    for name, schema in manifest.modalities.items():
        least = LONG_TEXT + SPECIAL_TOKENS if schema.kind == "text" else 1
        if schema.kind != "tabular":
            rich |= index[f"length/{name}"] >= least
    table = table.with_columns(rich=rich)
    lines = []
    for a, b in combinations(SPLITS, 2):
        first, second = (table.filter(pl.col("split") == split) for split in (a, b))
        twins = second.join(first, on="whole", suffix="_first")
        bad = twins.filter(pl.col("rich"))
        if bad.height:
            one, other = bad.sort("key").select("key", "key_first").row(0)
            raise ValueError(
                f"{bad['key'].n_unique()} samples of {b} are in {a} as well, in all their content: for example {one} and "
                f"{other}; give both the same group (source.group, or split.near_duplicates for texts)"
            )
        if twins.height:
            n = twins["key"].n_unique()
            lines.append(f"content: {n:,} samples of {b} with nothing but a short text or a row are in {a} too")
        for name, schema in manifest.modalities.items():
            if schema.kind not in ("tabular", "timeseries"):
                lines += _overlap(name, schema, index, first, second, a, b)
    return ["content: no whole sample lies in two splits", *lines]


def _overlap(
    name: str, schema: ModalitySchema, index: pl.DataFrame, first: pl.DataFrame, second: pl.DataFrame, a: str, b: str
) -> list[str]:
    present = second.filter(pl.col(name) != 0).join(index.select("key", f"length/{name}"), on="key")
    if not present.height:
        return []
    shared = present.join(first.filter(pl.col(name) != 0).select(name).unique(), on=name, how="semi")
    if not shared.height:
        return []
    line = f"overlap: {shared.height:,} of {present.height:,} {name}s of {b} are in {a} too"
    if schema.kind == "text":
        long = shared.filter(pl.col(f"length/{name}") >= LONG_TEXT + SPECIAL_TOKENS).height
        line += f", {long:,} of them of at least {LONG_TEXT} tokens"
    return [line]


def _hashes(gold: Path, manifest: Manifest, index: pl.DataFrame) -> dict[str, np.ndarray]:
    """64-bit hashes of each sample's modalities (0 = absent), and of the whole."""
    made = {name: np.zeros(index.height, dtype=np.uint64) for name in [*manifest.modalities, "whole"]}
    with Members(gold) as members:
        for i, row in enumerate(index.drop("tab").iter_rows(named=True)):
            whole = b""
            for name, schema in manifest.modalities.items():
                if row["presence"] & manifest.bit(name):
                    content = b"".join(members.read(row, member) for member in schema.members)
                    digest = hashlib.blake2b(content, digest_size=8).digest()
                    made[name][i] = int.from_bytes(digest, "little") or 1
                    whole += name.encode() + digest
            made["whole"][i] = int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest(), "little")
    return made
