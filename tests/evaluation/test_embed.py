"""Embeddings against a loop over samples, one at a time."""

from pathlib import Path

import numpy as np
import torch

from lanistr.data.loader import Collator
from lanistr.data.reader import GoldDataset
from lanistr.evaluation.embed import embed
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from lanistr.model.lanistr import Lanistr, build_model
from tests.model.support import NAMES, RECIPE, recipe_with
from tests.tiny_gold import write_gold


def present(i: int) -> list[str]:
    return [name for bit, name in enumerate(NAMES) if (i % 16) >> bit & 1] or ["text"]


def tiny(tmp_path: Path, **changes: str) -> tuple[GoldDataset, Lanistr]:
    gold = write_gold(tmp_path / "gold", {"train": 20}, present)
    recipe = recipe_with(**changes) if changes else RECIPE
    modalities = make_modalities(Manifest.load(gold), recipe.model.modalities)
    model = build_model(recipe.model, modalities, seed=0).eval()
    with torch.no_grad():
        model.fusion.cls.normal_(generator=torch.Generator().manual_seed(0))
    return GoldDataset(gold, "train", modalities), model


@torch.no_grad()
def one_by_one(dataset: GoldDataset, model: Lanistr, position: int) -> dict[str, np.ndarray]:
    sample = dataset.read(position)
    batch = Collator(dataset.modalities, views=1, seed=0)([sample], [1.0], 0)
    fused, hidden = model(batch)
    found = {"cls": fused[0], "fused": fused.mean(0)}
    for name in sample.contents:
        rows = hidden[name]
        if name == "text" and batch.inputs[name].first_S is not None:
            rows = rows[:1]
        found[name] = rows.float().mean(0)
    return {name: value.numpy() for name, value in found.items()}


def check(dataset: GoldDataset, model: Lanistr) -> None:
    positions = np.array([3, 19, 0, 7, 15, 8, 12])
    found = embed(model, dataset, positions, batch=3)
    assert found.keys == tuple(dataset.keys[p] for p in positions)
    for row, position in enumerate(positions):
        expected = one_by_one(dataset, model, int(position))
        np.testing.assert_allclose(found.cls_ND[row], expected["cls"], atol=1e-5)
        np.testing.assert_allclose(found.fused_ND[row], expected["fused"], atol=1e-5)
        for name in NAMES:
            assert found.present[name][row] == (name in expected)
            if name in expected:
                np.testing.assert_allclose(found.modalities[name][row], expected[name], atol=1e-5)
            else:
                assert np.isnan(found.modalities[name][row]).all()


def test_embeddings_are_the_means_of_each_samples_own_rows(tmp_path: Path) -> None:
    check(*tiny(tmp_path))


def test_text_of_which_only_cls_enters_fusion_is_embedded_by_it(tmp_path: Path) -> None:
    check(*tiny(tmp_path, model__modalities__text__fusion_tokens="cls"))
