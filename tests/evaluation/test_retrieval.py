"""Nearest neighbours against scikit-learn, and a query by part of a sample."""

from pathlib import Path

import numpy as np
import pytest

from lanistr.data.loader import Collator
from lanistr.data.reader import GoldDataset
from lanistr.evaluation.embed import embed, embed_batch
from lanistr.evaluation.retrieval import Gallery, mean_reciprocal_rank, precision_at, recall_at
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from lanistr.model.lanistr import build_model
from tests.model.support import NAMES, RECIPE
from tests.tiny_gold import write_gold


def test_neighbours_equal_scikit_learn() -> None:
    neighbours = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(80, 6)), rng.normal(size=(25, 6))
    theirs = neighbours.NearestNeighbors(n_neighbors=7, metric="cosine").fit(gallery)
    distance, positions = theirs.kneighbors(queries)
    found = Gallery(gallery).search(queries, 7, batch=4)
    np.testing.assert_array_equal(found.positions_QK, positions)
    np.testing.assert_allclose(found.similarity_QK, 1 - distance, atol=1e-5)


def test_scores_equal_a_loop() -> None:
    rng = np.random.default_rng(1)
    gallery = rng.normal(size=(30, 4))
    queries = gallery[:20] + rng.normal(size=(20, 4))
    labels = rng.integers(0, 3, 30)
    found = Gallery(gallery).search(queries, 30)
    target = np.arange(20)
    ranks = [found.positions_QK[q].tolist().index(q) + 1 for q in range(20)]
    assert recall_at(found, target, 5) == pytest.approx(np.mean([rank <= 5 for rank in ranks]))
    assert mean_reciprocal_rank(found, target) == pytest.approx(np.mean([1 / rank for rank in ranks]))
    same = [[labels[p] == labels[q] for p in found.positions_QK[q, :4]] for q in range(20)]
    assert precision_at(found, labels[:20], labels, 4) == pytest.approx(np.mean(same))


def test_a_sample_is_found_by_itself_and_a_part_of_it_may_ask(tmp_path: Path) -> None:
    gold = write_gold(tmp_path / "gold", {"train": 12}, lambda i: list(NAMES))
    modalities = make_modalities(Manifest.load(gold), RECIPE.model.modalities)
    model = build_model(RECIPE.model, modalities, seed=0)
    positions = np.arange(12)
    whole = embed(model, GoldDataset(gold, "train", modalities), positions)
    gallery = Gallery(whole.fused_ND)
    assert recall_at(gallery.search(whole.fused_ND, 1), positions, 1) == 1
    assert len(set(gallery.search(whole.fused_ND, 3).positions_QK[:, 0].tolist())) == 12
    dataset = GoldDataset(gold, "train", modalities)
    texts = [sample._replace(contents={"text": sample.contents["text"]}) for sample in map(dataset.read, range(12))]
    asked = embed_batch(model, Collator(modalities, views=1, seed=0)(texts, [1.0] * 12, 0))
    assert np.isfinite(asked.fused_ND).all()
    assert Gallery(whole.fused_ND).search(asked.fused_ND, 5).positions_QK.shape == (12, 5)
    by_text = Gallery(whole.modalities["text"]).search(asked.modalities["text"], 1)
    assert recall_at(by_text, positions, 1) == 1, "a text is the same with and without the rest of its sample"
    with pytest.raises(ValueError, match="not finite"):
        gallery.search(np.full((1, 16), np.nan), 1)
    with pytest.raises(ValueError, match="the width 16"):
        gallery.search(np.zeros((1, 3)), 1)
    with pytest.raises(ValueError, match="nothing to search in"):
        Gallery(np.zeros((0, 4)))
