"""A gold dataset written by nothing of ours but the contract: `tarfile` and pyarrow."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lanistr.manifest import (
    SPLITS,
    Manifest,
    ModalitySchema,
    Shard,
    Target,
    Tokenizer,
    index_columns,
    item_members,
    sample_key,
)
from lanistr.transforms import MEMBERS, read_npy
from tests.model.support import SCHEMAS, random_members

CLASSES = ["low", "middle", "high"]


def write_gold(
    folder: Path,
    n: dict[str, int],
    present: Callable[[int], Sequence[str]],
    seed: int = 0,
    per_shard: int = 16,
    items: Mapping[str, int] | None = None,
    targets: Callable[[int], list[float]] | None = None,
    target: Target = "class",
    members: Callable[[int, np.random.Generator], dict[str, dict[str, bytes]]] = lambda i, rng: random_members(rng),
    tokenizer: str | None = None,
) -> Path:
    """Write ``n[split]`` samples per split; sample ``i`` has the modalities ``present(i)``.

    Where ``items`` allows a modality more than one, sample ``i`` has 1 + i modulo that many. ``targets(i)`` are the
    numbers of sample ``i`` of a ``target`` that is no class. ``members(i, rng)`` are those of sample ``i``, all modalities;
    ``tokenizer`` is the JSON of one.
    """
    schemas = {
        name: ModalitySchema(kind=name, members=MEMBERS[name], items=(items or {}).get(name, 1), spec=spec.model_dump())
        for name, spec in SCHEMAS.items()
    }
    shards = []
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
        for start in range(0, n.get(split, 0), per_shard):
            ids = range(start, min(start + per_shard, n[split]))
            shards.append(_write_shard(folder, split, ids, schemas, present, seed, targets, target, members))
    manifest = Manifest(
        name="tiny",
        modalities=schemas,
        tokenizer=_write_tokenizer(folder, tokenizer) if tokenizer else None,
        labels=CLASSES if targets is None else [f"t{j}" for j in range(len(targets(0)))],
        target=target,
        split_rule={},
        shards=shards,
        quarantine={},
        counts={},
        parents=[],
        created_by={},
    )
    manifest.content_id = manifest.compute_content_id()
    manifest.save(folder)
    return folder


def _write_tokenizer(folder: Path, tokenizer: str) -> Tokenizer:
    (folder / "tokenizer.json").write_text(tokenizer)
    return Tokenizer(file="tokenizer.json", sha256=hashlib.sha256(tokenizer.encode()).hexdigest())


def _write_shard(
    folder: Path,
    split: str,
    ids: range,
    schemas: dict[str, ModalitySchema],
    present: Callable[[int], Sequence[str]],
    seed: int,
    targets: Callable[[int], list[float]] | None,
    target: Target,
    make_members: Callable[[int, np.random.Generator], dict[str, dict[str, bytes]]],
) -> Shard:
    path = f"{split}/tiny-{split}-{ids.start:05d}.tar"
    rows: list[dict[str, Any]] = []
    with tarfile.open(folder / path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in ids:
            names = [name for name in schemas if name in present(i)]
            members = make_members(i, np.random.default_rng([seed, i, len(split)]))
            files = {"json": b"{}"} | {m: data for name in names for m, data in members[name].items()}
            for name in names:
                for item in range(1, 1 + i % schemas[name].items):
                    more = random_members(np.random.default_rng([seed, i, len(split), item]))[name]
                    files |= dict(zip(item_members(list(more), item), more.values(), strict=True))
            row = {column: -1 if column.startswith("offset") else 0 for column, _ in index_columns(schemas, target)}
            mask = sum(1 << bit for bit, name in enumerate(schemas) if name in names)
            row |= {"key": sample_key("tiny", split, str(i)), "group_hash": str(i), "presence": mask}
            row |= {
                "label": i % len(CLASSES),
                "cost": 1.0 + len(names),
                "source_file": "",
                "source_row": i,
                "tab": [],
            }
            if targets:
                row |= {"label": 0, "target": targets(i)}
            for name in names:
                first = schemas[name].members[0]
                row[f"length/{name}"] = len(read_npy(files[first])) if first in ("tok.npy", "ts.npy") else 1
            for member, data in files.items():
                info = tarfile.TarInfo(f"{row['key']}.{member}")
                info.size = len(data)
                row[f"offset/{member}"] = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(info, io.BytesIO(data))
                row[f"size/{member}"], row[f"crc32/{member}"] = len(data), zlib.crc32(data)
            rows.append(row)
    types = {"string": pa.string(), "list<float32>": pa.list_(pa.float32())}
    fields = [(c, types.get(t) or getattr(pa, t)()) for c, t in index_columns(schemas, target)]
    index = path.replace(".tar", ".parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), folder / index)
    masks = [str(row["presence"]) for row in rows]
    return Shard(
        split=split,
        path=path,
        index=index,
        n=len(rows),
        bytes=(folder / path).stat().st_size,
        sha256=hashlib.sha256((folder / path).read_bytes()).hexdigest(),
        index_sha256=hashlib.sha256((folder / index).read_bytes()).hexdigest(),
        n_by_mask={mask: masks.count(mask) for mask in sorted(set(masks))},
    )
