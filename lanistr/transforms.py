"""Raw value -> member bytes, per modality, and the specs that describe them.

The one place where raw data becomes model input: the ETL calls it for training data and the predictor for raw
records, so that training and serving cannot differ. Imports no torch.

For each kind there is a ``*Spec`` (stored in the manifest, fitted on train only) and an ``encode_*`` function that
returns ``{member suffix: bytes}``. Numbers are stored untransformed (NaN = missing cell); scaling happens
when a member is decoded.
"""

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lanistr.manifest import Strict

if TYPE_CHECKING:
    from PIL.Image import Image
    from tokenizers import Tokenizer

MISSING_ID = 0  # category id of a missing cell
UNSEEN_ID = 1  # category id of a value that the training data never had
FIRST_KNOWN_ID = 2
MAX_IMAGE_PIXELS = 64_000_000


class TextSpec(Strict):
    """Token ids as ``tok.npy`` (uint16 or int32), with [CLS] first and [SEP] last.

    Attributes:
        max_tokens: longest stored sequence, special tokens included.
    """

    kind: Literal["text"] = "text"
    vocab_size: int
    max_tokens: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int


class ImageSpec(Strict):
    """A JPEG (``jpg``): EXIF-rotated, RGB, shorter side at most ``size`` pixels."""

    kind: Literal["image"] = "image"
    size: int
    quality: int = 90


class NumericColumn(Strict):
    """A numeric column in train: mean, deviation (> 0), and evenly spaced quantiles, both ends included ([] = unknown)."""

    name: str
    mean: float
    std: float
    quantiles: list[float] = []


class CategoricalColumn(Strict):
    """A categorical column: ids 0 missing, 1 unseen, then ``values`` in order, then ``buckets`` hashed ones.

    ``buckets`` is 0 when ``values`` holds every value seen in train; otherwise a value outside ``values`` is hashed.
    """

    name: str
    values: list[str]
    buckets: int = 0

    @property
    def cardinality(self) -> int:
        """Number of ids."""
        return FIRST_KNOWN_ID + len(self.values) + self.buckets

    def name_of(self, category: int) -> str:
        """What an id stands for, for people."""
        if category < FIRST_KNOWN_ID:
            return "(missing)" if category == MISSING_ID else "(unseen)"
        position = category - FIRST_KNOWN_ID
        return self.values[position] if position < len(self.values) else f"(bucket {position - len(self.values)})"


class TabularSpec(Strict):
    """One float32 row (``tab.npy``): numeric columns, then category ids; NaN = missing cell."""

    kind: Literal["tabular"] = "tabular"
    numeric: list[NumericColumn]
    categorical: list[CategoricalColumn]


class SeriesGrid(Strict):
    """A regular grid with imputation and flags: the discretiser of Harutyunyan et al. (2019).

    Each group of a `SeriesSpec` with a grid is one variable: its value channels (one number, or one channel per
    category), then a flag channel that is 1 in the steps where the variable was measured.

    Attributes:
        impute: what stands in a step without a measurement: ``none`` (NaN), the variable's ``normal`` value, or the
            ``previous`` measurement (the normal value before the first one).
        normal: the normal value, per channel (0 for flags).
    """

    impute: Literal["none", "normal", "previous"]
    normal: list[float]


class SeriesSpec(Strict):
    """``ts.npy`` (T, C) float32 values and ``tsmask.npy`` (T, C) uint8 flags of what was measured.

    Without a grid, a value that was not measured is stored as 0. With a grid it may be imputed: ``ts.npy`` then holds a
    finite value where ``tsmask.npy`` holds 0, and NaN where nothing is known. Flag channels are derived, so their
    ``tsmask.npy`` is 0: they are model input, never something to predict.

    Attributes:
        variables: channel names.
        groups: channels that are masked together (a variable, its one-hots and its flag), as lists of channel ids.
        mean, std: per channel over observed train values (std > 0); 0 and 1 for one-hots and flags.
        max_steps: longest stored series.
        grid: how points become a regular grid; None = a step per distinct time.
    """

    kind: Literal["timeseries"] = "timeseries"
    variables: list[str]
    groups: list[list[int]]
    mean: list[float]
    std: list[float]
    max_steps: int
    grid: SeriesGrid | None = None


SPECS: dict[str, type[Strict]] = {
    "text": TextSpec,
    "image": ImageSpec,
    "tabular": TabularSpec,
    "timeseries": SeriesSpec,
}
MEMBERS: dict[str, list[str]] = {
    "text": ["tok.npy"],
    "image": ["jpg"],
    "tabular": ["tab.npy"],
    "timeseries": ["ts.npy", "tsmask.npy"],
}


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as a ``.npy`` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def read_npy(data: bytes) -> np.ndarray:
    """The array of a ``.npy`` file, read-only. Raises ValueError for anything else (pickles are refused)."""
    if data[:8] == b"\x93NUMPY\x01\x00":
        begin = 10 + int.from_bytes(data[8:10], "little")
        shape, fortran, dtype = _npy_header(data[:begin])
        if not fortran and not dtype.hasobject and len(data) - begin == math.prod(shape) * dtype.itemsize:
            return np.frombuffer(data, dtype, offset=begin).reshape(shape)
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def concatenate_npy(datas: Sequence[bytes]) -> tuple[np.ndarray, list[int]]:
    """One-dimensional ``.npy`` files of one type, one after the other: what they hold, and the length of each.

    Raises:
        ValueError: none, or anything else among them.
    """
    bodies, lengths, dtypes = [], [], set()
    for data in datas:
        begin = data.find(b"\n", _NPY_LENGTH) + 1
        shape, _, dtype = _npy_header(data[:begin])
        if len(shape) != 1 or len(data) - begin != shape[0] * dtype.itemsize:
            raise ValueError(f".npy: {len(data) - begin} bytes of shape {shape}")
        bodies.append(data[begin:])
        lengths.append(shape[0])
        dtypes.add(dtype)
    if len(dtypes) != 1:
        raise ValueError(f".npy files of {len(dtypes)} types")
    return np.frombuffer(b"".join(bodies), dtypes.pop()), lengths  # refuses objects


_NPY_LENGTH = 10  # bytes before the text of the header, which a newline ends


@lru_cache(maxsize=4096)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type: parsing a header takes ten times as long as the rest, and few differ."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(".npy of another version than 1.0")
    return np.lib.format.read_array_header_1_0(file)


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Read a ``tokenizer.json`` or a WordPiece ``vocab.txt``.

    Padding and truncation that a ``tokenizer.json`` brings along (sentence encoders pad to 128) are switched off: a
    sample's tokens are its text's, and `TextSpec.max_tokens` cuts them.

    Raises:
        ValueError: no such file, or not a tokenizer.
    """
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"tokenizer {path}: no such file")
    try:
        if path.suffix == ".txt":
            tokenizer: Any = BertWordPieceTokenizer(str(path), lowercase=True)
            return tokenizer._tokenizer
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"tokenizer {path}: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def text_spec(tokenizer: "Tokenizer", max_tokens: int) -> TextSpec:
    """The spec of a tokenizer with BERT's special tokens. Raises ValueError where one is absent."""
    ids = {}
    for name in ("pad", "unk", "cls", "sep", "mask"):
        token = f"[{name.upper()}]"
        ids[f"{name}_id"] = tokenizer.token_to_id(token)
        if ids[f"{name}_id"] is None:
            raise ValueError(f"the tokenizer has no {token}; LANISTR needs BERT's five special tokens")
    return TextSpec(vocab_size=tokenizer.get_vocab_size(), max_tokens=max_tokens, **ids)


def encode_text(text: str, tokenizer: "Tokenizer", spec: TextSpec) -> dict[str, bytes]:
    """Token ids [CLS] ... [SEP], cut to ``spec.max_tokens``."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids[: spec.max_tokens - 2]
    dtype = np.uint16 if spec.vocab_size <= 1 << 16 else np.int32
    return {"tok.npy": npy_bytes(np.array([spec.cls_id, *ids, spec.sep_id], dtype=dtype))}


def encode_image(data: bytes, spec: ImageSpec) -> dict[str, bytes]:
    """Decode, rotate by EXIF, lay what is transparent on white, shrink the shorter side to ``spec.size``, write a JPEG.

    Raises:
        ValueError: not an image that Pillow can decode, more than 64 million pixels, or too long for a JPEG.
    """
    from PIL.Image import Resampling

    try:
        image = _decode(data, spec.size)
        short = min(image.size)
        if short > spec.size:
            width, height = (max(spec.size, round(side * spec.size / short)) for side in image.size)
            image = image.resize((width, height), Resampling.BILINEAR)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=spec.quality)
    except Exception as error:  # on hostile bytes Pillow's decoders raise almost anything
        raise ValueError(f"not a readable image: {error}") from None
    return {"jpg": buffer.getvalue()}


def _decode(data: bytes, size: int) -> "Image":
    """An RGB image, decoded at a size not much above ``size`` where the format allows it."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data)) as opened:
        if opened.width * opened.height > MAX_IMAGE_PIXELS:
            raise ValueError(f"image of {opened.width} x {opened.height} pixels: too large")
        opened.draft("RGB", (size, size))
        image = ImageOps.exif_transpose(opened)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def category_id(value: Any, column: CategoricalColumn, lookup: Mapping[str, int]) -> int:
    """Id of a category value; ``lookup`` maps ``column.values`` to their position.

    A bool is found as JSON spells it (``true``) and as Python does: raw records hold the one, CSV files the other.
    """
    text = str(value)
    if isinstance(value, bool) and text not in lookup:
        text = text.lower()
    if text in lookup:
        return FIRST_KNOWN_ID + lookup[text]
    if not column.buckets:
        return UNSEEN_ID
    digest = int.from_bytes(hashlib.md5(text.encode()).digest(), "little")
    return FIRST_KNOWN_ID + len(column.values) + digest % column.buckets


class TabularEncoder:
    """Encodes rows of one `TabularSpec`; holds the category look-up tables."""

    def __init__(self, spec: TabularSpec):
        self.spec = spec
        self.lookups = [{value: i for i, value in enumerate(c.values)} for c in spec.categorical]

    def row(self, values: Mapping[str, Any]) -> np.ndarray:
        """(numeric + categorical,) float32; None, NaN, inf or an absent column is a missing cell (NaN)."""
        numeric = [_number(values.get(c.name)) for c in self.spec.numeric]
        categories = [
            np.nan if values.get(c.name) is None else category_id(values[c.name], c, lookup)
            for c, lookup in zip(self.spec.categorical, self.lookups, strict=True)
        ]
        return np.array(numeric + categories, dtype=np.float32)

    def encode(self, values: Mapping[str, Any]) -> dict[str, bytes]:
        """The row as a member."""
        return {"tab.npy": npy_bytes(self.row(values))}


def _number(value: Any) -> float:
    if value is None:
        return np.nan
    number = float(value)
    return number if np.isfinite(number) else np.nan


Point = tuple[float, str, float | None]  # time, variable, value


def encode_points(points: Sequence[Point], spec: SeriesSpec) -> dict[str, bytes]:
    """Members of a series given as points, in any order; variables that the spec does not have are left out.

    With a grid, a time is a step (0, 1, ...) and the series reaches to the latest one; a point without a value says no
    more than that. Raises ValueError as `encode_series`.
    """
    if spec.grid is None:
        return encode_series(_by_time(points, spec), spec)
    values_TC, observed_TC = _on_grid(points, spec, spec.grid)
    return _series_members(values_TC, observed_TC, spec)


def encode_series(values_TC: np.ndarray, spec: SeriesSpec) -> dict[str, bytes]:
    """Values with NaN where nothing was observed, cut to the last ``spec.max_steps`` steps.

    Raises:
        ValueError: not (T >= 1, C) with C = number of variables.
    """
    values_TC = np.asarray(values_TC, dtype=np.float32)
    if values_TC.ndim != 2 or values_TC.shape[0] < 1 or values_TC.shape[1] != len(spec.variables):
        raise ValueError(f"series of shape {values_TC.shape}: needs (T >= 1, {len(spec.variables)})")
    observed_TC = np.isfinite(values_TC)
    return _series_members(np.where(observed_TC, values_TC, 0), observed_TC, spec)


def _series_members(values_TC: np.ndarray, observed_TC: np.ndarray, spec: SeriesSpec) -> dict[str, bytes]:
    return {
        "ts.npy": npy_bytes(values_TC[-spec.max_steps :].astype(np.float32)),
        "tsmask.npy": npy_bytes(observed_TC[-spec.max_steps :].astype(np.uint8)),
    }


def _by_time(points: Sequence[Point], spec: SeriesSpec) -> np.ndarray:
    """(T, C) with NaN where nothing was observed; a row per distinct time."""
    times = {time: i for i, time in enumerate(sorted({time for time, _, _ in points}))}
    return _cells([(times[time], variable, value) for time, variable, value in points], spec)


def _cells(points: Sequence[tuple[int, str, float | None]], spec: SeriesSpec) -> np.ndarray:
    """(T, C) with NaN where no point is; T is the latest step + 1."""
    channel = {name: i for i, name in enumerate(spec.variables)}
    values_TC = np.full((1 + max((step for step, _, _ in points), default=-1), len(channel)), np.nan, dtype=np.float32)
    for step, variable, value in points:
        if variable in channel and value is not None:
            values_TC[step, channel[variable]] = value
    return values_TC


def _on_grid(points: Sequence[Point], spec: SeriesSpec, grid: SeriesGrid) -> tuple[np.ndarray, np.ndarray]:
    """Values (T, C) with one-hots, imputed values and flags, and what of them was measured (T, C)."""
    values_TC = _cells([(int(time), variable, value) for time, variable, value in points], spec)
    observed_TC = np.zeros(values_TC.shape, dtype=bool)
    for *cells, flag in spec.groups:
        block_TK = values_TC[:, cells]
        seen_T = np.isfinite(block_TK).max(axis=1)
        block_TK[seen_T] = np.nan_to_num(block_TK[seen_T], nan=0.0)  # the categories that it was not
        normal_K = np.take(grid.normal, cells)
        values_TC[:, cells] = _impute(block_TK, seen_T, normal_K, grid.impute)
        values_TC[:, flag] = seen_T
        observed_TC[:, cells] = seen_T[:, None]
    return values_TC, observed_TC


def _impute(block_TK: np.ndarray, seen_T: np.ndarray, normal_K: np.ndarray, how: str) -> np.ndarray:
    """The value channels of one variable, with what stands in the steps where it was not measured."""
    if how == "none":
        return block_TK
    if how == "normal":
        return np.where(seen_T[:, None], block_TK, normal_K)
    latest_T = np.maximum.accumulate(np.where(seen_T, np.arange(len(seen_T)), -1))
    return np.where(latest_T[:, None] >= 0, block_TK[latest_T], normal_K)
