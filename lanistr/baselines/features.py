"""What a practitioner computes of every modality before the first model: plain numbers, and NaN where nothing is known.

Everything is computed from what `Modality.decode` gives LANISTR, so that no method sees more of a sample than another.

Shape suffixes: N samples, R numeric columns, K categorical columns, F features, T steps, V variables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np

from lanistr.baselines import Subset
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import Sample, Several, intact, read_samples
from lanistr.evaluation.plain import image_statistics, series_statistics
from lanistr.modalities.tabular import Row, TabularModality

CHUNK = 256


@dataclass(frozen=True)
class Features:
    """Of N samples.

    Attributes:
        texts: "" where there is none.
        numbers_NR: of the table, scaled as the recipe says; NaN = missing.
        categories_NK: category ids; 0 = missing.
        images_NF: thumbnail, mean and spread of each channel, and colour histogram; NaN = no image.
        series_NF: of every variable mean, spread, least, greatest, first and last value and share observed; NaN = unknown.
    """

    texts: list[str]
    numbers_NR: np.ndarray
    categories_NK: np.ndarray
    images_NF: np.ndarray
    series_NF: np.ndarray

    def take(self, rows_N: np.ndarray) -> "Features":
        """Some of the samples."""
        return Features(
            [self.texts[i] for i in rows_N],
            self.numbers_NR[rows_N],
            self.categories_NK[rows_N],
            self.images_NF[rows_N],
            self.series_NF[rows_N],
        )


def features_of(subset: Subset) -> Features:
    """Features of a subset. Those of all labelled samples of its split are computed once and kept."""
    found = _labelled_features(subset.dataset)
    return found.take(labelled_rows(subset))


def labelled_rows(subset: Subset) -> np.ndarray:
    """Places of the subset's samples among all labelled ones of its split."""
    labelled_N = subset.dataset.labelled(None, 0)
    rows_N = np.searchsorted(labelled_N, subset.positions_N)
    assert (labelled_N[rows_N] == subset.positions_N).all(), "a subset of the labelled samples"
    return rows_N


@lru_cache(maxsize=3)
def _labelled_features(dataset: GoldDataset) -> Features:
    samples = read_all(dataset, dataset.labelled(None, 0))
    return Features(
        texts_of(dataset, samples),
        _stack(samples, dataset, "tabular", _numbers),
        _categories(samples, dataset),
        _stack(samples, dataset, "image", image_statistics),
        _stack(samples, dataset, "timeseries", series_statistics),
    )


def read_all(dataset: GoldDataset, positions_N: np.ndarray) -> list[Sample]:
    """Decode samples. Raises `CorruptSample`."""
    found: list[Sample] = []
    for start in range(0, len(positions_N), CHUNK):
        found += intact(read_samples(dataset, positions_N[start : start + CHUNK].tolist()))
    return found


def texts_of(dataset: GoldDataset, samples: Sequence[Sample]) -> list[str]:
    """The texts that the tokens spell, several of one sample one after the other."""
    from tokenizers import Tokenizer

    names, file = names_of(dataset, "text"), dataset.manifest.tokenizer
    if not names or file is None:
        return [""] * len(samples)
    blob = dataset.store.open(file.file, None, file.sha256)
    try:
        tokenizer = Tokenizer.from_str(blob.read(0, blob.size).decode())
    finally:
        blob.close()
    return [" ".join(tokenizer.decode(ids.tolist()) for ids in _contents(sample, names)) for sample in samples]


@lru_cache(maxsize=1)
def corpus(dataset: GoldDataset) -> list[str]:
    """The texts of a whole split, unlabelled ones included."""
    names = names_of(dataset, "text")
    if not names:
        return []
    texts: list[str] = []
    for start in range(0, dataset.n, CHUNK):
        positions = np.arange(start, min(start + CHUNK, dataset.n))
        texts += texts_of(_only(dataset, names), read_all(_only(dataset, names), positions))
    return texts


@lru_cache(maxsize=2)
def _narrow(dataset: GoldDataset, names: tuple[str, ...]) -> GoldDataset:
    return dataset.only(names)


def _only(dataset: GoldDataset, names: Sequence[str]) -> GoldDataset:
    """The same split without its other modalities, which then need not be decoded."""
    return _narrow(dataset, tuple(names))


def names_of(dataset: GoldDataset, kind: str) -> list[str]:
    """The modalities in use of one kind."""
    return [name for name, modality in dataset.modalities.items() if modality.kind == kind]


def _contents(sample: Sample, names: Sequence[str]) -> list[Any]:
    """What the sample has of these modalities."""
    found: list[Any] = []
    for name in names:
        content = sample.contents.get(name)
        if content is not None:
            found += list(content) if isinstance(content, Several) else [content]
    return found


def _stack(
    samples: Sequence[Sample], dataset: GoldDataset, kind: str, function: Callable[[Any], np.ndarray]
) -> np.ndarray:
    """(N, F) float32: the function of each sample's first content of every modality of a kind, NaN where it has none."""
    blocks = []
    for name in names_of(dataset, kind):
        width = len(function(dataset.modalities[name].example()))
        block_NF = np.full((len(samples), width), np.nan, dtype=np.float32)
        for i, sample in enumerate(samples):
            for content in _contents(sample, [name])[:1]:
                block_NF[i] = function(content)
        blocks.append(block_NF)
    return np.concatenate(blocks, axis=1) if blocks else np.zeros((len(samples), 0), dtype=np.float32)


def _numbers(row: Row) -> np.ndarray:
    return np.where(row.observed_K[: len(row.numeric_R)], row.numeric_R, np.nan)


def _categories(samples: Sequence[Sample], dataset: GoldDataset) -> np.ndarray:
    block = _stack(samples, dataset, "tabular", lambda row: cast(Row, row).categories_C)
    return np.nan_to_num(block, nan=0).astype(np.int64)


def cardinalities(dataset: GoldDataset) -> list[int]:
    """Number of ids of each column of `Features.categories_NK`."""
    modalities = [cast(TabularModality, dataset.modalities[name]) for name in names_of(dataset, "tabular")]
    return [int(n) for modality in modalities for n in modality.cardinality]
