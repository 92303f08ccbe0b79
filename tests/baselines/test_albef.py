"""ALBEF: its losses against loops in float64, its packed passes against one sample at a time, its use end to end."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lanistr.baselines.albef as module
from lanistr.baselines.albef import AlbefConfig, AlbefPretrain, PairCollator, paired_rows
from lanistr.baselines.albef_losses import Queue, contrastive_losses, distilled_losses, follow, hard_negatives
from lanistr.baselines.pretrained import AlbefMethod
from lanistr.baselines.tab2txt import View
from lanistr.batch import Batch
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import intact, read_samples
from lanistr.metrics import accuracy
from lanistr.training.features import cache_features
from lanistr.training.loop import total_steps
from lanistr.training.run import train_loader
from tests.baselines.planted import CHANCE, planted_gold, planted_recipe, planted_splits, publish_text

P, Q, E = 4, 3, 5


def units(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(rows, E, dtype=torch.float64, generator=generator), dim=1)


def naive_contrast(query: Tensor, slow: Tensor, keys: Tensor, temperature: float, alpha: float) -> list[float]:
    losses = []
    for p in range(P):
        scores = [math.exp(float(query[p] @ key) / temperature) for key in keys]
        teacher = [math.exp(float(slow[p] @ key) / temperature) for key in keys]
        loss = 0.0
        for k in range(len(keys)):
            target = alpha * teacher[k] / sum(teacher) + (1 - alpha) * (k == p)
            loss -= target * math.log(scores[k] / sum(scores))
        losses.append(loss)
    return losses


def test_contrast_is_that_of_a_loop() -> None:
    image, text, slow_image, slow_text = (units(P, seed) for seed in range(4))
    image_queue, text_queue, temperature, alpha = units(Q, 4), units(Q, 5), 0.2, 0.4
    found = contrastive_losses(
        image, text, slow_image, slow_text, image_queue, text_queue, torch.tensor(temperature), alpha
    )
    to_text = naive_contrast(image, slow_image, torch.cat([slow_text, text_queue]), temperature, alpha)
    to_image = naive_contrast(text, slow_text, torch.cat([slow_image, image_queue]), temperature, alpha)
    expected = [(a + b) / 2 for a, b in zip(to_text, to_image, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_a_negative_is_never_the_own_key_and_is_drawn_by_similarity() -> None:
    torch.manual_seed(0)
    query, key, temperature = units(P, 0), units(P, 1), 0.5
    draws = 4000
    counts = np.zeros((P, P))
    for _ in range(draws):
        counts[np.arange(P), hard_negatives(query, key, torch.tensor(temperature)).numpy()] += 1
    for p in range(P):
        weights = np.array([0.0 if k == p else math.exp(float(query[p] @ key[k]) / temperature) for k in range(P)])
        assert counts[p, p] == 0
        np.testing.assert_allclose(counts[p] / draws, weights / weights.sum(), atol=0.03)


def test_distillation_is_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, slow = (torch.randn(6, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    targets = torch.randint(7, (6,), generator=generator)
    found = distilled_losses(logits, slow, targets, 0.3)
    for m in range(6):
        total, slow_total = (sum(math.exp(v) for v in x[m].tolist()) for x in (logits, slow))
        logs = [v - math.log(total) for v in logits[m].tolist()]
        soft = -sum(math.exp(s) / slow_total * log for s, log in zip(slow[m].tolist(), logs, strict=True))
        assert found[m].item() == pytest.approx(0.7 * -logs[int(targets[m])] + 0.3 * soft)


def test_the_slow_model_follows_by_the_formula() -> None:
    fast, slow = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    start = slow.weight.detach().clone()
    for _ in range(5):
        follow(slow, fast, 0.9)
    expected = 0.9**5 * start + (1 - 0.9**5) * fast.weight
    torch.testing.assert_close(slow.weight, expected)


@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 4], [7, 1]])
def test_the_queue_is_a_ring_of_the_last_pairs_side_by_side(sizes: list[int]) -> None:
    queue = Queue(5, E).double()
    image, text, place = queue.image_QE.tolist(), queue.text_QE.tolist(), 0
    for i, size in enumerate(sizes):
        new = units(size, i)
        queue.push(new, -new)
        for row in new.tolist()[-5:]:
            image[place], text[place] = row, [-value for value in row]
            place = (place + 1) % 5
    assert queue.image_QE.tolist() == image
    assert queue.text_QE.tolist() == text


def test_pairs_are_found_among_the_present_rows() -> None:
    presence = torch.tensor([0b01, 0b11, 0b10, 0b11, 0b01])
    assert paired_rows(presence, 0b01, 0b10) == ([1, 2], [0, 2])


PRESENT = [["text", "image"], ["text"], ["text", "image"], ["text", "image", "tabular"], ["text"]]


def open_albef(folder: Path, present: Any = None) -> tuple[GoldDataset, AlbefPretrain]:
    recipe = planted_recipe()
    gold = planted_gold(folder, present or (lambda i: PRESENT[i % 5]))
    view = View(recipe, ("text", "image"), tables=False, single=True)
    dataset = view.open(gold, "train")
    torch.manual_seed(0)
    config = view.model_recipe(dataset.manifest).model
    albef = AlbefConfig(embed=6, queue=4, temperature=0.3)
    task = AlbefPretrain(config, dataset.modalities, albef, 100, 10, dataset.index.bits, "cpu").double()
    with torch.no_grad():
        for parameter in task.slow.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    task.steps = 5  # half of the ramp
    return dataset, task


def collate(dataset: GoldDataset, positions: list[int], modalities: Any = None) -> Batch:
    collator = PairCollator(modalities or dataset.modalities, views=2, seed=3, text="text", image="image")
    return collator(intact(read_samples(dataset, positions)), [1.0] * len(positions), 0)


def fuse_one(branch: Any, text: Any, image: Any | None, view: int) -> Tensor:
    """Fused rows of one sample: [CLS], the tokens of one view of its text, those of its image."""
    encoder = branch.model.encoder("text")
    tokens = encoder.project(encoder.encode(text), text).chunk(2)[view]
    parts = [branch.model.fusion.cls, tokens]
    if image is not None:
        vit = branch.model.encoder("image")
        inputs = replace(image, mask_NP1=None)
        parts.append(vit.project(vit.encode(inputs), inputs))
    x = torch.cat(parts)
    for block in branch.model.fusion.blocks:
        q, k, v = block.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).unbind(1)
        scores = torch.einsum("qhk,lhk->hql", q, k) / q.shape[-1] ** 0.5
        x = x + block.out(torch.einsum("hql,lhk->qhk", scores.softmax(-1), v).flatten(1))
        x = x + block.down(nn.functional.gelu(block.up(block.norm2(x))))
    return branch.model.fusion.norm(x)


def test_the_packed_passes_are_those_of_one_sample_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, task = open_albef(tmp_path)
    task.eval()
    monkeypatch.setattr(module, "hard_negatives", lambda query, *_: (torch.arange(len(query)) + 1) % len(query))
    batch = collate(dataset, [0, 1, 2, 3, 4])
    with torch.no_grad():
        totals = task(batch)
    singles = [collate(dataset, [i]).inputs for i in range(5)]
    texts = [inputs["text"] for inputs in singles]
    images = {p: singles[i]["image"] for p, i in enumerate((0, 2, 3))}
    places = (0, 2, 3)
    assert (batch.counts["itc"], batch.counts["itm"]) == (3.0, 9.0)
    alpha = 0.2

    def masked(branch: Any, i: int) -> Tensor:
        image = images[places.index(i)] if i in places else None
        fused = fuse_one(branch, texts[i], image, view=1)
        rows = fused[1 + texts[i].masked_M - len(texts[i].ids_T) // 2]
        return branch.mlm.decoder(branch.mlm.norm(nn.functional.gelu(branch.mlm.dense(rows))))

    with torch.no_grad():
        mlm = sum(
            distilled_losses(masked(task.fast, i), masked(task.slow, i), texts[i].targets_M, alpha).sum()
            for i in range(5)
        )
        torch.testing.assert_close(totals["mlm"], mlm, rtol=1e-5, atol=1e-6)
        combined = [(p, p, 1) for p in range(3)] + [(p, (p + 1) % 3, 0) for p in range(3)]
        combined += [((p + 1) % 3, p, 0) for p in range(3)]
        itm = sum(
            nn.functional.cross_entropy(
                task.match(fuse_one(task.fast, texts[places[t]], images[i], view=0)[:1]), torch.tensor([truth])
            )
            for t, i, truth in combined
        )
        torch.testing.assert_close(totals["itm"], itm, rtol=1e-5, atol=1e-6)

        def embed(branch: Any) -> tuple[Tensor, Tensor]:
            text = [branch.model.encoder("text").encode(texts[i])[:1] for i in places]
            image = [branch.model.encoder("image").encode(replace(i, mask_NP1=None))[:1] for i in images.values()]
            found = branch.image_embed(torch.cat(image)), branch.text_embed(torch.cat(text))
            return nn.functional.normalize(found[0], dim=1), nn.functional.normalize(found[1], dim=1)

        itc = contrastive_losses(
            *embed(task.fast), *embed(task.slow), task.queue.image_QE, task.queue.text_QE, task.temperature, alpha
        ).sum()
        torch.testing.assert_close(totals["itc"], itc, rtol=1e-5, atol=1e-6)


def test_texts_without_images_neither_pair_nor_see_the_dummy(tmp_path: Path) -> None:
    dataset, task = open_albef(tmp_path, lambda i: ["text"] if i % 2 else ["text", "image"])
    task.eval()

    base: Any = type(dataset.modalities["image"])

    class Other(base):
        def dummy(self) -> np.ndarray:
            return np.full_like(super().dummy(), 7)

    image = dataset.modalities["image"]
    other = {**dataset.modalities, "image": Other("image", image.block, dataset.manifest.modalities["image"])}
    found, again = (task(collate(dataset, [1, 3, 5], modalities)) for modalities in (None, other))
    assert {name: total.item() for name, total in found.items()} == {n: t.item() for n, t in again.items()}
    assert found["itc"] == found["itm"] == 0
    assert found["mlm"] > 0


def test_a_step_trains_everything_but_the_slow_model_and_fills_the_queue(tmp_path: Path) -> None:
    dataset, task = open_albef(tmp_path)
    task.train()
    before, slow = task.queue.image_QE.clone(), [p.clone() for p in task.slow.parameters()]
    fast = [p.detach().clone() for p in task.fast.parameters()]
    totals = task(collate(dataset, list(range(5))))
    torch.stack(list(totals.values())).sum().backward()
    lacking = [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    assert all(p.grad is None for p in task.slow.parameters())
    for now, then, theirs in zip(task.slow.parameters(), slow, fast, strict=True):
        torch.testing.assert_close(now, 0.995 * then + 0.005 * theirs)
    assert int((before != task.queue.image_QE).any(1).sum()) == 3  # as many as there are pairs
    assert task.steps == 6


def test_a_frozen_text_pairs_and_matches_as_from_its_cache_without_masked_words(tmp_path: Path) -> None:
    recipe = planted_recipe(pretrain__global_batch=24, **publish_text(tmp_path / "bert"))
    method = AlbefMethod(recipe, planted_gold(tmp_path / "gold"), tmp_path / "a", 1)
    dataset = method.view.open(tmp_path / "gold", "train")
    made = method.make(method.view.model_recipe(dataset.manifest), dataset)
    task: Any = made.task
    assert set(task.weights) == {"itc", "itm"}
    positions, bits = made.positions, dataset.index.bits
    assert positions is not None
    assert ((dataset.presence[positions] & (bits["text"] | bits["image"])) == bits["text"] | bits["image"]).all()
    texts = int(((dataset.presence & bits["text"]) > 0).sum())
    loader = train_loader(dataset, made.collator, recipe.data, made.config, positions)
    assert made.config.global_batch == 24  # contrast keeps its negatives, and takes as many steps as with all texts
    assert total_steps(loader, made.config) == texts // 24 * recipe.pretrain.epochs > len(positions) // 24
    wanted = {"train": positions}
    cached = cache_features(
        task.model, recipe.pretrain, ["text"], {"train": dataset}, wanted, tmp_path, torch.device("cpu"), 0
    )["train"]  # fmt: skip
    found = []
    for split in (dataset, cached):
        collator = replace(made.collator, modalities=split.modalities)
        batch = collator(intact(read_samples(split, positions[:6].tolist())), [1.0] * 6, 0)
        task.steps = 0
        task.eval().zero_grad()
        torch.manual_seed(0)
        totals = task(batch)
        torch.stack([total / batch.counts[name] for name, total in totals.items()]).sum().backward()
        gradients = {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}
        found.append((totals, gradients))
    (plain, theirs), (ours, mine) = found
    assert plain["itm"] > 0
    for name, total in plain.items():
        torch.testing.assert_close(ours[name], total, rtol=1e-5, atol=1e-6)
    assert theirs.keys() == mine.keys()
    assert not any("encoders.text.encoder." in name for name in mine)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("tables", [False, True])
def test_beats_chance_and_repeats_itself(tmp_path: Path, tables: bool) -> None:
    splits = planted_splits(tmp_path / "gold")
    methods = [AlbefMethod(planted_recipe(), tmp_path / "gold", tmp_path / name, 1, tables) for name in ("a", "b")]
    first, second = (method.fit(splits.draw(72, 1), splits.val, 1)(splits.test) for method in methods)
    np.testing.assert_array_equal(first, second)
    assert accuracy(first, splits.test.labels_N) > CHANCE + 0.2


def test_a_dataset_without_pairs_is_refused(tmp_path: Path) -> None:
    splits = planted_splits(tmp_path / "gold", lambda i: ["text", "tabular"])
    method = AlbefMethod(planted_recipe(), tmp_path / "gold", tmp_path / "a", 1)
    with pytest.raises(ValueError, match="ALBEF needs image-text pairs; there are 0"):
        method.fit(splits.draw(24, 0), splits.val, 0)
