from collections import Counter
from pathlib import Path

import pytest

from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.mixing import MixedDataset
from lanistr.data.reader import GoldDataset
from tests.model.support import NAMES, make_modalities
from tests.tiny_gold import write_gold


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[GoldDataset]:
    folder = tmp_path_factory.mktemp("mix")
    some = write_gold(folder / "a", {"train": 40}, lambda i: NAMES[: 1 + i % 4])
    more = write_gold(folder / "b", {"train": 24}, lambda _: NAMES, seed=1)
    return [GoldDataset(path, "train", make_modalities()) for path in (some, more)]


def loader(mixed: MixedDataset, ranks: int = 1, rank: int = 0) -> TrainLoader:
    return TrainLoader(
        mixed,
        Collator(make_modalities(), views=2, seed=0),
        global_batch=8,
        micro_batch=None,
        ranks=ranks,
        rank=rank,
        seed=0,
        grouping="grouped",
    )


def test_an_epoch_sees_each_sample_as_often_as_its_weight_says_with_other_masks(datasets: list[GoldDataset]) -> None:
    mixed = loader(MixedDataset(datasets, [1.0, 3.0]))
    assert mixed.steps_per_epoch == (40 + 3 * 24) // 8
    seen: Counter[str] = Counter()
    masks: dict[str, set[bytes]] = {}
    for step in mixed.steps(0, mixed.steps_per_epoch):
        for batch in step:
            # Keys are equal in both datasets where the sample's number is: presence tells them apart.
            seen.update(batch.keys)
            if batch.counts["mim"]:
                rows = batch.presence_B.bitwise_and(2).nonzero().flatten().tolist()
                for row, mask in zip(rows, batch.inputs["image"].mask_NP1.chunk(2)[1], strict=True):
                    masks.setdefault(batch.keys[row], set()).add(mask.numpy().tobytes())
    assert sum(seen.values()) == 112
    assert set(seen) == set(datasets[0].keys)
    assert [seen[key] for key in datasets[0].keys] == [4] * 24 + [1] * 16
    assert max(len(m) for m in masks.values()) >= 3


def test_every_step_is_a_mixture(datasets: list[GoldDataset]) -> None:
    plan = loader(MixedDataset(datasets, [1.0, 3.0])).plan
    shares = [float((step.items_G % plan.samples >= 40).mean()) for step in plan.steps(0)]
    assert min(shares) >= 0.5
    assert max(shares) <= 0.9


def test_a_mixture_is_another_dataset_than_its_parts_and_than_other_weights(datasets: list[GoldDataset]) -> None:
    ids = {MixedDataset(datasets, weights).content_id for weights in ([1.0, 1.0], [1.0, 2.0])}
    assert len(ids | {datasets[0].content_id}) == 3
    states = [loader(MixedDataset(datasets, [1.0, weight])).state(0) for weight in (1.0, 2.0)]
    assert [name for name, _, _ in states[0].differences(states[1])] == ["content_id"]


def test_ranks_divide_a_mixture_too(datasets: list[GoldDataset]) -> None:
    mixed = MixedDataset(datasets, [0.5, 2.0])
    alone = [sorted(k for b in step for k in b.keys) for step in loader(mixed).steps(0, 8)]
    both = [list(loader(mixed, 2, rank).steps(0, 8)) for rank in range(2)]
    assert [sorted(k for step in pair for b in step for k in b.keys) for pair in zip(*both, strict=True)] == alone


def test_datasets_of_another_schema_and_weights_of_nothing_are_refused(
    datasets: list[GoldDataset], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="weights are above 0"):
        MixedDataset(datasets, [1.0, 0.0])
    other = write_gold(tmp_path, {"train": 8}, lambda _: NAMES)
    text = (
        (other / "manifest.json").read_text().replace('"mean":1.0', '"mean":1.5').replace('"mean": 1.0', '"mean": 1.5')
    )
    (other / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot be mixed: their modalities differ.*fit_from"):
        MixedDataset([datasets[0], GoldDataset(other, "train", make_modalities())], [1.0, 1.0])
