"""Plain features of samples."""

from pathlib import Path

import numpy as np

from lanistr.baselines import Subset
from lanistr.baselines.features import features_of
from lanistr.data.reader import GoldDataset
from tests.model.support import make_modalities
from tests.tiny_gold import write_gold


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
