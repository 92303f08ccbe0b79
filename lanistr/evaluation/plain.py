"""What plain statistics say of a content, without any encoder: the least that a probe should be able to read.

Shape suffixes: N samples, F features, V tokens of the vocabulary, K dimensions, T steps, C variables.
"""

from collections.abc import Sequence

import numpy as np

from lanistr.data.reader import GoldDataset
from lanistr.data.samples import Several, intact, read_samples
from lanistr.modalities.timeseries import Series

THUMBNAIL = 4  # pixels a side
COLOURS = 3  # bins per channel of the colour histogram
WORDS, RARE, COMMON = 2000, 3, 0.9  # at most so many tokens, in so many texts at least, in such a share of them at most
DIMENSIONS = 50  # of the vectors of tokens


def plain_features(dataset: GoldDataset, positions: np.ndarray) -> dict[str, np.ndarray]:
    """Per modality that has some, (N, F): zeros where it is absent. Labels are not looked at.

    Raises:
        ValueError: a sample that cannot be read.
    """
    found = {}
    for name, modality in dataset.modalities.items():
        if modality.kind not in ("text", "image", "timeseries"):
            continue
        contents = read_contents(dataset, name, positions)
        if modality.kind == "text":
            found[name] = word_vectors([np.concatenate(several) if several else None for several in contents])
        else:
            function = image_statistics if modality.kind == "image" else series_statistics
            found[name] = _standardise([function(several[0]) if several else None for several in contents])
    return found


def read_contents(dataset: GoldDataset, name: str, positions: np.ndarray) -> list[Sequence]:
    """What each sample has of one modality: none, one or several contents."""
    own = GoldDataset(dataset.path, dataset.split, {name: dataset.modalities[name]}, store=dataset.store)
    samples = intact(read_samples(own, positions.tolist()))
    found = [sample.contents.get(name, Several()) for sample in samples]
    return [one if isinstance(one, Several) else [one] for one in found]


def word_vectors(texts: Sequence[np.ndarray | None]) -> np.ndarray:
    """(N, K): mean over a text's different tokens of their vectors, weighted by rarity (idf); zeros where there is none.

    Tokens that occur in the same texts get similar vectors: the leading eigenvectors of their positive pointwise mutual
    information (Levy and Goldberg 2014), counted in these texts. So a few labels tell of a word that none of them has.

    Args:
        texts: token ids.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import eigsh

    ids = [np.unique(text) if text is not None else np.zeros(0, dtype=np.int64) for text in texts]
    there = sum(text is not None for text in texts)
    tokens, frequency = np.unique(np.concatenate(ids), return_counts=True)
    telling = (frequency >= RARE) & (frequency <= COMMON * there)
    tokens, frequency = tokens[telling], frequency[telling]
    kept = np.sort(np.argsort(-frequency, kind="stable")[:WORDS])
    tokens, frequency = tokens[kept], frequency[kept]
    if len(tokens) <= 2:
        return np.zeros((len(texts), 1))
    columns = [np.flatnonzero(np.isin(tokens, own)) for own in ids]
    rows = np.repeat(np.arange(len(texts)), [len(own) for own in columns])
    seen_NV = csr_matrix((np.ones(len(rows)), (rows, np.concatenate(columns))), shape=(len(texts), len(tokens)))
    together_VV = (seen_NV.T @ seen_NV).toarray()
    np.fill_diagonal(together_VV, 0)
    chance_VV = np.outer(frequency, frequency) / there
    information_VV = np.where(together_VV > 1, np.log(np.maximum(together_VV, 1) / chance_VV), 0).clip(0)
    k = min(DIMENSIONS, len(tokens) - 1)
    values_K, vectors_VK = eigsh(csr_matrix(information_VV), k=k, which="LA", v0=np.ones(len(tokens)))
    weighted_NV = seen_NV.multiply(np.log(there / frequency)).tocsr()
    norms_N = np.sqrt(weighted_NV.multiply(weighted_NV).sum(1)).A1 if len(texts) else np.zeros(0)
    vectors_NK = weighted_NV @ (vectors_VK * np.sqrt(values_K.clip(0)))
    return vectors_NK / np.maximum(norms_N, 1e-12)[:, None]


def _standardise(rows: Sequence[np.ndarray | None]) -> np.ndarray:
    """(N, F): over the rows that are there; unknown values have the mean."""
    width = next((len(row) for row in rows if row is not None), 1)
    block_NF = np.array([np.full(width, np.nan) if row is None else row for row in rows], dtype=np.float64)
    known_NF = np.isfinite(block_NF)
    count_F = np.maximum(known_NF.sum(0), 1)
    centred_NF = np.where(known_NF, block_NF - np.where(known_NF, block_NF, 0).sum(0) / count_F, 0)
    deviation_F = np.sqrt((centred_NF**2).sum(0) / count_F)
    return centred_NF / np.where(deviation_F > 1e-8, deviation_F, 1)


def image_statistics(pixels_HWC: np.ndarray) -> np.ndarray:
    """(F,) in [0, 1]: thumbnail, mean and spread of each channel, and colour histogram.

    Args:
        pixels_HWC: uint8, at least `THUMBNAIL` pixels a side.
    """
    scaled = pixels_HWC.astype(np.float32) / 255
    rows, columns = (np.array_split(np.arange(n), THUMBNAIL) for n in scaled.shape[:2])
    thumbnail = np.array([[scaled[np.ix_(r, c)].mean((0, 1)) for c in columns] for r in rows])
    bins = np.minimum((scaled * COLOURS).astype(np.int64), COLOURS - 1) @ np.array([COLOURS**2, COLOURS, 1])
    histogram = np.bincount(bins.ravel(), minlength=COLOURS**3) / bins.size
    return np.concatenate([thumbnail.ravel(), scaled.mean((0, 1)), scaled.std((0, 1)), histogram])


def series_statistics(series: Series) -> np.ndarray:
    """(7 C,): of every variable mean, spread, least, greatest, first and last value and share observed; NaN = unknown."""
    found = []
    for values_T, observed_T in zip(series.values_tC.T, series.observed_tC.T, strict=True):
        known = values_T[observed_T]
        if len(known):
            found.append([known.mean(), known.std(), known.min(), known.max(), known[0], known[-1], observed_T.mean()])
        else:
            found.append([np.nan] * 6 + [0.0])
    return np.array(found, dtype=np.float32).ravel()
