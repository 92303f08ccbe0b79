"""Fine-tuning's classifier input against a loop over samples."""

import itertools
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lanistr.batch import Batch
from lanistr.config import FinetuneConfig
from lanistr.data.loader import Collator
from lanistr.data.samples import Sample
from lanistr.manifest import Target
from lanistr.model.lanistr import build_model
from lanistr.tasks import Finetune, balanced_weights, mean_by_modality, mean_tokens
from tests.model.support import NAMES, RECIPE, make_modalities, random_samples, recipe_with


def naive_pool(rows_TD: torch.Tensor, tokens: dict[str, int], pooling: str) -> torch.Tensor:
    """One sample's fused rows: [CLS], then the tokens of each modality that is there."""
    if pooling == "cls":
        return rows_TD[0]
    if pooling == "mean":
        return rows_TD.mean(0)
    means, start = [rows_TD[0]], 1
    for name in NAMES:
        n = tokens.get(name, 0)
        means.append(rows_TD[start : start + n].mean(0) if n else torch.zeros_like(rows_TD[0]))
        start += n
    assert start == len(rows_TD)
    return torch.cat(means)


def make_batch(
    presence: list[list[str]], labels: list[int], targets: np.ndarray | None = None
) -> tuple[Batch, list[dict[str, Any]]]:
    modalities = make_modalities()
    contents, _ = random_samples(modalities, presence, seed=1)
    samples = [
        Sample(str(i), 0, label, c, target=None if targets is None else targets[i].astype(np.float32))
        for i, (c, label) in enumerate(zip(contents, labels, strict=True))
    ]
    return Collator(modalities, views=1, seed=0)(samples, [1.0] * len(samples), epoch=0), contents


def make_task(target: Target = "class", **finetune: Any) -> Finetune:
    model = build_model(RECIPE.model, make_modalities(), seed=0)
    return Finetune(model, RECIPE.model.fusion.width, 3, FinetuneConfig(**finetune), 0, target).eval()


def test_a_sample_that_has_nothing_leaves_the_gradients_of_a_fresh_model_in_their_range() -> None:
    norms = []
    for presence in ([["text"], ["text"]], [["text"], []]):
        task = make_task()
        batch, _ = make_batch(presence, [0, 1])
        torch.nn.functional.cross_entropy(task.logits(batch)["cls"], torch.tensor([0, 1])).backward()
        gradients = [p.grad for p in task.model.fusion.parameters() if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
    assert max(norms) < 100, norms


@pytest.mark.parametrize("pooling", ["cls", "mean", "modalities"])
def test_classifier_sees_each_samples_own_tokens(pooling: Literal["cls", "mean", "modalities"]) -> None:
    modalities = make_modalities()
    batch, contents = make_batch([["text", "image"], ["tabular"], list(NAMES), []], [0] * 4)
    task = make_task(pooling=pooling)
    fused_TD, _ = task.model(batch)
    bounds = batch.fusion.layout.cu_seqlens.tolist()
    expected = []
    for (start, stop), present in zip(itertools.pairwise(bounds), contents, strict=True):
        tokens = {n: int(modalities[n].collate([c], None, [1.0]).token_counts[0]) for n, c in present.items()}
        expected.append(task.classifier(naive_pool(fused_TD[start:stop], tokens, pooling)))
    assert len(expected) == 4
    np.testing.assert_allclose(task.logits(batch)["cls"].detach(), torch.stack(expected).detach(), atol=1e-5)


def test_a_learnt_token_stands_in_for_an_absent_modality_and_counts_as_no_content_of_it() -> None:
    recipe = recipe_with(**{f"model__modalities__{name}__absent_token": True for name in ("image", "tabular")})
    modalities = make_modalities(recipe)
    presence = [["text"], list(NAMES), ["tabular", "image"], []]
    contents, _ = random_samples(modalities, presence, seed=1)
    samples = [Sample(str(i), 0, 0, c) for i, c in enumerate(contents)]
    batch = Collator(modalities, views=1, seed=0)(samples, [1.0] * 4, epoch=0)
    task = Finetune(
        build_model(recipe.model, modalities, 0), 16, 3, FinetuneConfig(pooling="modalities", unimodal=1.0), 0
    ).eval()
    tokens = [{n: int(modalities[n].collate([c], None, [1.0]).token_counts[0]) for n, c in x.items()} for x in contents]
    stand_ins = [2, 0, 0, 2]
    lengths = batch.fusion.layout.cu_seqlens.diff().tolist()
    assert lengths == [1 + sum(own.values()) + extra for own, extra in zip(tokens, stand_ins, strict=True)]
    rows_TD, _ = task.model.tokens(batch)
    first, last = rows_TD[: lengths[0]], rows_TD[-lengths[3] :]
    learnt_2D = torch.cat([task.model.absent["image"], task.model.absent["tabular"]])
    torch.testing.assert_close(first[-2:], learnt_2D)
    torch.testing.assert_close(last, torch.cat([task.model.fusion.cls, learnt_2D]))
    means_BMD = mean_by_modality(rows_TD, batch, 4)
    torch.testing.assert_close(means_BMD[0, 0], task.model.fusion.cls[0])  # [CLS] alone, without its companions
    assert not means_BMD[0, 2:].any()
    logits = task.logits(batch)
    assert not logits["cls_image"][[0, 3]].any()
    assert logits["cls_image"][[1, 2]].all()
    changed = Finetune(build_model(recipe.model, modalities, 0), 16, 3, FinetuneConfig(pooling="mean"), 0).eval()
    before = changed.logits(batch)["cls"].detach()
    with torch.no_grad():
        changed.model.absent["image"] += torch.arange(16) % 3  # a layer norm does not see a constant
    moved = (changed.logits(batch)["cls"].detach() - before).abs().amax(1) > 1e-6
    assert moved.tolist() == [True, False, False, True], "the token is seen where the image lacks, and only there"


def test_unimodal_classifiers_are_taught_by_the_samples_that_have_the_modality() -> None:
    presence = [["text", "image"], ["tabular", "text"], list(NAMES), ["image"]]
    batch, _ = make_batch(presence, [0, 1, 2, -1])
    task = make_task(unimodal=0.5)
    logits, totals = task.logits(batch), task(batch)
    tokens_TD, _ = task.model.tokens(batch)
    bounds = batch.fusion.layout.cu_seqlens.tolist()
    for m, name in enumerate(NAMES):
        expected = 0.0
        for i, present in enumerate(presence):
            if name not in present:
                assert (logits[f"cls_{name}"][i] == 0).all()
                continue
            rows = [slot - i * 5 for slot in batch.fusion.slot_T[bounds[i] : bounds[i + 1]].tolist()]
            own = tokens_TD[bounds[i] : bounds[i + 1]][torch.tensor([row == m + 1 for row in rows])].mean(0)
            own_C = task.unimodal[name](own)
            torch.testing.assert_close(logits[f"cls_{name}"][i], own_C)
            if batch.labels_B[i] >= 0:
                expected -= own_C.log_softmax(0)[batch.labels_B[i]].item()
        assert float(totals[f"cls_{name}"]) == pytest.approx(expected, rel=1e-5)
        assert batch.counts[f"cls_{name}"] == sum(name in p for p in presence[:3])
    summed = task.classifier(task.model(batch)[0].index_select(0, batch.fusion.cls_S))
    summed = summed + torch.stack([logits[f"cls_{name}"] for name in NAMES]).sum(0)
    torch.testing.assert_close(logits["cls"], summed)


def test_unimodal_classifiers_may_see_what_fusion_makes_of_their_modality_alone() -> None:
    presence = [["text", "image"], ["tabular", "text"], list(NAMES), ["image"], []]
    modalities = make_modalities()
    contents, _ = random_samples(modalities, presence, seed=1)
    task = make_task(pooling="mean", unimodal=1.0, unimodal_on="fused").double()
    batch = collate(modalities, contents, task.alone)
    logits = task.logits(batch)
    summed = task.classifier(mean_tokens(task.model(batch)[0], batch).double())
    for name in NAMES:
        only = [{name: own[name]} if name in own else {} for own in contents]
        narrowed = collate(modalities, only, ())  # the other modalities were never there
        mean_BD = mean_tokens(task.model(narrowed)[0], narrowed).double()
        expected = task.unimodal[name](mean_BD).float()
        for i, present in enumerate(presence):
            torch.testing.assert_close(logits[f"cls_{name}"][i], expected[i] if name in present else torch.zeros(3))
        summed = summed + logits[f"cls_{name}"]
    torch.testing.assert_close(logits["cls"], summed.float())


def collate(modalities: dict[str, Any], contents: list[dict[str, Any]], alone: tuple[str, ...]) -> Batch:
    samples = [Sample(str(i), 0, 0, own) for i, own in enumerate(contents)]
    return Collator(modalities, views=1, seed=0, alone=alone)(samples, [1.0] * len(samples), epoch=0)


@pytest.mark.parametrize("on", ["tokens", "fused"])
def test_gradients_come_in_one_order_whatever_a_batch_lacks(on: str) -> None:
    task = make_task(pooling="mean", unimodal=1.0, unimodal_on=on)
    task.model.drop_heads()
    orders = []
    for presence in ([list(NAMES)] * 2, [["text"], ["text", "tabular"]], [["image"], ["image"]]):
        order: list[str] = []
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
            for name, parameter in task.named_parameters()
        ]
        modalities = make_modalities()
        totals = task(collate(modalities, random_samples(modalities, presence, seed=1)[0], task.alone))
        torch.stack(list(totals.values())).sum().backward()
        orders.append(order)
        for hook in hooks:
            hook.remove()
    assert sorted(orders[0]) == sorted(name for name, _ in task.named_parameters())
    assert orders[1] == orders[2] == orders[0]


def test_the_fused_term_does_not_teach_the_unimodal_classifiers() -> None:
    batch, _ = make_batch([list(NAMES)] * 2, [0, 1])
    task = make_task(unimodal=0.5)
    task(batch)["cls"].backward()
    assert all(p.grad is None for p in task.unimodal.parameters())
    task.zero_grad()
    task(batch)["cls_text"].backward()
    taught = {name for name, p in task.unimodal.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name.split(".")[0] for name in taught} == {"text"}
    assert all(p.grad is None for p in task.classifier.parameters())


NAN = float("nan")


def test_a_sample_of_which_nothing_is_known_is_answered_by_the_labels_shares() -> None:
    presence, labels = [["text"], [], ["image", "tabular"]], np.array([0, 2, 2, 2])
    batch, _ = make_batch(presence, [0, 0, 0])
    task = make_task(unimodal=1.0)
    before = task.predict(batch)
    task.fit(labels, np.zeros((4, 0)), "none")
    found = task.predict(batch)
    np.testing.assert_allclose(found[1], [2 / 7, 1 / 7, 4 / 7], rtol=1e-6)  # one more of each
    torch.testing.assert_close(found[[0, 2]], before[[0, 2]])
    assert "prior" in task.state_dict()

    several = make_task("multilabel")
    several.fit(np.zeros(3, dtype=int), np.array([[1, 0, NAN], [1, 0, NAN], [0, NAN, NAN]]), "none")
    np.testing.assert_allclose(several.predict(batch)[1], [3 / 5, 1 / 4, 1 / 2], rtol=1e-6)
    numbers = make_task("regression")
    numbers.fit(np.zeros(2, dtype=int), np.array([[10.0, NAN, 5.0], [30.0, 1.0, 5.0]]), "none")
    np.testing.assert_allclose(numbers.predict(batch)[1], [20, 1, 5], rtol=1e-6)


def test_multilabel_loss_is_the_mean_over_labels_of_known_cells() -> None:
    truth = np.array([[1, 0, NAN], [0, 0, 1], [NAN, NAN, NAN]])
    batch, _ = make_batch([["text"], ["image"], ["text"]], [0, 0, -1], truth)
    task = make_task("multilabel")
    task.fit(batch.labels_B[:2].numpy(), truth[:2], [2.0, 1.0, 3.0])
    logits = task.logits(batch)["cls"].double()
    expected = 0.0
    for i, j in itertools.product(range(3), range(3)):
        p = torch.sigmoid(logits[i, j]).item()
        if truth[i, j] == 1:
            expected -= [2.0, 1.0, 3.0][j] * np.log(p) / 3
        elif truth[i, j] == 0:
            expected -= np.log(1 - p) / 3
    assert task(batch)["cls"].item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(task.predict(batch), torch.sigmoid(logits).float().detach(), atol=1e-6)


def test_numbers_are_learnt_standardised_and_predicted_in_their_own_unit() -> None:
    truth = np.array([[10.0, NAN, 5.0], [30.0, 1.0, 5.0]])
    batch, _ = make_batch([["text"], ["image"]], [0, 0], truth)
    task = make_task("regression")
    task.fit(np.zeros(2, dtype=int), truth, "none")
    logits = task.logits(batch)["cls"]
    predicted = task.predict(batch)
    np.testing.assert_allclose(predicted[:, 0], 20 + 10 * logits[:, 0].detach(), rtol=1e-5)
    np.testing.assert_allclose(predicted[:, 2], 5 + logits[:, 2].detach(), rtol=1e-5)  # a constant has deviation 1
    scaled = (predicted.double() - torch.from_numpy(truth)) / torch.tensor([10.0, 1.0, 1.0])
    assert task(batch)["cls"].item() == pytest.approx(scaled.square().nansum().item() / 3, rel=1e-4)
    assert {"target_mean", "target_std"} <= task.state_dict().keys()
    with pytest.raises(ValueError, match="has no classes"):
        task.fit(np.zeros(2, dtype=int), truth, "balanced")


def test_class_weights_scale_each_samples_loss() -> None:
    batch, _ = make_batch([["text"], ["image"], ["text", "tabular"]], [0, 2, 2])
    plain, weighted = make_task(), make_task()
    weighted.fit(batch.labels_B.numpy(), np.zeros((3, 0)), "balanced")
    losses = torch.nn.functional.cross_entropy(plain.logits(batch)["cls"], batch.labels_B, reduction="none")
    expected = (losses * torch.tensor([1.0, 0.5, 0.5])).sum()  # 3 / (3 * 1), 3 / (3 * 2)
    torch.testing.assert_close(weighted(batch)["cls"], expected)
    with pytest.raises(ValueError, match="2 weights for 3 classes"):
        plain.fit(batch.labels_B.numpy(), np.zeros((3, 0)), [1.0, 2.0])


def test_balanced_weights_equal_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.utils.class_weight")
    labels = np.random.default_rng(0).integers(0, 4, 50)
    theirs = sklearn.compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(balanced_weights(labels, np.zeros((50, 0)), 4), theirs)


@pytest.mark.parametrize("parts", [["text"], ["projections"], ["fusion", "image"], []])
def test_only_the_named_parts_are_frozen_and_in_eval_mode(parts: list[str]) -> None:
    task = make_task(freeze=parts).train()
    task.freeze(FinetuneConfig(freeze=parts).frozen(NAMES))
    prefixes = {name: f"model.encoders.{name}.encoder." for name in NAMES} | {"fusion": "model.fusion."}
    for name, parameter in task.named_parameters():
        of = [p for p in parts if p in prefixes and name.startswith(prefixes[p])]
        of += ["projections"] * ("projections" in parts and name.split(".")[3:4] == ["projection"])
        assert parameter.requires_grad == (not of), name
    assert task.model.fusion.training == ("fusion" not in parts)
    assert task.model.encoder("text").encoder.training == ("text" not in parts)
    with pytest.raises(ValueError, match="no part 'sound'"):
        FinetuneConfig(freeze=["sound"]).frozen(NAMES)
