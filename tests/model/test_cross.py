"""The cross-modal objective against a loop over samples, and what is frozen in pretraining."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lanistr.batch import Batch
from lanistr.config import Recipe
from lanistr.data.hiding import HidingDataset
from lanistr.data.loader import Collator
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import intact, read_samples
from lanistr.losses import cross_modal_loss
from lanistr.tasks import CrossModal, Pretrain
from lanistr.training.features import cache_features
from tests.model.support import NAMES, make_modalities, make_pretrain, recipe_with
from tests.tiny_gold import write_gold

CROSS = ("text", "image", "tabular")
PATTERNS: list[tuple[str, ...]] = [NAMES, ("text", "tabular"), ("image",), ("text", "image"), ("tabular", "timeseries")]


def tiny(folder: Path) -> GoldDataset:
    gold = write_gold(folder / "gold", {"train": 10, "val": 4}, lambda i: PATTERNS[i % len(PATTERNS)])
    return GoldDataset(gold, "train", make_modalities())


def batch_of(dataset: GoldDataset, views: int, weights: list[float] | None = None) -> Batch:
    samples = intact(read_samples(dataset, list(range(dataset.n))))
    return Collator(dataset.modalities, views=views, seed=0, alone=CROSS)(samples, weights or [1.0] * dataset.n, 0)


def crossing(dataset: GoldDataset, frozen: tuple[str, ...] = ()) -> tuple[Pretrain, Recipe]:
    recipe = recipe_with(objective__cross=list(CROSS))
    return make_pretrain(dataset.modalities, recipe=recipe), recipe


def alone(task: Pretrain, dataset: GoldDataset, name: str) -> tuple[Tensor, Tensor]:
    """Per sample, mean fused token and mean hidden state where nothing but one modality was ever read."""
    others = {other: 1.0 for other in dataset.modalities if other != name}
    fused, hidden = [], []
    for i in range(dataset.n):
        samples = intact(read_samples(HidingDataset(dataset, others, 0), [i]))
        batch = Collator(dataset.modalities, views=1, seed=0)(samples, [1.0], 0)
        rows, states = task.model(batch)
        fused.append(rows.mean(0))
        hidden.append(states[name].mean(0))
    return torch.stack(fused), torch.stack(hidden)


@torch.no_grad()
def test_the_objective_is_that_of_a_loop_over_samples_that_have_one_modality_each(tmp_path: Path) -> None:
    dataset = tiny(tmp_path)
    task, _ = crossing(dataset)
    task.eval()
    weights = [1.0] * 9 + [0.0]
    batch = batch_of(dataset, 2, weights)
    cross = task.cross
    assert isinstance(cross, CrossModal)
    fused, hidden = {}, {}
    for name in CROSS:
        fused[name], hidden[name] = alone(task, dataset, name)
    expected, pairs = 0.0, 0
    for a, b in itertools.permutations(CROSS, 2):
        both = [i for i in range(9) if {a, b} <= set(PATTERNS[i % len(PATTERNS)])]
        centre = hidden[b][both].mean(0)
        for i in both:
            predicted = cross.predictors[f"{a}_{b}"](fused[a][i])
            expected -= torch.cosine_similarity(predicted, hidden[b][i] - centre, dim=0).item()
        pairs += len(both)
    assert batch.counts["cross"] == pairs > 0
    assert task(batch)["cross"].item() == pytest.approx(expected, abs=1e-4)


def test_the_target_learns_nothing_and_who_lacks_one_of_both_counts_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.randn(4, 3, generator=generator, requires_grad=True) for _ in range(2))
    loss = cross_modal_loss(predicted, target, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    loss.backward()
    assert target.grad is None
    assert predicted.grad is not None
    assert predicted.grad[2].abs().sum() == 0
    assert (predicted.grad[[0, 1, 3]].abs().sum(1) > 0).all()


def test_every_parameter_has_a_gradient_whoever_is_there(tmp_path: Path) -> None:
    dataset = tiny(tmp_path)
    for presence in (("text",), ("image", "timeseries"), NAMES):
        others = {name: 1.0 for name in dataset.modalities if name not in presence}
        hidden = HidingDataset(dataset, others, 0)
        hidden.n = 2
        task, _ = crossing(dataset)
        torch.stack(list(task(batch_of(hidden, 2)).values())).sum().backward()
        assert not [name for name, p in task.named_parameters() if p.grad is None], presence


def test_names_that_are_not_there_are_refused(tmp_path: Path) -> None:
    dataset = tiny(tmp_path)
    for names in (["text"], ["text", "sound"]):
        with pytest.raises(ValueError, match=r"objective\.cross"):
            make_pretrain(dataset.modalities, recipe=recipe_with(objective__cross=names))


def test_a_frozen_encoder_has_no_masked_loss_and_its_cache_is_what_it_says_of_clean_samples(tmp_path: Path) -> None:
    dataset = tiny(tmp_path)
    recipe = recipe_with(objective__cross=list(CROSS), pretrain__cache=True, pretrain__freeze=["text"])
    val = GoldDataset(dataset.path, "val", dataset.modalities)
    model = make_pretrain(dataset.modalities, recipe=recipe).model
    task = Pretrain(model, dataset.modalities, recipe.model.fusion, recipe.objective, 0, ["text"])
    wanted = {"train": np.arange(dataset.n), "val": np.arange(val.n)}
    splits = {"train": dataset, "val": val}
    cached = cache_features(
        model, recipe.pretrain, ["text"], splits, wanted, tmp_path, torch.device("cpu"), 0
    )["train"]  # fmt: skip
    totals = task(batch_of(cached, 2))
    assert "mlm" not in totals
    torch.stack(list(totals.values())).sum().backward()
    missing = {name for name, p in task.named_parameters() if p.grad is None}
    assert missing == {
        f"model.encoders.text.encoder.{name}" for name, _ in model.encoder("text").encoder.named_parameters()
    }
    with torch.no_grad():
        plain, _ = task.model(batch_of(dataset, 1))
        both, _ = task.model(batch_of(cached, 2))
    unmasked = [i for i in range(dataset.n) if "text" in PATTERNS[i % len(PATTERNS)]]
    assert unmasked
    torch.testing.assert_close(both.chunk(2)[0], plain, rtol=1e-4, atol=1e-5)
