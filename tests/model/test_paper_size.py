"""The paper's sizes, built, counted and stepped once (slow: 277 M parameters on a CPU, about 6 GB)."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lanistr.config import load_recipe
from lanistr.data.loader import Collator
from lanistr.data.samples import Sample
from lanistr.describe import count_parts
from lanistr.modalities import MODALITIES
from lanistr.modalities.tabular import Row
from lanistr.modalities.timeseries import Series
from lanistr.model.lanistr import build_model
from lanistr.tasks import Pretrain

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["official", "amazon_pretrain"])
def test_paper_size_model_steps_and_every_trained_parameter_gets_a_gradient(name: str) -> None:
    recipe = load_recipe(name)
    schemas = {n: MODALITIES[n].paper_schema() for n in recipe.model.modalities}
    blocks = {n: {k: v for k, v in b.items() if k != "pretrained"} for n, b in recipe.model.modalities.items()}
    modalities = {n: MODALITIES[n](n, blocks[n], schemas[n]) for n in blocks}
    rng = np.random.default_rng(0)
    photo = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (240, 240, 3), dtype=np.uint8)).save(photo, "JPEG")
    contents = {
        "text": np.array([101, *rng.integers(1000, 30000, 40), 102]),
        "image": modalities["image"].decode({"jpg": photo.getvalue()}),
    }
    if "tabular" in modalities:
        contents["tabular"] = Row(rng.normal(size=2).astype(np.float32), np.array([9, 8, 2, 3]), np.ones(6, dtype=bool))
    if "timeseries" in modalities:
        shape = (48, len(schemas["timeseries"].spec["variables"]))
        contents["timeseries"] = Series(rng.normal(size=shape).astype(np.float32), np.ones(shape, dtype=bool))
    samples = [
        Sample(key="a", presence=0, label=-1, contents=contents),
        Sample(key="b", presence=0, label=-1, contents=contents),
    ]
    batch = Collator(modalities, views=2, seed=0)(samples, [1.0, 1.0], epoch=0)
    task = Pretrain(
        build_model(recipe.model, modalities, seed=0), modalities, recipe.model.fusion, recipe.objective, seed=0
    )
    assert sum(p.numel() for p in task.parameters()) == sum(count_parts(recipe).values())
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-4)
    totals = task(batch)
    loss = torch.stack([task.weights[n] * totals[n] / max(batch.counts[n], 1) for n in totals]).sum()
    loss.backward()
    without = [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in task.parameters())
