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
from lanistr.model.lanistr import build_model
from lanistr.tasks import Finetune
from tests.model.support import NAMES, RECIPE, make_modalities, random_samples


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


def make_batch(presence: list[list[str]], labels: list[int]) -> tuple[Batch, list[dict[str, Any]]]:
    modalities = make_modalities()
    contents, _ = random_samples(modalities, presence, seed=1)
    samples = [
        Sample(key=str(i), label=label, presence=0, contents=c)
        for i, (c, label) in enumerate(zip(contents, labels, strict=True))
    ]
    return Collator(modalities, views=1, seed=0)(samples, [1.0] * len(samples), epoch=0), contents


def make_task(**finetune: Any) -> Finetune:
    model = build_model(RECIPE.model, make_modalities(), seed=0)
    return Finetune(model, RECIPE.model.fusion.width, 3, FinetuneConfig(**finetune), seed=0).eval()


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
