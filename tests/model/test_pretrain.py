"""The packed pretraining step against the padded oracle, and the law of equal work."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lanistr.config import Recipe
from lanistr.modalities.timeseries import Series
from tests.model.padded_oracle import oracle_terms
from tests.model.support import (
    NAMES,
    RECIPE,
    make_batch,
    make_modalities,
    make_pretrain,
    random_samples,
    recipe_with,
    total_loss,
)

PATTERNS = st.lists(st.lists(st.sampled_from(NAMES), unique=True, max_size=4), min_size=1, max_size=5)


def gradients(task: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


@settings(max_examples=25)
@given(presence=PATTERNS, seed=st.integers(0, 1000))
@example(presence=[list(NAMES[:3]), [], list(NAMES[:3]), list(NAMES[:3])], seed=715)
def test_packed_equals_padded_with_mask_in_every_loss_and_gradient(presence: list, seed: int) -> None:
    assert_equals_oracle(RECIPE, presence, seed)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__modalities__text__fusion_tokens": "cls"},
        {"objective__similarity": "cls"},
        {"model__modalities__text__corruption": "bert"},
        {"model__checkpoint_activations": True},
        {f"model__modalities__{name}__absent_token": True for name in NAMES},
        {f"model__modalities__{name}__absent_token": True for name in ("image", "timeseries")},
        {"model__modalities__tabular__column_tokens": True},
    ],
    ids=[
        "text cls in fusion",
        "SimMMM over cls",
        "80/10/10",
        "activation checkpointing",
        "absent tokens",
        "two of them",
        "column tokens",
    ],
)
def test_switches_equal_the_oracle_too(changes: dict) -> None:
    assert_equals_oracle(recipe_with(**changes), [NAMES, ("text", "tabular"), ("image",), ()], 7)


def assert_equals_oracle(recipe: Recipe, presence: Sequence[Sequence[str]], seed: int) -> None:
    modalities = make_modalities(recipe)
    # In float32 the batch norms of a TabNet that sees two or three rows are 1e-4 apart by another order of sums alone.
    task = make_pretrain(modalities, recipe=recipe).double()
    contents, masks = random_samples(modalities, presence, seed)
    loss, terms = total_loss(task, make_batch(modalities, contents, masks))
    loss.backward()
    packed = gradients(task)

    expected = oracle_terms(task, modalities, contents, masks)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), value.double(), rtol=1e-6, atol=1e-6)
    torch.stack([task.weights[name] * value for name, value in expected.items()]).sum().backward()
    for name, parameter in task.named_parameters():
        oracle = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(packed[name], oracle, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def hook_order(task: torch.nn.Module, batch: object) -> list[str]:
    order: list[str] = []
    handles = [
        p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
        for name, p in task.named_parameters()
    ]
    total_loss(task, batch)[0].backward()  # type: ignore[arg-type]
    for handle in handles:
        handle.remove()
    task.zero_grad()
    return order


ABSENT = recipe_with(**{f"model__modalities__{name}__absent_token": True for name in NAMES})


COLUMNS = recipe_with(model__modalities__tabular__column_tokens=True)


@pytest.mark.parametrize("masks_as_bits", range(15))
@pytest.mark.parametrize("recipe", [RECIPE, ABSENT, COLUMNS], ids=["as published", "absent tokens", "column tokens"])
def test_gradient_hook_order_is_the_same_for_every_presence_pattern(recipe: Recipe, masks_as_bits: int) -> None:
    modalities = make_modalities(recipe)
    task = make_pretrain(modalities, recipe=recipe)
    complete = make_batch(modalities, *random_samples(modalities, [NAMES] * 3, 0))
    present = [n for i, n in enumerate(NAMES) if masks_as_bits >> i & 1]
    partial = make_batch(modalities, *random_samples(modalities, [present] * 2, 1))
    expected = hook_order(task, complete)
    assert sorted(expected) == sorted(name for name, _ in task.named_parameters())
    assert hook_order(task, partial) == expected


@pytest.mark.parametrize("recipe", [RECIPE, ABSENT], ids=["as published", "absent tokens"])
def test_finite_garbage_in_dummies_changes_nothing_bitwise(recipe: Recipe) -> None:
    modalities = make_modalities(recipe)
    task = make_pretrain(modalities, recipe=recipe)
    garbage = {
        "text": np.array([7]),
        "image": np.full((8, 8, 3), 255, dtype=np.uint8),
        "timeseries": Series(np.full((1, 4), 1e3, dtype=np.float32), np.ones((1, 4), dtype=bool)),
    }
    for name, dummy in garbage.items():
        present = [n for n in NAMES if n != name]
        contents, masks = random_samples(modalities, [present] * 3, 0)
        results = []
        for dummies in (None, {name: dummy}):
            loss, terms = total_loss(task, make_batch(modalities, contents, masks, dummies))
            loss.backward()
            results.append((loss.detach(), terms, gradients(task)))
        (loss_a, terms_a, grads_a), (loss_b, terms_b, grads_b) = results
        assert torch.equal(loss_a, loss_b)
        assert all(torch.equal(terms_a[t], terms_b[t]) for t in terms_a)
        assert all(torch.equal(grads_a[n], grads_b[n]) for n in grads_a), name


def test_a_sample_does_not_see_the_other_samples_of_its_batch() -> None:
    modalities = make_modalities()
    task = make_pretrain(modalities)
    presence = [NAMES, ("text", "tabular"), ("image",)]
    contents, masks = random_samples(modalities, presence, 3)
    together, _ = task.model(make_batch(modalities, contents, masks))
    alone, _ = task.model(make_batch(modalities, contents[:1], masks[:1]))
    rows = len(alone) // 2
    torch.testing.assert_close(together[:rows], alone[:rows], rtol=1e-5, atol=1e-6)


def test_stop_gradient_reaches_only_the_predicting_branch() -> None:
    from lanistr.losses import simsiam_loss

    torch.manual_seed(0)
    tensors = [torch.randn(5, 8, requires_grad=True) for _ in range(4)]
    z_clean, p_clean, z_masked, p_masked = tensors
    simsiam_loss(z_clean, p_clean, z_masked, p_masked).sum().backward()
    assert z_clean.grad is None
    assert z_masked.grad is None
    assert p_clean.grad is not None
    assert p_masked.grad is not None
