"""A gold dataset of made-up samples: 224 px pictures, tokens, a row of numbers."""

import hashlib
import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lanistr.manifest import Manifest, ModalitySchema, Shard, index_columns
from lanistr.transforms import MEMBERS, ImageSpec, NumericColumn, TabularSpec, TextSpec, npy_bytes

SCHEMAS = {
    "text": TextSpec(vocab_size=30000, max_tokens=128, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4),
    "image": ImageSpec(size=224),
    "tabular": TabularSpec(numeric=[NumericColumn(name=f"n{i}", mean=0.0, std=1.0) for i in range(8)], categorical=[]),
}


def write_dataset(folder: Path, n: int, per_shard: int, names: tuple[str, ...], links: int = 1) -> None:
    """A gold dataset with ``n`` samples of the modalities ``names``; ``links``: every shard so many times."""
    schemas = {
        name: ModalitySchema(kind=name, members=MEMBERS[name], spec=SCHEMAS[name].model_dump()) for name in names
    }
    pictures = [_jpeg(i) for i in range(64)] if "image" in names else [b""]
    for split in ("train", "val", "test"):
        (folder / split).mkdir(parents=True)
    rng = np.random.default_rng(0)
    shards: list[Shard] = []
    for start in range(0, n, per_shard):
        samples = []
        for i in range(start, min(n, start + per_shard)):
            ids = rng.integers(5, 30000, int(np.clip(rng.lognormal(np.log(45), 0.6), 4, 126)))
            members = {
                "text": ("tok.npy", npy_bytes(np.array([2, *ids, 3], dtype=np.uint16)), len(ids) + 2),
                "image": ("jpg", pictures[i % len(pictures)], 1),
                "tabular": ("tab.npy", npy_bytes(rng.normal(size=8).astype(np.float32)), 1),
            }
            samples.append((f"{i:016x}", {name: members[name] for name in names}))
        shard = _write_shard(folder, f"train/b-{start:07d}", samples, schemas)
        for link in range(links):
            linked = shard.model_copy(update={"path": shard.path.replace("b-", f"b{link}-")})
            os.link(folder / shard.path, folder / linked.path)
            shards.append(linked)
    manifest = Manifest(
        name="b", modalities=schemas, labels=["x"], split_rule={}, shards=shards, quarantine={}, counts={},
        parents=[], created_by={},
    )  # fmt: skip
    manifest.content_id = manifest.compute_content_id()
    manifest.save(folder)


def _write_shard(
    folder: Path, stem: str, samples: list[tuple[str, dict[str, Any]]], schemas: dict[str, ModalitySchema]
) -> Shard:
    rows: list[dict[str, Any]] = []
    with tarfile.open(folder / f"{stem}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            row: dict[str, Any] = {c: -1 if c.startswith("offset") else 0 for c, _ in index_columns(schemas)}
            row |= {"key": key, "group_hash": "", "source_file": "", "tab": [], "presence": (1 << len(schemas)) - 1}
            for name, (member, data, length) in [("", ("json", b"{}", 0)), *members.items()]:
                info = tarfile.TarInfo(f"{key}.{member}")
                info.size = len(data)
                row[f"offset/{member}"] = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(info, io.BytesIO(data))
                row |= {f"size/{member}": len(data), f"crc32/{member}": zlib.crc32(data)}
                row |= {f"length/{name}": length} if name else {}
            rows.append(row)
    types = {"string": pa.string(), "list<float32>": pa.list_(pa.float32())}
    fields = [(c, types.get(t) or getattr(pa, t)()) for c, t in index_columns(schemas)]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), folder / f"{stem}.parquet")
    tar_bytes, index_bytes = ((folder / f"{stem}.{suffix}").read_bytes() for suffix in ("tar", "parquet"))
    return Shard(
        split="train",
        path=f"{stem}.tar",
        index=f"{stem}.parquet",
        n=len(rows),
        bytes=len(tar_bytes),
        sha256=hashlib.sha256(tar_bytes).hexdigest(),
        index_sha256=hashlib.sha256(index_bytes).hexdigest(),
        n_by_mask={str((1 << len(schemas)) - 1): len(rows)},
    )


def _jpeg(seed: int) -> bytes:
    """A 224 px photo-like picture of about 15 KB: smooth shapes and grain."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize(
        (224, 224), Image.Resampling.BICUBIC
    )
    pixels = np.clip(np.asarray(coarse, dtype=float) + rng.normal(0, 4, (224, 224, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
