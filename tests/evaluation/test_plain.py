"""Plain features against naive computations in float64."""

from pathlib import Path

import numpy as np

from lanistr.data.reader import GoldDataset
from lanistr.evaluation.plain import (
    COLOURS,
    THUMBNAIL,
    image_statistics,
    plain_features,
    series_statistics,
    word_vectors,
)
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from lanistr.modalities.timeseries import Series
from tests.model.support import RECIPE
from tests.tiny_gold import write_gold


def test_image_statistics_are_those_of_a_loop_over_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    found = image_statistics(pixels)
    cells = [
        pixels[2 * r : 2 * r + 2, 2 * c : 2 * c + 2, k].astype(np.float64).mean() / 255
        for r in range(THUMBNAIL)
        for c in range(THUMBNAIL)
        for k in range(3)
    ]
    channels = [pixels[..., k].astype(np.float64) / 255 for k in range(3)]
    histogram = np.zeros((COLOURS, COLOURS, COLOURS))
    for r in range(8):
        for c in range(8):
            histogram[tuple(min(int(v / 255 * COLOURS), COLOURS - 1) for v in pixels[r, c].tolist())] += 1 / 64
    expected = [*cells, *(c.mean() for c in channels), *(c.std() for c in channels), *histogram.ravel()]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_series_statistics_see_observed_values_only() -> None:
    values = np.array([[5.0, 1.0], [7.0, 2.0], [100.0, 3.0]], dtype=np.float32)
    observed = np.array([[True, False], [True, False], [False, False]])
    found = series_statistics(Series(values, observed)).reshape(2, 7)
    np.testing.assert_allclose(found[0], [6, 1, 5, 7, 5, 7, 2 / 3], rtol=1e-6)
    assert np.isnan(found[1, :6]).all()
    assert found[1, 6] == 0


def naive_similarity(texts: list[list[int]]) -> np.ndarray:
    """Inner products of texts, each the idf-weighted mean of its tokens, in the positive semidefinite part of their PMI."""
    tokens = [t for t in range(30) if 3 <= sum(t in text for text in texts) <= 0.9 * len(texts)]
    count = {t: sum(t in text for text in texts) for t in tokens}
    information = np.zeros((len(tokens), len(tokens)))
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            both = sum(a in text and b in text for text in texts)
            if i != j and both >= 2:
                information[i, j] = max(0.0, np.log(both * len(texts) / (count[a] * count[b])))
    values, vectors = np.linalg.eigh(information)
    positive = (vectors * values.clip(0)) @ vectors.T
    rows = np.array([[np.log(len(texts) / count[t]) * (t in text) for t in tokens] for text in texts])
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows @ positive @ rows.T


def test_word_vectors_are_those_of_counted_mutual_information() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.choice(30, size=int(rng.integers(1, 8))).tolist() for _ in range(80)]
    found = word_vectors([np.array(text) for text in texts])
    np.testing.assert_allclose(found @ found.T, naive_similarity(texts), atol=1e-8)


def test_texts_without_a_common_word_are_alike_when_their_words_keep_the_same_company() -> None:
    rng = np.random.default_rng(0)
    texts: list[np.ndarray | None] = [rng.choice(np.arange(10) + 10 * (i % 2), 4, replace=False) for i in range(200)]
    found = word_vectors([*texts, np.array([0, 1]), np.array([8, 9]), np.array([18, 19]), None])
    first, same, other, none = found[-4:]
    assert first @ same > 0.5 * (first @ first)
    assert abs(first @ other) < 0.1 * (first @ first)
    assert not none.any()


def test_texts_of_which_nothing_recurs_tell_nothing() -> None:
    assert not word_vectors([np.array([i]) for i in range(5)]).any()


def test_features_are_of_the_modalities_that_have_some_and_rows_follow_the_positions(tmp_path: Path) -> None:
    present = [["image", "tabular"], ["text", "timeseries"], ["image"]]
    gold = write_gold(tmp_path, {"train": 9}, lambda i: present[i % 3])
    dataset = GoldDataset(gold, "train", make_modalities(Manifest.load(gold), RECIPE.model.modalities))
    found = plain_features(dataset, np.array([5, 1, 0]))
    assert set(found) == {"text", "image", "timeseries"}
    assert found["image"].any(1).tolist() == [True, False, True]
    assert not found["timeseries"][[0, 2]].any()
    assert all(np.isfinite(block).all() for block in found.values())
