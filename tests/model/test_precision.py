"""bfloat16 with float32 islands, against float32 at the same (rounded) weights."""

import copy

import torch

from tests.model.padded_oracle import oracle_terms
from tests.model.support import (
    NAMES,
    make_batch,
    make_modalities,
    make_pretrain,
    random_samples,
    recipe_with,
    total_loss,
)

PRESENCE = [NAMES, ("text", "tabular"), ("image",), NAMES, ("text", "timeseries"), ("tabular", "timeseries")]


def test_bfloat16_step_stays_close_to_float32_in_every_term_and_branch() -> None:
    recipe = recipe_with(model__modalities__tabular__norm="batch")
    modalities = make_modalities(recipe)
    batch = make_batch(modalities, *random_samples(modalities, PRESENCE, 0))
    exact = make_pretrain(modalities, recipe=recipe).bfloat16().float()
    rounded = copy.deepcopy(exact).bfloat16()
    results = []
    for task in (exact, rounded):
        loss, terms = total_loss(task, batch)
        loss.backward()
        results.append((terms, {n: p.grad.float() for n, p in task.named_parameters() if p.grad is not None}))
    (terms, grads), (terms_16, grads_16) = results
    for name, term in terms_16.items():
        assert term.dtype == torch.float32
        torch.testing.assert_close(term, terms[name], rtol=2e-2, atol=2e-2)
    for branch in [*(f"model.encoders.{n}." for n in NAMES), "model.fusion.", "heads."]:
        a, b = (
            torch.cat([g.flatten() for n, g in found.items() if n.startswith(branch)]) for found in (grads, grads_16)
        )
        # TabNet, all of it in float32, was off by more than its own length before.
        assert float((a - b).norm() / a.norm()) < 0.06, branch


def test_bfloat16_step_stays_close_to_the_float32_oracle() -> None:
    modalities = make_modalities()
    exact = make_pretrain(modalities).bfloat16().float()
    contents, masks = random_samples(modalities, PRESENCE, 1)
    expected = oracle_terms(exact, modalities, contents, masks)
    _, terms = total_loss(copy.deepcopy(exact).bfloat16(), make_batch(modalities, contents, masks))
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=2e-2, atol=2e-2)
