"""Raw files and finished datasets on S3, against a server of our own; skipped where moto and s3fs are not installed."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from etl.build import build
from lanistr.config import DataConfig
from lanistr.data.reader import load_manifest, open_split
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from tests.etl.test_table import recipe_of

pytest.importorskip("s3fs", reason="s3fs is not installed")
server = pytest.importorskip("moto.server", reason="moto[s3,server] is not installed")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket."""
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3", skip_instance_cache=True)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("lake")
    yield "s3://lake"
    running.stop()


def test_raw_files_are_read_from_s3_and_a_dataset_is_trained_on_there(bucket: str, tmp_path: Path) -> None:
    rows = "".join(f"i{i},text number {i},{i / 4}\n" for i in range(30)).encode()
    s3 = fsspec.filesystem("s3")
    s3.pipe("lake/raw/part-0.csv", b"id,words,n\n" + rows)
    s3.pipe("lake/raw/part-1.csv", b"id,words,n\n" + rows.replace(b"i", b"j") + b"broken\n")
    (tmp_path / "raw").mkdir()
    source = {"main": f"{bucket}/raw/part-*.csv", "id": "id", "text": {"columns": ["words"]}}
    recipe = recipe_of(source, tabular={"numeric": ["n"]}, text={"tokenizer": {"train": 200}})
    gold = build(recipe, tmp_path / "raw", tmp_path / "lake")
    manifest = Manifest.load(gold)
    assert [parent["file"] for parent in manifest.parents] == [f"s3://lake/raw/part-{i}.csv" for i in (0, 1)]
    assert sum(shard.n for shard in manifest.shards) == 60
    assert sum(manifest.quarantine.values()) == 1

    s3.put(str(gold), "lake/gold", recursive=True)
    config = DataConfig(cache=str(tmp_path / "cache"))
    there = f"{bucket}/gold"
    assert load_manifest(there, config).content_id == manifest.content_id
    modalities = make_modalities(manifest, {"text": {"hidden": 8, "layers": 1, "heads": 2}, "tabular": {}})
    local, remote = (open_split(path, "train", modalities, config) for path in (gold, there))
    for position in range(60):
        assert remote.fetch(position).members == local.fetch(position).members
