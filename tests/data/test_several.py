"""Several texts or images per sample: members ``1.tok.npy``, ``2.jpg`` of hand-made shards (contract 1)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from lanistr.data.loader import Collator
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import Several
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from tests.model.padded_oracle import dense_block
from tests.model.support import NAMES, RECIPE, make_pretrain, total_loss
from tests.tiny_gold import write_gold

ITEMS = {"text": 2, "image": 3}


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gold(
        tmp_path_factory.mktemp("several"), {"train": 6}, lambda i: NAMES if i else ("text",), items=ITEMS
    )


@pytest.fixture(scope="module")
def dataset(gold: Path) -> GoldDataset:
    return GoldDataset(gold, "train", make_modalities(Manifest.load(gold), RECIPE.model.modalities))


def test_every_item_is_read_and_one_of_a_kind_stays_one(dataset: GoldDataset) -> None:
    for i in range(dataset.n):
        contents = dataset.read(i).contents
        assert isinstance(contents["text"], Several)
        assert len(contents["text"]) == 1 + i % 2
        if i:
            assert len(contents["image"]) == 1 + i % 3
            assert not isinstance(contents["tabular"], Several)


def test_shards_stay_plain_webdataset(gold: Path) -> None:
    tar = next((gold / "train").glob("*.tar"))
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert "1.tok.npy" in samples[1]
    assert "2.jpg" in samples[2]


def test_tokens_of_all_items_enter_fusion_as_if_fused_by_hand(dataset: GoldDataset) -> None:
    modalities = dataset.modalities
    task = make_pretrain(modalities).eval()
    samples = [dataset.read(i) for i in (5, 0, 2)]
    batch = Collator(modalities, views=1, seed=0)(samples, [1.0] * 3, epoch=0)
    fused, _ = task.model(batch)
    for sample, rows in zip(samples, fused.split(batch.fusion.layout.cu_seqlens.diff().tolist()), strict=True):
        pieces = [task.model.fusion.cls]
        for name, content in sample.contents.items():
            for item in content if isinstance(content, Several) else [content]:
                inputs: Any = modalities[name].collate([item], None, [1.0]).inputs
                encoder = task.model.encoder(name)
                pieces.append(encoder.project(encoder.encode(inputs), inputs))
        x = torch.cat(pieces)[None]
        for block in task.model.fusion.blocks:
            x = dense_block(block, x, torch.ones(x.shape[:2], dtype=torch.bool))
        torch.testing.assert_close(rows, task.model.fusion.norm(x)[0], rtol=1e-5, atol=1e-5)


def test_each_item_is_masked_on_its_own_and_trains(dataset: GoldDataset) -> None:
    modalities = dataset.modalities
    content = np.array([2, *range(5, 17), 3])  # two equal texts: their masks differ by the item's number only
    sample = dataset.read(5)
    twins = type(sample)(sample.key, sample.presence, sample.label, {"text": Several([content, content])})
    batch = Collator(modalities, views=2, seed=1)([twins, dataset.read(2)], [1.0, 1.0], epoch=0)
    text = batch.inputs["text"]
    first, second, third, fourth = (text.layout.cu_seqlens[i] for i in (3, 4, 5, 6))  # masked view: 3 sequences of 6
    assert fourth == len(text.ids_T)
    assert not torch.equal(text.ids_T[first:second], text.ids_T[second:third])
    task = make_pretrain(modalities)
    total_loss(task, batch)[0].backward()
    assert all(p.grad is not None for p in task.parameters())
