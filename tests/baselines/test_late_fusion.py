"""LateFusion and MedFuse: what is planted is found, what is absent does not matter, the LSTM is the one of a loop."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lanistr.baselines import Method, Subset
from lanistr.baselines.late_fusion import Encoders, LateFusion, LateFusionMethod
from lanistr.baselines.medfuse import MedFuse, MedFuseMethod, last_hidden
from lanistr.baselines.trainer import predict
from lanistr.config import Recipe
from lanistr.data.loader import Collator
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import intact, read_samples
from lanistr.metrics import accuracy
from tests.baselines.planted import CHANCE, planted_recipe, planted_splits
from tests.model.support import make_modalities

METHODS: dict[str, Callable[[Recipe], Method]] = {
    "late_fusion": LateFusionMethod,
    "medfuse": lambda recipe: MedFuseMethod(recipe, ("image", "timeseries")),
    "medfuse_all": lambda recipe: MedFuseMethod(recipe, None),
}


@pytest.mark.parametrize("name", METHODS)
def test_beats_chance_and_repeats_itself(tmp_path: Path, name: str) -> None:
    splits = planted_splits(tmp_path)
    first, second = (METHODS[name](planted_recipe()).fit(splits.draw(72, 1), splits.val, 1) for _ in range(2))
    found_NC = first(splits.test)
    np.testing.assert_allclose(found_NC.sum(1), 1, atol=1e-6)
    assert accuracy(found_NC, splits.test.labels_N) > CHANCE + 0.3
    np.testing.assert_array_equal(found_NC, second(splits.test))


def make_task(splits: Any, kind: str) -> Any:
    torch.manual_seed(0)
    encoders = Encoders.build(planted_recipe(), splits.train.modalities, "cpu")
    if kind == "late":
        return LateFusion(encoders, 3, planted_recipe())
    return MedFuse(encoders, 16, 3, [3, 0, 2, 1])


@pytest.mark.parametrize("kind", ["late", "medfuse"])
def test_neither_other_samples_nor_the_content_of_dummies_matter(tmp_path: Path, kind: str) -> None:
    splits = planted_splits(tmp_path)
    task = make_task(splits, kind).eval()
    together_NC = predict(task, splits.test, torch.device("cpu"))
    alone_NC = np.concatenate(
        [
            predict(task, Subset(splits.test.dataset, splits.test.positions_N[i : i + 1]), torch.device("cpu"))
            for i in range(len(splits.test))
        ]
    )
    np.testing.assert_allclose(alone_NC, together_NC, atol=1e-6)

    base: Any = type(make_modalities()["image"])

    class Other(base):
        def dummy(self) -> np.ndarray:
            return np.full_like(super().dummy(), 7)

    modalities = dict(splits.train.modalities)
    ours = modalities["image"]
    modalities["image"] = Other("image", ours.block, splits.train.manifest.modalities["image"])
    without = next(
        i for i in range(48) if not splits.test.dataset.presence[i] & splits.test.dataset.index.bits["image"]
    )
    dataset = GoldDataset(splits.train.path, "test", modalities)
    found = predict(task, Subset(dataset, np.array([without])), torch.device("cpu"))
    np.testing.assert_array_equal(found[0], alone_NC[without])


def test_an_absent_modality_is_zeros_and_a_present_one_the_mean_of_its_tokens(tmp_path: Path) -> None:
    splits = planted_splits(tmp_path)
    dataset, encoders = splits.train, make_task(splits, "late").eval().encoders
    samples = intact(read_samples(dataset, list(range(9))))
    batch = Collator(dataset.modalities, views=1, seed=0)(samples, [1.0] * 9, 0)
    with torch.no_grad():
        vectors_BMD, present_BM = encoders(batch), encoders.present(batch)
        for m, (name, modality) in enumerate(dataset.modalities.items()):
            for i, sample in enumerate(samples):
                assert present_BM[i, m] == (name in sample.contents)
                if name not in sample.contents:
                    assert (vectors_BMD[i, m] == 0).all()
                    continue
                inputs = modality.collate([sample.contents[name]], None, [1.0]).inputs
                encoder = encoders.encoders[name]
                expected_D = encoder.project(encoder.encode(inputs), inputs).mean(0)
                torch.testing.assert_close(vectors_BMD[i, m], expected_D, atol=1e-5, rtol=1e-4)


def test_the_lstm_runs_over_present_vectors_only() -> None:
    torch.manual_seed(0)
    lstm: Any = nn.LSTM(4, 4, batch_first=True).double()
    vectors_BMD = torch.randn(8, 3, 4, dtype=torch.float64)
    present_BM = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)], dtype=torch.float32)
    found_BD = last_hidden(lstm, vectors_BMD, present_BM)
    assert (found_BD[0] == 0).all()
    for i in range(1, 8):
        h, c = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for m in range(3):
            if not present_BM[i, m]:
                continue
            gates = lstm.weight_ih_l0 @ vectors_BMD[i, m] + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
            inner, forget, cell, out = gates.chunk(4)
            c = forget.sigmoid() * c + inner.sigmoid() * cell.tanh()
            h = out.sigmoid() * c.tanh()
        torch.testing.assert_close(found_BD[i], h)
    changed_BMD = torch.where(present_BM[..., None] > 0, vectors_BMD, 99.0)
    torch.testing.assert_close(last_hidden(lstm, changed_BMD, present_BM), found_BD, rtol=0, atol=0)


def test_stage_1_leaves_the_images_encoder_as_it_was_and_trains_the_others(tmp_path: Path) -> None:
    recipe = planted_recipe(finetune__lr=1e-2)
    splits = planted_splits(tmp_path, recipe=recipe)
    seen: list[str] = []
    import lanistr.baselines.medfuse as module

    original = module._train_alone

    def spy(name: str, task: LateFusion, *rest: Any) -> None:
        before = {n: p.detach().clone() for n, p in task.named_parameters()}
        original(name, task, *rest)
        assert any(not torch.equal(before[n], p) for n, p in task.named_parameters() if "encoders" in n)
        seen.append(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_train_alone", spy)
        MedFuseMethod(recipe, None).fit(splits.draw(24, 0), replace(splits.val), 0)
    assert seen == ["text", "tabular", "timeseries"]


@pytest.mark.parametrize("kind", ["late", "medfuse"])
def test_a_token_for_absent_modalities_is_lanistrs_alone(tmp_path: Path, kind: str) -> None:
    with_token = planted_recipe(model__modalities__image__absent_token=True, model__modalities__text__absent_token=True)
    plain, other = (planted_splits(tmp_path / str(i), recipe=r) for i, r in enumerate((planted_recipe(), with_token)))
    task = make_task(plain, kind)
    expected, found = (predict(task, splits.test, torch.device("cpu")) for splits in (plain, other))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["late_fusion", "medfuse_all"])
def test_freezing_what_was_never_trained_is_refused(name: str, tmp_path: Path) -> None:
    recipe = planted_recipe(pretrain__freeze=["text"])
    splits = planted_splits(tmp_path, recipe=recipe)
    with pytest.raises(ValueError, match="text was never trained"):
        METHODS[name](recipe).fit(splits.draw(24, 0), splits.val, 0)
