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


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_classifier_sees_each_samples_own_tokens(pooling: Literal["cls", "mean"]) -> None:
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
    for start, stop in itertools.pairwise(bounds):
        expected.append(task.classifier(fused_TD[start] if pooling == "cls" else fused_TD[start:stop].mean(0)))
    assert len(expected) == 4
    np.testing.assert_allclose(task.logits(batch).detach(), torch.stack(expected).detach(), atol=1e-5)
