"""Fine-tuning's classifier input against a loop over samples."""

import itertools
from typing import Literal

import numpy as np
import pytest
import torch

from lanistr.config import FinetuneConfig
from lanistr.data.loader import Collator
from lanistr.data.reader import Sample
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


@pytest.mark.parametrize("pooling", ["cls", "mean", "modalities"])
def test_classifier_sees_each_samples_own_tokens(pooling: Literal["cls", "mean", "modalities"]) -> None:
    modalities = make_modalities()
    presence = [["text", "image"], ["tabular"], list(NAMES), []]
    contents, _ = random_samples(modalities, presence, seed=1)
    samples = [Sample(key=str(i), label=0, presence=0, contents=c) for i, c in enumerate(contents)]
    batch = Collator(modalities, views=1, seed=0)(samples, [1.0] * 4, epoch=0)
    model = build_model(RECIPE.model, modalities, seed=0)
    task = Finetune(model, RECIPE.model.fusion.width, 3, FinetuneConfig(pooling=pooling), seed=0).eval()
    fused_TD, _ = model(batch)
    bounds = batch.fusion.layout.cu_seqlens.tolist()
    expected = []
    for (start, stop), present in zip(itertools.pairwise(bounds), contents, strict=True):
        tokens = {n: int(modalities[n].collate([c], None, [1.0]).token_counts[0]) for n, c in present.items()}
        expected.append(task.classifier(naive_pool(fused_TD[start:stop], tokens, pooling)))
    assert len(expected) == 4
    np.testing.assert_allclose(task.logits(batch).detach(), torch.stack(expected).detach(), atol=1e-5)
