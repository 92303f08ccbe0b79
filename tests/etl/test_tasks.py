"""The gold phase as tasks: same bytes whatever runs them and whatever is killed; nothing is done twice."""

import gzip
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.build import build, build_plan, build_share
from etl.cluster import DEATHS, Dask, Executor, InProcess, Pool, executor
from etl.lake import lock
from etl.silver import ROW_GROUP, write_parts
from lanistr.manifest import Manifest
from tests.etl.dying import die, die_once
from tests.etl.test_build import RECIPE, bytes_of, recipe_of, samples_of, write_raw

BUCKETS = {"train": 6, "val": 2, "test": 1}


def new_lake(folder: Path, buckets: dict[str, int] = BUCKETS) -> Path:
    """A lake in which the toy dataset has so many buckets (a first build would choose one)."""
    fit = folder / "fit" / "toy"
    fit.mkdir(parents=True)
    (fit / "buckets.json").write_text(json.dumps(buckets))
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("tasks") / "raw")


@pytest.fixture(scope="module")
def undisturbed(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    gold = build(recipe_of(), raw, new_lake(tmp_path_factory.mktemp("undisturbed") / "lake"))
    assert len(list(gold.rglob("*.tar"))) >= 8
    return bytes_of(gold)


def inodes(gold: Path) -> dict[str, int]:
    return {str(p.relative_to(gold)): p.stat().st_ino for p in gold.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def dask_address() -> str:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster:
        yield cluster.scheduler_address


def test_a_local_pool_gives_the_same_bytes(raw: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    assert bytes_of(build(recipe_of(), raw, new_lake(tmp_path), executor=Pool(2))) == undisturbed


def test_a_dask_cluster_gives_the_same_bytes(
    raw: Path, tmp_path: Path, undisturbed: dict[str, str], dask_address: str
) -> None:
    assert bytes_of(build(recipe_of(), raw, new_lake(tmp_path), executor=Dask(dask_address))) == undisturbed


def test_array_jobs_give_the_same_bytes_in_any_order_and_the_finish_does_nothing_twice(
    raw: Path, tmp_path: Path, undisturbed: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    lake = new_lake(tmp_path)
    with pytest.raises(ValueError, match="--prepare first"):
        build_share(recipe_of(), raw, lake, 0, 3)
    build_plan(recipe_of(), raw, lake)
    for member in (2, 0):  # member 1 was killed, say
        build_share(recipe_of(), raw, lake, member, 3)
    with pytest.raises(ValueError, match="another recipe"):
        build_share(recipe_of(shard_size=7), raw, lake, 1, 3)
    before = inodes(lake / "gold" / "toy")
    capsys.readouterr()
    gold = build(recipe_of(), raw, lake)
    assert "prepared before" in capsys.readouterr().err
    assert bytes_of(gold) == undisturbed
    assert before.items() <= inodes(gold).items()


def test_a_bucket_holds_the_groups_whose_hash_says_so(raw: Path, tmp_path: Path) -> None:
    build(recipe_of(), raw, new_lake(tmp_path))
    seen = set()
    for path in sorted((tmp_path / "silver" / "toy" / "samples").iterdir()):
        rows = pq.read_table(path).to_pylist()
        assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
        for row in rows:
            digest = hashlib.md5(f"lanistr:bucket:{row['grp']}".encode()).digest()
            bucket = int.from_bytes(digest, "little") % BUCKETS[row["split"]]
            assert path.stem == f"{row['split']}-b{bucket:05d}"
            assert row["key"] == hashlib.sha256(f"toy|{row['grp']}|{row['row_id']}".encode()).hexdigest()[:16]
            seen.add(bucket)
    assert seen == set(range(BUCKETS["train"]))


def test_a_rebuild_writes_no_shard_again(raw: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    gold = build(recipe_of(), raw, new_lake(tmp_path))
    before = inodes(gold)
    build(recipe_of(), raw, tmp_path)
    after = inodes(gold)
    assert {name for name in before if before[name] != after[name]} <= {
        "manifest.json",
        *(name for name in before if name.startswith("tokenizer-")),
    }
    assert bytes_of(gold) == undisturbed


def test_a_lost_shard_is_made_again(raw: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    gold = build(recipe_of(), raw, new_lake(tmp_path))
    next(gold.rglob("*.tar")).unlink()
    build(recipe_of(), raw, tmp_path)
    assert bytes_of(gold) == undisturbed


def test_new_rows_touch_only_their_buckets_and_keep_the_fit(tmp_path: Path) -> None:
    tree = {**RECIPE, "source": {**RECIPE["source"], "main": "items.csv"}}
    raw = write_raw(tmp_path / "raw")
    items = gzip.decompress((raw / "items.csv.gz").read_bytes()).decode()
    (raw / "items.csv").write_text(items)
    lake = new_lake(tmp_path / "lake")
    first = Manifest.load(build(recipe_of(tree), raw, lake))
    (raw / "items.csv").write_text(f"{items}\nnew1,o_new,yes,3.5,a\nnew2,o_new,yes,,unheard")
    gold = build(recipe_of(tree), raw, lake)
    second = Manifest.load(gold)
    kept = {shard.path for shard in first.shards} & {shard.path for shard in second.shards}
    assert len(kept) == len(first.shards) - 1
    assert len(samples_of(gold)) >= 122  # the old shards are still there, for whoever reads the old manifest
    assert sum(second.n(split) for split in ("train", "val", "test")) == 122
    assert second.modalities == first.modalities
    assert second.tokenizer == first.tokenizer


def test_another_photo_under_the_same_name_touches_only_its_bucket(raw: Path, tmp_path: Path) -> None:
    copy = write_raw(tmp_path / "raw")
    lake = new_lake(tmp_path / "lake")
    first = Manifest.load(build(recipe_of(), copy, lake))
    photo = copy / "photos" / "i0.jpg"
    photo.write_bytes((copy / "photos" / "i3.jpg").read_bytes())
    second = Manifest.load(build(recipe_of(), copy, lake))
    assert len({s.path for s in first.shards} - {s.path for s in second.shards}) == 1


def start(raw: Path, lake: Path, workers: int = 1) -> subprocess.Popen[bytes]:
    (lake / "toy.yaml").write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-m", "etl", "build", str(lake / "toy.yaml"), "--raw", str(raw), "--lake", str(lake)]
    return subprocess.Popen(
        [*command, "--workers", str(workers)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0
    )


def kill_and_rerun(raw: Path, folder: Path, moments: int, seed: int, undisturbed: dict[str, str]) -> None:
    """Kill a build at random moments of its life; after each kill, finish it in the same lake and compare."""
    rng = np.random.default_rng(seed)
    whole = new_lake(folder / "whole")
    started = time.monotonic()
    assert start(raw, whole).wait() == 0
    seconds = time.monotonic() - started
    interrupted = 0
    for moment in range(moments):
        lake = new_lake(folder / str(moment))
        process = start(raw, lake, workers=1 + moment % 2)
        time.sleep(float(rng.uniform(0.3, 1.0)) * seconds)
        interrupted += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
        gold = lake / "gold" / "toy"
        tars = {name: inode for name, inode in inodes(gold).items() if name.endswith(".json")} if gold.exists() else {}
        reports = {name: inode for name, inode in tars.items() if name.startswith("reports/") and "/." not in name}
        assert start(raw, lake).wait() == 0
        assert bytes_of(gold) == undisturbed
        assert reports.items() <= inodes(gold).items(), "a finished task was done again"
        assert not list(lake.rglob(".*.tmp"))
    assert interrupted


def test_kill_9_and_rerun_give_the_bytes_of_an_undisturbed_build(
    raw: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    kill_and_rerun(raw, tmp_path, 3, 0, undisturbed)


@pytest.mark.slow
def test_kill_9_at_20_random_moments_and_rerun_give_the_same_bytes(
    raw: Path, tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    kill_and_rerun(raw, tmp_path, 20, 1, undisturbed)


def test_two_builds_of_one_dataset_at_once_are_one_clear_line(raw: Path, tmp_path: Path) -> None:
    with lock(tmp_path, "toy"), pytest.raises(ValueError, match=r"another build of toy .* is running; wait for it"):
        build(recipe_of(), raw, tmp_path)
    with lock(tmp_path, "toy"):
        assert start(raw, tmp_path).wait() == 2
    with lock(tmp_path, "toy", shared=True), lock(tmp_path, "toy", shared=True):
        pass


@pytest.mark.parametrize("kind", ["pool", "dask"])
def test_a_worker_killed_in_the_middle_loses_nothing(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    where: Executor = Pool(2) if kind == "pool" else Dask(request.getfixturevalue("dask_address"))
    assert sorted(where.map(partial(die_once, tmp_path), range(8))) == list(range(8))
    assert (tmp_path / "died").exists()


def test_a_pool_whose_workers_keep_dying_gives_up_with_a_clear_line() -> None:
    with pytest.raises(ValueError, match=f"died {DEATHS} times"):
        list(Pool(1).map(die, [1]))


def test_executors_are_chosen_by_the_command_line() -> None:
    assert executor(1) == InProcess()
    assert executor(3) == Pool(3)
    assert executor(3, "tcp://host:1") == Dask("tcp://host:1")
    with pytest.raises(ValueError, match="no dask scheduler"):
        list(Dask("tcp://127.0.0.1:9", timeout=0.5).map(die, [1]))


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 3 * ROW_GROUP), max_size=6), second=st.integers(0, 2 * ROW_GROUP))
def test_equal_rows_give_equal_silver_files_however_they_are_batched(
    cuts: list[int], second: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    n = 3 * ROW_GROUP
    table = pa.table(
        {
            "split": ["test"] * second + ["train"] * (n - second),
            "bucket": pa.array([1] * n, pa.int32()),
            "key": [f"{i:016x}" for i in range(n)],
        }
    )
    places = [0, *sorted(cuts), n]
    batches = [b for a, e in itertools.pairwise(places) for b in table.slice(a, e - a).to_batches()]
    folder = tmp_path_factory.mktemp("parts")
    counts = write_parts(pa.RecordBatchReader.from_batches(table.schema, batches), folder / "a")
    whole = write_parts(pa.RecordBatchReader.from_batches(table.schema, table.to_batches()), folder / "b")
    assert counts == whole == {key: v for key, v in {("test", 1): second, ("train", 1): n - second}.items() if v}
    assert bytes_of(folder / "a") == bytes_of(folder / "b")
    read = pa.concat_tables(pq.read_table(p) for p in sorted((folder / "a").iterdir()))
    assert read.column("key").to_pylist() == table.column("key").to_pylist()
