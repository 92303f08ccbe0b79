import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lanistr.data.loader import Collator, TrainLoader, eval_batches
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import CorruptSample
from tests.model.support import NAMES, make_modalities
from tests.tiny_gold import write_gold


def presence(i: int) -> list[str]:
    return list(NAMES) if i % 2 else ["text", "tabular"]


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    return write_gold(tmp_path / "gold", {"train": 48, "val": 8}, presence)


def open_train(gold: Path, crc: str = "first") -> GoldDataset:
    return GoldDataset(gold, "train", make_modalities(), crc)  # type: ignore[arg-type]


def place(dataset: GoldDataset, position: int, member: str) -> tuple[Path, int]:
    """File and offset of a member."""
    shard, row = dataset.locate(position)
    return Path(dataset.path) / dataset.shards[shard].path, int(
        dataset.index[shard].places_NM3[row, dataset.index.members.index(member), 0]
    )


def flip(gold: Path, position: int, member: str, at: int = 40) -> str:
    """Flip a bit; returns the sample's key."""
    dataset = open_train(gold)
    file, offset = place(dataset, position, member)
    data = bytearray(file.read_bytes())
    data[offset + at] ^= 1
    file.write_bytes(data)
    return dataset.keys[position]


def train(gold: Path, ranks: int = 1, rank: int = 0, workers: int = 0, max_bad: int = 100) -> TrainLoader:
    modalities = make_modalities()
    return TrainLoader(
        GoldDataset(gold, "train", modalities),
        Collator(modalities, views=2, seed=0),
        global_batch=8,
        micro_batch=None,
        ranks=ranks,
        rank=rank,
        seed=0,
        grouping="grouped",
        workers=workers,
        max_bad=max_bad,
    )


def epoch_keys(gold: Path, ranks: int = 1, workers: int = 0, epoch: int = 0) -> list[list[str]]:
    steps: list[list[str]] = [[] for _ in range(6)]
    for rank in range(ranks):
        made = list(train(gold, ranks, rank, workers).steps(6 * epoch, 6 * epoch + 6))
        assert len(made) == 6
        for step, batches in zip(steps, made, strict=True):
            step += [key for batch in batches for key in batch.keys]
    return [sorted(step) for step in steps]


def test_samples_are_read_member_by_member_like_tarfile_reads_them(gold: Path) -> None:
    import tarfile

    dataset = open_train(gold)
    expected = {}
    for shard in dataset.shards:
        with tarfile.open(gold / shard.path) as tar:
            expected |= {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    read = {f"{dataset.keys[i]}.{m}": data for i in range(dataset.n) for m, data in dataset.fetch(i).members.items()}
    assert read == {name: data for name, data in expected.items() if not name.endswith(".json")}


def test_bytes_of_modalities_that_the_recipe_does_not_use_are_never_read(gold: Path) -> None:
    used = {name: m for name, m in make_modalities().items() if name != "image"}
    dataset = GoldDataset(gold, "train", used)
    _, image = place(open_train(gold), 1, "jpg")
    blob = dataset._blob(0)
    original, read = blob.read, []
    blob.read = lambda offset, size: read.append((offset, offset + size)) or original(offset, size)  # type: ignore
    assert set(dataset.read(1).contents) == {"text", "tabular", "timeseries"}
    assert len(read) == 4, "one each for text and tabular, two for series"
    assert not any(low <= image < high for low, high in read)


def test_a_flipped_bit_is_found_and_names_the_sample(gold: Path) -> None:
    key = flip(gold, 3, "jpg")
    with pytest.raises(CorruptSample, match=rf"{key}\.jpg: crc32"):
        open_train(gold).read(3)


@pytest.mark.parametrize(("policy", "checks"), [("first", 1), ("always", 3), ("never", 0)])
def test_checksums_are_verified_as_often_as_asked(
    gold: Path, policy: str, checks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lanistr.data.reader as reader

    real, calls = reader.zlib.crc32, []
    monkeypatch.setattr(reader.zlib, "crc32", lambda data: calls.append(data) or real(data))
    dataset = open_train(gold, policy)
    for _ in range(3):
        dataset.read(0)
    assert len(calls) == checks * 2  # text and tabular


def test_a_bad_sample_is_replaced_by_one_of_its_kind_the_same_on_any_ranks_and_workers(
    gold: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = epoch_keys(gold)
    dataset = open_train(gold)
    presence_of = dict(zip(dataset.keys, dataset.presence, strict=True))
    bad = [flip(gold, 5, "jpg"), flip(gold, 20, "tok.npy", at=128)]
    with caplog.at_level(logging.WARNING):
        patched = epoch_keys(gold)
    for key in bad:
        assert any(key in record.message and "crc32" in record.message for record in caplog.records)
    assert patched == epoch_keys(gold, ranks=2) == epoch_keys(gold, ranks=4) == epoch_keys(gold, workers=1)
    differing = [(a, b) for a, b in zip(whole, patched, strict=True) if a != b]
    assert 1 <= len(differing) <= 2
    for before, after in differing:
        gone = [key for key in before if key in bad]
        came = list(after)
        for key in before:
            if key not in bad:
                came.remove(key)
        assert sorted(presence_of[k] for k in gone) == sorted(presence_of[k] for k in came)
    assert epoch_keys(gold, epoch=1) != patched
    loader = train(gold)
    list(loader.steps(0, 12))
    assert set(loader.bad) == set(bad)


def test_more_bad_samples_than_allowed_end_the_run_and_say_why(gold: Path) -> None:
    for position in (1, 3, 5):
        flip(gold, position, "jpg")
    list(train(gold, max_bad=3).steps(0, 6))
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"3 bad samples, more than max_bad 2; the last: .*crc32"):
            list(train(gold, max_bad=2, workers=workers).steps(0, 6))


def test_a_truncated_shard_loses_only_the_samples_beyond_its_end(gold: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = open_train(gold)
    file, offset = place(dataset, 12, "tok.npy")
    os.truncate(file, offset)
    loader = train(gold)
    keys = [key for step in loader.steps(0, 6) for batch in step for key in batch.keys]
    assert len(keys) == 48
    assert set(loader.bad) == set(dataset.keys[12:16])
    assert "truncated" in next(iter(loader.bad.values()))
    assert "the manifest says" in caplog.text
    assert set(keys) == set(dataset.keys) - set(dataset.keys[12:16])


def test_a_shard_that_vanishes_while_training_stops_nothing(gold: Path) -> None:
    loader = train(gold)
    (gold / loader.dataset.shards[1].path).unlink()  # type: ignore[union-attr]
    keys = [key for step in loader.steps(0, 6) for batch in step for key in batch.keys]
    assert len(keys) == 48
    assert set(loader.bad) == set(open_keys(loader)[16:32])
    assert "No such file" in next(iter(loader.bad.values()))


def open_keys(loader: TrainLoader) -> list[str]:
    assert isinstance(loader.dataset, GoldDataset)
    return loader.dataset.keys


def test_where_nothing_can_stand_in_the_run_ends(gold: Path) -> None:
    loader = train(gold)
    for shard in loader.dataset.shards:  # type: ignore[union-attr]
        (gold / shard.path).unlink()
    with pytest.raises(ValueError, match="no sample with the same modalities could be read in its place"):
        list(loader.steps(0, 6))


def test_evaluation_never_replaces_a_sample(gold: Path) -> None:
    dataset = GoldDataset(gold, "val", make_modalities())
    os.truncate(gold / dataset.shards[0].path, 2000)
    with pytest.raises(CorruptSample, match="truncated"):
        list(eval_batches(dataset, Collator(make_modalities(), 1, 0), batch=4, ranks=1, rank=0))


def rebuild_index(gold: Path) -> None:
    import pyarrow.parquet as pq

    path = next((gold / "train").glob("*.parquet"))
    table = pq.read_table(path)
    pq.write_table(table.slice(0, table.num_rows - 1), path)


def garble_index(gold: Path) -> None:
    next((gold / "train").glob("*.parquet")).write_bytes(b"not parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda gold: shutil.rmtree(gold / "train"), "missing, but the manifest names it"),
        (lambda gold: next((gold / "train").glob("*.parquet")).unlink(), "missing, but the manifest names it"),
        (lambda gold: next((gold / "train").glob("*.tar")).unlink(), "missing, but the manifest names it"),
        (lambda gold: (gold / "manifest.json").unlink(), r"no manifest\.json"),
        (rebuild_index, "missing, unreadable or stale: its sha256"),
        (garble_index, "missing, unreadable or stale"),
    ],
)
def test_a_missing_or_stale_index_is_an_error_that_names_it(
    gold: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(gold)
    with pytest.raises(ValueError, match=message):
        open_train(gold).read(0)


def test_only_as_much_index_as_a_window_needs_stays_in_memory(gold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lanistr.data.index as index

    monkeypatch.setattr(index, "MAX_ROWS", 32)
    dataset = open_train(gold)
    whole = [dataset.read(i).key for i in range(48)]
    assert len(dataset.index._loaded) == 2
    assert [dataset.read(i).key for i in range(48)] == whole
    assert dataset.index._rows == 32


def test_open_files_are_few(gold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lanistr.data.reader as reader

    monkeypatch.setattr(reader, "OPEN_FILES", 2)
    dataset = open_train(gold)
    before = len(os.listdir("/proc/self/fd"))
    for i in np.random.default_rng(0).permutation(48):
        dataset.read(int(i))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
