import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lanistr.batch import Batch, to_device
from lanistr.data.loader import Collator, LoaderState, TrainLoader, eval_batches
from lanistr.data.prefetch import prefetch
from lanistr.data.reader import GoldDataset
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


def loader(
    gold: Path, ranks: int = 1, rank: int = 0, workers: int = 0, micro: int | None = None, **options: Any
) -> TrainLoader:
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
        **options,
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


def digest(batches: list[Batch]) -> str:
    """Of what ranks and workers may not change: the keys and the masks of the global batch, in any order."""
    found = []
    for batch in batches:
        text, image, series = (batch.inputs[name] for name in ("text", "image", "timeseries"))
        found += batch.keys
        found += [f"mlm {target}" for target in text.targets_M[text.weights_M > 0].tolist()]
        if batch.counts["mim"]:
            found += [f"mim {row.flatten().tolist()}" for row in image.mask_NP1.chunk(2)[1]]
        found += [f"mtm {row.tolist()}" for row in series.weights_tC if row.any()]
    return hashlib.sha256("\n".join(sorted(found)).encode()).hexdigest()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ranks_and_workers_decide_who_reads_never_what(gold: Path, ranks: int, workers: int) -> None:
    """Workers of all ranks in turn; threads stand in for processes (next test) to keep eight ranks cheap."""
    steps: list[list[Batch]] = [[] for _ in range(7)]
    for rank in range(ranks):
        made = loader(gold, ranks, rank)
        batches = prefetch(made._make, range(7), workers, processes=False)
        for step, batch in enumerate(batches):
            steps[step].append(batch)
    alone = [digest(step) for step in loader(gold).steps(0, 7)]
    assert [digest(step) for step in steps] == alone
    assert len(set(alone)) == 7


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_make_the_same_batches_bitwise(gold: Path, workers: int) -> None:
    alone = [m for step in loader(gold, micro=4).steps(3, 7) for m in step]
    helped = [m for step in loader(gold, micro=4, workers=workers).steps(3, 7) for m in step]
    assert len(alone) == len(helped) == 8
    assert all(map(equal, alone, helped))


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [False, True])
def test_batches_that_were_copied_ahead_to_a_gpu_are_those_of_the_cpu(gold: Path, processes: bool) -> None:
    made = loader(gold)._make
    batches = list(prefetch(made, range(6), 2, processes, "cuda"))
    assert all(tensor.is_cuda for batch in batches for tensor in tensors(batch))
    found = [to_device(batch, "cpu") for batch in batches]
    torch.cuda.synchronize()
    assert all(map(equal, found, map(made, range(6))))


def test_global_batches_do_not_depend_on_accumulation(gold: Path) -> None:
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


@pytest.mark.parametrize("max_tokens", [None, 260])
def test_resume_anywhere_gives_the_same_batches(gold: Path, max_tokens: int | None) -> None:
    """20 random steps, an epoch's end, its first step; each resumed twice in a row, at other ranks and workers too."""
    epoch = loader(gold, max_tokens=max_tokens).steps_per_epoch
    whole = [m for step in loader(gold, max_tokens=max_tokens).steps(0, 40) for m in step]
    rng = np.random.default_rng(0)
    for start in [epoch - 1, epoch, *rng.choice(34, 20, replace=False).tolist()]:
        again, stop = start + int(rng.integers(1, 4)), start + 5
        first = [m for step in loader(gold, max_tokens=max_tokens).steps(start, again) for m in step]
        second = [m for step in loader(gold, max_tokens=max_tokens).steps(again, stop) for m in step]
        assert len(first) + len(second) == 5
        assert all(map(equal, whole[start:stop], first + second))
        elastic = [
            list(prefetch(loader(gold, 2, rank, max_tokens=max_tokens)._make, range(start, stop), rank, False))
            for rank in range(2)
        ]
        pairs = zip(*elastic, strict=True)
        assert [digest(list(pair)) for pair in pairs] == [digest([batch]) for batch in whole[start:stop]]


def test_resume_on_another_dataset_or_plan_names_both(gold: Path) -> None:
    here = loader(gold).state(0)
    assert not here.differences(dataclasses.replace(loader(gold, 2, 1, workers=3).state(9), step=4))
    larger = dataclasses.replace(here, plan={**here.plan, "global_batch": 16})
    assert larger.differences(here) == [("global_batch", 16, 8)]
    mixed = dataclasses.replace(here, plan={**here.plan, "grouping": "mixed"})
    assert here.differences(mixed) == [("grouping", "stratified", "mixed")]
    other = dataclasses.replace(here, content_id="other")
    assert other.differences(here) == [("content_id", "other", here.content_id)]
    assert LoaderState(**json.loads(json.dumps(dataclasses.asdict(here)))) == here


def test_other_chosen_samples_are_another_dataset(gold: Path) -> None:
    states = [loader(gold, positions=np.arange(i, i + 20)).state(0) for i in range(2)]
    assert [name for name, _, _ in states[0].differences(states[1])] == ["content_id"]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_evaluation_sees_every_sample_once_on_any_number_of_ranks(gold: Path, ranks: int) -> None:
    modalities = make_modalities()
    dataset = GoldDataset(gold, "val", modalities)
    collator = Collator(modalities, views=1, seed=0)
    seen, steps = [], []
    for rank in range(ranks):
        batches = list(
            eval_batches(dataset, collator, batch=2, ranks=ranks, rank=rank, workers=int(ranks == 2 and rank))
        )
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


def test_a_token_budget_holds_for_real_batches_on_two_ranks(gold: Path) -> None:
    budget = 260
    ranks = [list(loader(gold, 2, rank, max_tokens=budget, window=16).steps(0, 8)) for rank in range(2)]
    for steps in zip(*ranks, strict=True):
        tokens = [len(batch.fusion.token_weight_T) for step in steps for batch in step]
        assert sum(tokens) <= budget
        assert min(tokens) > 0.5 * max(tokens)
    with pytest.raises(ValueError, match="fewer than 8 micro-batches"):
        loader(gold, 8, 0, max_tokens=budget)


def test_the_planned_cost_of_a_sample_is_what_it_gives_to_fusion(gold: Path) -> None:
    modalities = make_modalities()
    dataset = GoldDataset(gold, "train", modalities)
    batch = Collator(modalities, views=1, seed=0)([dataset.read(i) for i in range(40)], [1.0] * 40, 0)
    planned = dataset.facts_of(np.arange(40)).tokens_N
    assert batch.fusion.layout.cu_seqlens.diff().tolist() == planned.tolist()


def test_a_repeat_draws_new_masks(gold: Path) -> None:
    modalities = make_modalities()
    dataset = GoldDataset(gold, "train", modalities)
    collator = Collator(modalities, views=2, seed=5)
    samples = [dataset.read(i) for i in range(8)]
    again = [sample._replace(repeat=1) for sample in samples]
    first, second, once_more = (collator(s, [1.0] * 8, 0) for s in (samples, again, samples))
    assert equal(first, once_more)
    assert not torch.equal(first.inputs["image"].mask_NP1, second.inputs["image"].mask_NP1)
