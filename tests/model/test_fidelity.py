"""Each term reaches exactly the parameters that the paper says it trains; masks are drawn as the paper says."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lanistr.modalities.image import ImageModality
from lanistr.modalities.tabular import Row
from lanistr.modalities.text import KEPT, TextModality
from lanistr.ops.cosine import neg_cosine
from lanistr.tasks import Finetune
from tests.dispatch import NoQuestions
from tests.model.support import (
    NAMES,
    RECIPE,
    make_batch,
    make_modalities,
    make_pretrain,
    random_samples,
)

ENCODERS = {f"model.encoders.{name}.encoder." for name in NAMES}
SHARED = {f"model.encoders.{name}.projection." for name in NAMES} | {"model.fusion.", "heads."}
TRAINED = {
    "mlm": {"model.encoders.text.encoder.", "model.encoders.text.head."},
    "mim": {"model.encoders.image.encoder.", "model.encoders.image.head."},
    "mfm": {"model.encoders.tabular.encoder.", "model.encoders.tabular.head."},
    "mtm": {"model.encoders.timeseries.encoder.", "model.encoders.timeseries.head."},
    # The image's mask token stands in the masked view that SimMMM compares.
    "mmm": ENCODERS | SHARED | {"model.encoders.image.head.mask_token"},
}


def complete_batch(task_seed: int = 0) -> tuple[Any, Any, Any]:
    modalities = make_modalities()
    return (
        modalities,
        make_pretrain(modalities, task_seed),
        make_batch(modalities, *random_samples(modalities, [NAMES] * 6, seed=5)),
    )


@pytest.mark.parametrize("term", TRAINED)
def test_a_terms_gradient_reaches_exactly_its_own_branch(term: str) -> None:
    _, task, batch = complete_batch()
    task(batch)[term].backward()
    reached = {n for n, p in task.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    expected = {n for n, _ in task.named_parameters() if n.startswith(tuple(TRAINED[term]))}
    # A category that no row has, a vocabulary entry without a place: rows of tables, never whole parameters.
    assert reached == expected


@pytest.mark.parametrize("term", ["mlm", "mim", "mfm", "mtm"])
def test_unimodal_losses_look_at_the_masked_view_only(term: str) -> None:
    modalities, task, batch = complete_batch()
    name = next(n for n, m in modalities.items() if m.term == term)
    encoder = task.model.encoder(name)
    hidden = encoder.encode(batch.inputs[name]).detach().requires_grad_()
    encoder.reconstruct(hidden, batch.inputs[name]).backward()
    assert hidden.grad is not None
    clean, masked = hidden.grad.chunk(2)
    assert clean.abs().max() == 0
    assert masked.abs().max() > 0


def test_the_target_branch_of_each_half_of_simmmm_gets_no_gradient() -> None:
    _, task, batch = complete_batch()
    fused = task.model(batch)[0].detach().requires_grad_()
    z, p = task.heads(fused)
    neg_cosine(p.chunk(2)[0], z.chunk(2)[1]).sum().backward()  # D(e1, z2): the clean view predicts
    assert fused.grad is not None
    clean, masked = fused.grad.chunk(2)
    assert clean.abs().max() > 0
    assert masked.abs().max() == 0


def test_lambda_scales_each_terms_gradient() -> None:
    _, task, batch = complete_batch()
    grads = {}
    for term in task.weights:
        task.zero_grad(set_to_none=True)
        (task.weights[term] * task(batch)[term]).backward()
        grads[term] = {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}
    task.zero_grad(set_to_none=True)
    torch.stack([task.weights[t] * total for t, total in task(batch).items()]).sum().backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None
        parts = torch.stack([g[name] for g in grads.values() if name in g]).sum(0)
        torch.testing.assert_close(parameter.grad, parts, rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(length=st.integers(2, 60), pads=st.integers(0, 5), seed=st.integers(0, 10_000))
def test_special_and_pad_tokens_are_never_masked(length: int, pads: int, seed: int) -> None:
    text = make_modalities()["text"]
    assert isinstance(text, TextModality)
    rng = np.random.default_rng(seed)
    ids = np.array([2, *rng.integers(0, 50, length), 3, *[0] * pads])
    replaced = text.corrupt(ids, rng)
    special = np.isin(ids, [text.spec.cls_id, text.spec.sep_id, text.spec.pad_id])
    assert (replaced[special] == KEPT).all()
    assert special.all() or (replaced != KEPT).any()


@pytest.mark.parametrize("ratio", [0.5, 0.6])
def test_simmim_masks_exactly_its_share_of_patches_evenly_over_the_image(ratio: float) -> None:
    image = ImageModality("image", {"mask_ratio": ratio}, ImageModality.paper_schema())
    pixels = np.zeros((224, 224, 3), dtype=np.uint8)
    masks = np.stack([image.corrupt(pixels, np.random.default_rng(i)) for i in range(400)])
    assert (masks.sum(1) == round(196 * ratio)).all()
    assert abs(masks.mean(0) - ratio).max() < 0.13  # five standard deviations of one patch


def test_tabnet_hides_whole_features_at_its_rate_and_never_a_missing_one() -> None:
    modalities = make_modalities()
    tabular = modalities["tabular"]
    observed = np.array([True, True, False])
    row = Row(np.ones(2, dtype=np.float32), np.array([0]), observed)
    masks = np.stack([tabular.corrupt(row, np.random.default_rng(i)) for i in range(4000)])
    assert not masks[:, 2].any()
    alone = 0.15 + 0.85**2 / 2  # one of two is drawn, or none is and the lowest draw stands in
    assert abs(masks[:, :2].mean(0) - alone).max() < 0.03
    encoder = make_pretrain(modalities).model.encoder("tabular").encoder
    assert encoder.column_of_X.tolist() == [0, 1, 2, 2, 2]  # the three dimensions of the category are one feature


@pytest.mark.parametrize("presence", [[NAMES] * 3, [("text",), ("tabular", "timeseries")]], ids=["all", "some"])
def test_no_step_asks_the_device_a_question(presence: list) -> None:
    """On a GPU each such question would stall the stream; the collator answers all of them beforehand."""
    modalities = make_modalities()
    task = make_pretrain(modalities).train()
    batch = make_batch(modalities, *random_samples(modalities, presence, 0))
    with NoQuestions():
        torch.stack(list(task(batch).values())).sum().backward()
    one_view = make_one_view(modalities, presence)
    for pooling in ("cls", "mean", "modalities"):
        config = RECIPE.finetune.model_copy(update={"pooling": pooling})
        tuned = Finetune(make_pretrain(modalities).model, RECIPE.model.fusion.width, 3, config, seed=0)
        with NoQuestions():
            tuned(one_view)["cls"].backward()


def make_one_view(modalities: Any, presence: list) -> Any:
    from lanistr.data.loader import Collator
    from lanistr.data.samples import Sample

    contents, _ = random_samples(modalities, presence, 0)
    samples = [Sample(key=str(i), label=0, presence=0, contents=c) for i, c in enumerate(contents)]
    return Collator(modalities, views=1, seed=0)(samples, [1.0] * len(samples), epoch=0)


def test_the_guard_itself_notices_questions() -> None:
    x = torch.arange(4.0)
    for question in (
        lambda: x[x > 1],
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: float(x[0]),
        lambda: bool(x[0]),
    ):
        with NoQuestions(), pytest.raises(AssertionError, match="question"):
            question()
