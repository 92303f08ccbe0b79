import errno
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.reader import GoldDataset
from lanistr.data.remote import CachedStore, LocalStore, RemoteBlob, open_store
from tests.model.support import NAMES, make_modalities
from tests.tiny_gold import write_gold


class Flaky(LocalFileSystem):
    """A remote file system: the local one, failing as told, counting what it is asked for."""

    protocol = "flaky"
    cachable = False
    failures = 0
    wrong = 0
    asked: list[str] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def _fail(self, path: str) -> None:
        type(self).asked.append(Path(path).name)
        if type(self).failures > 0:
            type(self).failures -= 1
            raise ConnectionError("the bucket is on holiday")

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:  # type: ignore[override]
        self._fail(path)
        file = super().open(path, mode, **options)
        if type(self).wrong > 0:
            type(self).wrong -= 1
            file.read(1)
        return file

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self._fail(path)
        with open(self._strip_protocol(path), "rb") as file:
            file.seek(start or 0)
            return file.read() if end is None else file.read(end - (start or 0))


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    Flaky.failures, Flaky.wrong = 0, 0
    Flaky.asked = []
    return write_gold(tmp_path / "remote", {"train": 48}, lambda _: NAMES)


def store(gold: Path, tmp_path: Path, limit: int = 10**9) -> CachedStore:
    return CachedStore(f"flaky://{gold}", tmp_path / "cache", limit, attempts=3, wait=0.0)


def read(gold: Path, store: CachedStore) -> list[str]:
    dataset = GoldDataset(f"flaky://{gold}", "train", make_modalities(), "always", store)
    local = GoldDataset(gold, "train", make_modalities())
    members = [dataset.fetch(i).members for i in range(dataset.n)]
    assert members == [local.fetch(i).members for i in range(local.n)]
    return dataset.keys


def test_a_remote_dataset_is_downloaded_once_and_read_like_a_local_one(gold: Path, tmp_path: Path) -> None:
    read(gold, store(gold, tmp_path))
    tars = [name for name in Flaky.asked if name.endswith(".tar")]
    assert len(tars) == len(set(tars)) == 3
    Flaky.asked = []
    read(gold, store(gold, tmp_path))
    assert set(Flaky.asked) == {"manifest.json"}


@pytest.mark.parametrize("failures", [1, 2])
def test_a_remote_that_fails_twice_then_answers_is_no_failure(
    gold: Path, tmp_path: Path, failures: int, caplog: pytest.LogCaptureFixture
) -> None:
    made = store(gold, tmp_path)
    made.folder()
    Flaky.failures = failures
    read(gold, made)
    assert caplog.text.count("the bucket is on holiday") == failures


def test_a_remote_that_keeps_failing_is_an_error_that_says_how_often(gold: Path, tmp_path: Path) -> None:
    Flaky.failures = 99
    with pytest.raises(ValueError, match="3 tries failed: the bucket is on holiday"):
        read(gold, store(gold, tmp_path))


def test_a_damaged_download_is_never_kept(gold: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Flaky.wrong = 2
    read(gold, store(gold, tmp_path))
    assert caplog.text.count("sha256 differs") == 2


def test_the_least_recently_used_files_make_room(gold: Path, tmp_path: Path) -> None:
    sizes = [file.stat().st_size for file in (gold / "train").iterdir()]
    limit = int(sum(sizes) * 0.6)
    made = store(gold, tmp_path, limit)
    read(gold, made)
    kept = [f for f in (tmp_path / "cache").iterdir() if f.suffix in (".tar", ".parquet")]
    assert 0 < sum(file.stat().st_size for file in kept) <= limit
    assert not list((tmp_path / "cache").glob(".*.part"))


def test_a_file_in_use_survives_its_eviction(gold: Path, tmp_path: Path) -> None:
    made = store(gold, tmp_path)
    dataset = GoldDataset(f"flaky://{gold}", "train", make_modalities(), "always", made)
    first = dataset.fetch(0).members
    made._make_room(made.limit)
    assert dataset.fetch(0).members == first


@pytest.mark.parametrize("free_after_eviction", [True, False])
def test_a_full_cache_disk_first_makes_room_then_reads_piece_by_piece(
    gold: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    free_after_eviction: bool,
) -> None:
    made = store(gold, tmp_path)
    real, full = os.fsync, {"times": 1 if free_after_eviction else 10**6}

    def no_space(descriptor: int) -> None:
        if full["times"] and str(tmp_path / "cache") in os.readlink(f"/proc/self/fd/{descriptor}"):
            full["times"] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", no_space)
    read(gold, made)
    cached = [f for f in (tmp_path / "cache").iterdir() if f.suffix == ".tar"]
    assert len(cached) == (3 if free_after_eviction else 0)
    assert ("no space left" in caplog.text) == (not free_after_eviction)
    assert not list((tmp_path / "cache").glob(".*.part"))


def test_neighbours_in_a_file_that_is_not_cached_come_in_one_request(gold: Path, tmp_path: Path) -> None:
    path = next((gold / "train").glob("*.tar"))
    blob, data = RemoteBlob(store(gold, tmp_path), f"train/{path.name}"), path.read_bytes()
    Flaky.asked = []
    for offset, size, requests in ((512, 100, 1), (1536, 300, 1), (100, 50, 2), (len(data) - 10, 50, 3)):
        assert blob.read(offset, size) == data[offset : offset + size]
        assert len(Flaky.asked) == requests


def test_a_shard_that_is_gone_remotely_is_not_asked_for_again_and_again(gold: Path, tmp_path: Path) -> None:
    from lanistr.data.samples import CorruptSample

    dataset = GoldDataset(f"flaky://{gold}", "train", make_modalities(), "always", store(gold, tmp_path))
    dataset.read(20)
    name = dataset.shards[0].path
    assert len(dataset.facts(0).tokens_N) == 16  # its index is here
    (gold / name).unlink()
    Flaky.asked = []
    with pytest.raises(CorruptSample, match="cannot be read"):
        dataset.read(0)
    assert Flaky.asked == [Path(name).name]


def test_addresses_survive_the_command_line_and_paths_stay_paths(tmp_path: Path) -> None:
    made = open_store(Path("s3://bucket/gold"), "~/x", 5)
    assert isinstance(made, CachedStore)
    assert made.url == "s3://bucket/gold"
    assert made.cache == Path.home() / "x"
    local = open_store(Path(f"file://{tmp_path}"), tmp_path / "cache", 5)
    (tmp_path / "manifest.json").write_text("{}")
    assert (local.folder() / "manifest.json").read_text() == "{}"
    assert isinstance(open_store(tmp_path, "~", 5), LocalStore)
    assert isinstance(open_store("lake/gold", "~", 5), LocalStore)


def test_a_remote_dataset_can_be_sent_to_a_worker(gold: Path, tmp_path: Path) -> None:
    made = store(gold, tmp_path)
    dataset = GoldDataset(f"flaky://{gold}", "train", make_modalities(), "always", made)
    dataset.read(0)
    assert pickle.loads(pickle.dumps(dataset)).read(0).key == dataset.read(0).key


def test_an_address_of_an_unknown_kind_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        GoldDataset("nosuch://bucket/x", "train", make_modalities())


def test_the_next_window_is_fetched_while_this_one_is_read(gold: Path, tmp_path: Path) -> None:
    modalities = make_modalities()
    dataset = GoldDataset(f"flaky://{gold}", "train", modalities, "always", store(gold, tmp_path))
    loader = TrainLoader(
        dataset, Collator(modalities, 2, 0), global_batch=4, micro_batch=None, ranks=1, rank=0, seed=0,
        grouping="grouped", window=16,
    )  # fmt: skip
    first = next(loader.steps(0, 1))
    assert len(first[0].keys) == 4
    wanted = {dataset.shards[shard].sha256 for shard in loader.plan.shards_of_window(0, 4)}
    assert wanted
    deadline = time.monotonic() + 20
    while not all((tmp_path / "cache" / f"{sha256}.tar").exists() for sha256 in wanted):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_only_half_of_the_cache_is_filled_ahead(gold: Path, tmp_path: Path) -> None:
    made = store(gold, tmp_path, limit=1000)
    made.folder()
    Flaky.asked = []
    made.fetch_ahead([("train/a.tar", 400, "a"), ("train/b.tar", 400, "b")])
    for thread in threading.enumerate():
        if thread.name == "fetch-ahead":
            thread.join()
    assert Flaky.asked == ["a.tar"]
