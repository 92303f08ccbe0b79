"""Plain features against naive computations in float64."""

from pathlib import Path

import numpy as np

from lanistr.baselines import Subset
from lanistr.baselines.features import COLOURS, THUMBNAIL, features_of, image_statistics, series_statistics
from lanistr.data.reader import GoldDataset
from lanistr.modalities.timeseries import Series
from tests.model.support import make_modalities
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


def test_an_absent_modality_is_unknown_and_rows_follow_the_positions(tmp_path: Path) -> None:
    present = [["image", "tabular"], ["text", "timeseries"], ["image"]]
    gold = write_gold(tmp_path, {"train": 9}, lambda i: present[i % 3])
    dataset = GoldDataset(gold, "train", make_modalities())
    whole = features_of(Subset(dataset, np.arange(9)))
    assert np.isnan(whole.images_NF).all(1).tolist() == [False, True, False] * 3
    assert np.isnan(whole.series_NF).all(1).tolist() == [True, False, True] * 3
    assert (whole.categories_NK[:, 0] == 0).tolist() == [False, True, True] * 3
    some = features_of(Subset(dataset, np.array([2, 5])))
    np.testing.assert_array_equal(some.images_NF, whole.images_NF[[2, 5]])
