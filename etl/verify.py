"""Re-read and re-hash a gold dataset: every checksum, every offset, every count, disjoint groups."""

import hashlib
import tarfile
import zlib
from pathlib import Path
from typing import Any

from etl.index import FOREIGN
from lanistr.manifest import SPLITS, Manifest, Shard, index_columns


def verify(gold: Path, *, deep: bool = False) -> list[str]:
    """Check a dataset; returns lines that say what was checked.

    Args:
        gold: dataset.
        deep: prove also what `etl.deep` proves.

    Raises:
        ValueError: the first thing that is wrong.
    """
    manifest = Manifest.load(gold)
    if manifest.tokenizer and _sha256(gold / manifest.tokenizer.file) != manifest.tokenizer.sha256:
        raise ValueError(f"{gold / manifest.tokenizer.file}: sha256 differs from the manifest")
    if manifest.content_id != manifest.compute_content_id():
        raise ValueError(f"{gold}: content_id does not belong to this manifest; was it edited?")
    groups: dict[str, set[str]] = {split: set() for split in SPLITS}
    keys: set[str] = set()
    for shard in manifest.shards:
        rows = _verify_shard(gold, shard, manifest)
        groups[shard.split] |= {row["group_hash"] for row in rows}
        repeated = keys & {row["key"] for row in rows}
        if repeated:
            raise ValueError(f"{shard.path}: key {min(repeated)} occurs twice")
        keys |= {row["key"] for row in rows}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = groups[a] & groups[b]
        if shared:
            raise ValueError(f"{len(shared)} groups lie in {a} and in {b}, for example {min(shared)}")
    lines = [f"{'split':<8}{'samples':>10}{'shards':>8}{'MiB':>8}"]
    for split in SPLITS:
        shards = manifest.shards_of(split)
        size = sum(s.bytes for s in shards) / 2**20
        lines.append(f"{split:<8}{manifest.n(split):>10,}{len(shards):>8}{size:>8.1f}")
    for name, bit in ((name, manifest.bit(name)) for name in manifest.modalities):
        present = sum(n for s in manifest.shards for mask, n in s.n_by_mask.items() if int(mask) & bit)
        lines.append(f"{name}: in {present:,} of {len(keys):,} samples")
    if deep:
        from etl.deep import verify_deep

        lines += verify_deep(gold, manifest)
    return [*lines, f"ok: {gold} {manifest.content_id[:16]}"]


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: missing, but the manifest names it")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _verify_shard(gold: Path, shard: Shard, manifest: Manifest) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    for name, expected in ((shard.path, shard.sha256), (shard.index, shard.index_sha256)):
        if _sha256(gold / name) != expected:
            raise ValueError(f"{gold / name}: sha256 differs from the manifest")
    rows = pq.read_table(gold / shard.index).to_pylist()
    expected_columns = [name for name, _ in index_columns(manifest.modalities, manifest.target)]
    if not rows or list(rows[0]) != expected_columns:
        raise ValueError(f"{gold / shard.index}: columns differ from the contract")
    masks = [str(row["presence"]) for row in rows]
    if len(rows) != shard.n or {m: masks.count(m) for m in set(masks)} != shard.n_by_mask:
        raise ValueError(f"{gold / shard.index}: counts differ from the manifest")
    there: dict[str, tuple[int, int, int]] = {}
    with tarfile.open(gold / shard.path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is None:  # a folder, in a foreign tar
                continue
            there[member.name] = (member.offset_data, member.size, zlib.crc32(file.read()))
    members = ["json", *(m for schema in manifest.modalities.values() for m in schema.stored)]
    indexed = {
        f"{row['key']}.{m}": (row[f"offset/{m}"], row[f"size/{m}"], row[f"crc32/{m}"])
        for row in rows
        for m in members
        if row[f"offset/{m}"] >= 0
    }
    # A foreign tar may have other suffixes than ours, and members that were left out.
    foreign = manifest.split_rule.get("method") == FOREIGN
    if not (set(indexed.values()) <= set(there.values()) if foreign else indexed == there):
        wrong = min(k for k in indexed.keys() | there.keys() if indexed.get(k) != there.get(k))
        raise ValueError(f"{gold / shard.path}: member {wrong} and the index disagree")
    for row in rows:
        mask = sum(
            manifest.bit(name)
            for name, s in manifest.modalities.items()
            if all(row[f"offset/{m}"] >= 0 for m in s.members)
        )
        if mask != row["presence"]:
            raise ValueError(f"{gold / shard.index}: presence of {row['key']} and its members disagree")
    return rows
