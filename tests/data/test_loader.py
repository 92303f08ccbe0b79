import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lanistr.batch import Batch
from lanistr.data.loader import Collator, TrainLoader, eval_batches
from lanistr.data.reader import CorruptSample, GoldDataset
from tests.model.support import NAMES, make_modalities
from tests.tiny_gold import write_gold


def presence(i: int) -> list[str]:
    return [name for bit, name in enumerate(NAMES) if (i * 7 + 3) >> bit & 1]


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gold(tmp_path_factory.mktemp("gold"), {"train": 40, "val": 7, "test": 5}, presence)


def tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if dataclasses.is_dataclass(tree):
        return [t for f in dataclasses.fields(tree) for t in tensors(getattr(tree, f.name))]
    if isinstance(tree, dict):
        return [t for v in tree.values() for t in tensors(v)]
    return [t for v in tree for t in tensors(v)] if isinstance(tree, tuple) and not isinstance(tree, str) else []


def equal(a: Batch, b: Batch) -> bool:
    left, right = tensors(a), tensors(b)
    return a.keys == b.keys and len(left) == len(right) and all(map(torch.equal, left, right))


def loader(gold: Path, ranks: int = 1, rank: int = 0, workers: int = 0, micro: int | None = None) -> TrainLoader:
    modalities = make_modalities()
    return TrainLoader(
        GoldDataset(gold, "train", modalities),
        Collator(modalities, views=2, seed=5),
        global_batch=8,
        micro_batch=micro,
        ranks=ranks,
        rank=rank,
        seed=1,
        grouping="stratified",
        workers=workers,
    )


def test_samples_have_exactly_the_modalities_that_were_written(gold: Path) -> None:
    dataset = GoldDataset(gold, "train", make_modalities())
    read = [dataset.read(i) for i in range(dataset.n)]
    assert [sorted(s.contents) for s in read] == [sorted(presence(i)) for i in range(40)]
    assert [s.label for s in read] == [i % 3 for i in range(40)]


def test_modalities_that_the_recipe_does_not_use_are_never_read(gold: Path) -> None:
    text = {"text": make_modalities()["text"]}
    dataset = GoldDataset(gold, "train", text)
    assert set(dataset.presence) <= {0, 1}
    assert all(set(dataset.read(i).contents) <= {"text"} for i in range(dataset.n))


def test_a_flipped_byte_is_found_and_names_the_sample(gold: Path, tmp_path: Path) -> None:
    broken = write_gold(tmp_path / "broken", {"train": 8}, lambda _: NAMES)
    dataset = GoldDataset(broken, "train", make_modalities())
    tar = broken / dataset.manifest.shards[0].path
    data = bytearray(tar.read_bytes())
    data[int(dataset._places["offset/jpg"][3]) + 40] ^= 1
    tar.write_bytes(data)
    with pytest.raises(CorruptSample, match=rf"{dataset.keys[3]}\.jpg: crc32"):
        GoldDataset(broken, "train", make_modalities()).read(3)


def test_a_missing_shard_and_a_missing_manifest_are_clear_errors(tmp_path: Path) -> None:
    broken = write_gold(tmp_path / "broken", {"train": 8}, lambda _: NAMES)
    next((broken / "train").glob("*.tar")).unlink()
    with pytest.raises(ValueError, match="missing, but the manifest names it"):
        GoldDataset(broken, "train", make_modalities())
    (broken / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        GoldDataset(broken, "train", make_modalities())


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_decide_who_reads_never_what(gold: Path, workers: int) -> None:
    alone = [m for step in loader(gold).steps(0, 7) for m in step]
    helped = [m for step in loader(gold, workers=workers).steps(0, 7) for m in step]
    assert len(alone) == len(helped) == 7
    assert all(map(equal, alone, helped))


def test_global_batches_do_not_depend_on_ranks_or_accumulation(gold: Path) -> None:
    def keys(ranks: int, micro: int | None) -> list[list[str]]:
        steps: list[list[str]] = [[] for _ in range(6)]
        for rank in range(ranks):
            for i, step in enumerate(loader(gold, ranks, rank, micro=micro).steps(0, 6)):
                steps[i] += [key for m in step for key in m.keys]
        return [sorted(step) for step in steps]

    assert keys(1, None) == keys(2, None) == keys(4, 1) == keys(1, 2)


def test_masks_depend_on_the_sample_and_the_epoch_only(gold: Path) -> None:
    modalities = make_modalities()
    dataset = GoldDataset(gold, "train", modalities)
    collator = Collator(modalities, views=2, seed=5)
    full = next(i for i in range(dataset.n) if len(dataset.read(i).contents) == 4)
    alone = collator([dataset.read(full)], [1.0], epoch=0)
    again = collator([dataset.read(full), dataset.read(0)], [1.0, 1.0], epoch=0)
    later = collator([dataset.read(full)], [1.0], epoch=1)
    length = len(alone.inputs["text"].targets_M)
    assert torch.equal(alone.inputs["text"].targets_M, again.inputs["text"].targets_M[:length])
    assert torch.equal(alone.inputs["image"].mask_NP1[1], again.inputs["image"].mask_NP1.chunk(2)[1][0])
    assert not torch.equal(alone.inputs["image"].mask_NP1, later.inputs["image"].mask_NP1)


def test_resume_in_the_middle_of_an_epoch_gives_the_same_batches(gold: Path) -> None:
    whole = [m for step in loader(gold).steps(0, 12) for m in step]
    for start in (1, 4, 5, 7):
        rest = [m for step in loader(gold).steps(start, 12) for m in step]
        assert all(map(equal, whole[start:], rest))


def test_resume_on_another_dataset_or_plan_names_both(gold: Path) -> None:
    here = loader(gold).state(0)
    with pytest.raises(ValueError, match="global_batch 16, this run has 8"):
        dataclasses.replace(here, global_batch=16).check(here)
    with pytest.raises(ValueError, match="content_id other"):
        dataclasses.replace(here, content_id="other").check(here)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_sees_every_sample_once_on_any_number_of_ranks(gold: Path, ranks: int) -> None:
    modalities = make_modalities()
    dataset = GoldDataset(gold, "val", modalities)
    collator = Collator(modalities, views=1, seed=0)
    seen, steps = [], []
    for rank in range(ranks):
        batches = list(eval_batches(dataset, collator, batch=2, ranks=ranks, rank=rank))
        steps.append(len(batches))
        seen += [k for b in batches for k, w in zip(b.keys, b.weights_B, strict=True) if w > 0]
    assert sorted(seen) == sorted(dataset.keys)
    assert len(set(steps)) == 1


def test_labelled_draws_are_stratified_and_deterministic(gold: Path) -> None:
    dataset = GoldDataset(gold, "train", make_modalities())
    nine = dataset.labelled(9, seed=0)
    assert np.bincount(dataset.label[nine]).tolist() == [3, 3, 3]
    assert np.array_equal(nine, dataset.labelled(9, seed=0))
    assert not np.array_equal(nine, dataset.labelled(9, seed=1))
    with pytest.raises(ValueError, match="400 labels asked for"):
        dataset.labelled(400, seed=0)


def test_a_dataset_can_be_sent_to_a_worker(gold: Path) -> None:
    dataset = GoldDataset(gold, "train", make_modalities())
    dataset.read(0)
    assert pickle.loads(pickle.dumps(dataset)).read(0).key == dataset.read(0).key


def test_modality_dropout_hides_at_its_rate_depends_on_nothing_but_the_sample_and_never_hides_all(gold: Path) -> None:
    modalities = make_modalities()
    dataset = GoldDataset(gold, "train", modalities)
    samples = [dataset.read(i) for i in range(40)]
    plain = Collator(modalities, views=1, seed=0)
    dropping = Collator(modalities, views=1, seed=0, modality_dropout=0.4)

    def lengths(collator: Collator, chosen: list[Any], epoch: int) -> list[int]:
        layout = collator(chosen, [1.0] * len(chosen), epoch).fusion.layout
        return layout.cu_seqlens.diff().tolist()[: len(chosen)]

    together = lengths(dropping, samples, 0)
    assert together == [lengths(dropping, [sample], 0)[0] for sample in samples]
    assert together != lengths(dropping, samples, 1)
    full = lengths(plain, samples, 0)
    assert all(1 <= a <= b for a, b in zip(together, full, strict=True))
    assert all(a > 1 for a, b in zip(together, full, strict=True) if b > 1)
    kept = [
        len(dropping._drop(s, e).contents) / len(s.contents) for e in range(50) for s in samples if len(s.contents) == 4
    ]
    assert abs(np.mean(kept) - 0.6) < 0.05
