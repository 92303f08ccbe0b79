"""Tars that webdataset's own writer made (PAX headers, other keys, other members in between) are read through an index."""

import hashlib
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds

from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.reader import GoldDataset
from lanistr.manifest import Manifest, ModalitySchema, Shard, index_columns
from lanistr.transforms import MEMBERS
from tests.model.support import NAMES, SCHEMAS, make_modalities, random_members


def write_foreign(path: Path, n: int) -> dict[str, list[str]]:
    """Returns the modalities of each key."""
    present = {}
    with wds.TarWriter(str(path)) as writer:
        for i in range(n):
            names = [name for bit, name in enumerate(NAMES) if (i + 1) >> bit & 1] or ["text"]
            members = random_members(np.random.default_rng(i))
            files = {m: data for name in names for m, data in members[name].items()}
            key = f"photos/summer_{i:03d}"
            writer.write({"__key__": key, "note.txt": b"of no use to us", **files})
            present[key] = names
    return present


def index(path: Path, schemas: dict[str, ModalitySchema]) -> pa.Table:
    """What an index builder finds by scanning the tar."""
    rows: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as tar:
        for info in tar:
            key, _, member = info.name.partition(".")
            data = tar.extractfile(info).read()  # type: ignore[union-attr]
            empty = {c: -1 if c.startswith("offset") else 0 for c, _ in index_columns(schemas)}
            row = rows.setdefault(key, empty | {"key": key, "group_hash": "", "source_file": "", "tab": []})
            for bit, (name, schema) in enumerate(schemas.items()):
                if member in schema.members:
                    row["presence"] |= 1 << bit
                    row[f"length/{name}"] = 1
                    row |= {f"offset/{member}": info.offset_data, f"size/{member}": len(data)}
                    row[f"crc32/{member}"] = zlib.crc32(data)
    types = {"string": pa.string(), "list<float32>": pa.list_(pa.float32())}
    fields = [(c, types.get(t) or getattr(pa, t)()) for c, t in index_columns(schemas)]
    return pa.Table.from_pylist(list(rows.values()), schema=pa.schema(fields))


def test_foreign_webdataset_tars_are_read_through_a_built_index(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    gold = tmp_path / "indexed"
    gold.mkdir()
    tar = tmp_path / "elsewhere" / "shard-000.tar"
    present = write_foreign(tar, 24)
    schemas = {n: ModalitySchema(kind=n, members=MEMBERS[n], spec=s.model_dump()) for n, s in SCHEMAS.items()}
    pq.write_table(index(tar, schemas), gold / "shard-000.parquet")
    shard = Shard(
        split="train",
        path="../elsewhere/shard-000.tar",
        index="shard-000.parquet",
        n=24,
        bytes=tar.stat().st_size,
        sha256=hashlib.sha256(tar.read_bytes()).hexdigest(),
        index_sha256=hashlib.sha256((gold / "shard-000.parquet").read_bytes()).hexdigest(),
        n_by_mask={},
    )
    manifest = Manifest(
        name="foreign", modalities=schemas, labels=[], split_rule={}, shards=[shard], quarantine={}, counts={},
        parents=[], created_by={}, content_id="foreign",
    )  # fmt: skip
    manifest.save(gold)
    dataset = GoldDataset(gold, "train", make_modalities(), "always")
    assert dataset.keys == list(present)
    for i, names in enumerate(present.values()):
        assert sorted(dataset.read(i).contents) == sorted(names)
        expected = random_members(np.random.default_rng(i))
        assert dataset.fetch(i).members == {m: data for name in names for m, data in expected[name].items()}
    loader = TrainLoader(
        dataset, Collator(make_modalities(), 2, 0), global_batch=8, micro_batch=None, ranks=1, rank=0, seed=0,
        grouping="grouped",
    )  # fmt: skip
    seen = [key for step in loader.steps(0, 3) for batch in step for key in batch.keys]
    assert sorted(seen) == sorted(present)
