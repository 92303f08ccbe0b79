"""Foreign WebDataset tars -> a gold dataset: an index beside them and a manifest. The tars stay where and as they are.

Indexed are the members that training can decode: images (`IMAGES`), and with ``like`` those of another gold dataset
(``tok.npy``, ``tab.npy``, ...), whose schema says what they mean. Labels come from ``.cls`` or from ``label`` in ``.json``.
Raw text is not tokenised here: that would be other tars; write it with `python -m etl build`.
"""

import hashlib
import json
import os
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etl.shards import IMAGE_COST, write_index
from lanistr.manifest import MANIFEST_NAME, SPLITS, Manifest, ModalitySchema, Shard, Tokenizer
from lanistr.transforms import MEMBERS, ImageSpec, read_npy

IMAGES = {"jpg": "jpg", "jpeg": "jpg", "png": "jpg", "webp": "jpg"}  # suffix in the tar -> member of the index
LABELS = ("cls", "json")
FOREIGN = "given with the tars"  # the split rule of such a dataset


def index(
    tars: Mapping[str, Sequence[Path]],
    out: Path,
    *,
    size: int = 224,
    like: Path | None = None,
    ignore: Sequence[str] = (),
) -> Path:
    """Write index Parquets and a manifest into ``out``.

    Args:
        tars: by split, in order.
        out: new folder. It names the tars by relative paths: moving one of the two breaks it.
        size: shorter side in pixels that the images are meant for (without ``like``).
        like: gold dataset whose schema, labels and tokenizer the tars follow.
        ignore: suffixes of members that are left out.

    Raises:
        ValueError: no tars, a tar that is not plain, a member that cannot be read, a key that occurs twice, ``out`` exists.
    """
    if not any(tars.values()):
        raise ValueError("no tar given")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is there already; give another --out")
    parent = Manifest.load(like) if like else None
    if parent and parent.target != "class":
        raise ValueError(f"--like {like}: its target is {parent.target}; foreign tars can carry a class only")
    image = ModalitySchema(kind="image", members=MEMBERS["image"], spec=ImageSpec(size=size).model_dump())
    schemas = parent.modalities if parent else {"image": image}
    scan = _Scan(schemas, set(ignore))
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        shards = [
            _index_tar(path, split, i, out, temporary, scan)
            for split in SPLITS
            for i, path in enumerate(tars.get(split, ()))
        ]
        manifest = Manifest(
            name=out.name,
            modalities=schemas,
            tokenizer=_copy_tokenizer(parent, like, temporary),
            labels=_labels(parent, scan.labels),
            split_rule={"method": FOREIGN},
            shards=[shard for shard in shards if shard.n],
            quarantine={},
            counts={
                "samples": len(scan.seen),
                **{f"members .{m} left out": n for m, n in sorted(scan.ignored.items())},
            },
            parents=[{"file": str(s.path), "sha256": s.sha256} for s in shards],
            created_by={},
        )
        manifest.content_id = manifest.compute_content_id()
        manifest.save(temporary)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out / MANIFEST_NAME


class _Scan:
    """Reads the samples of tars, one index row each, and remembers what must hold across tars."""

    def __init__(self, schemas: Mapping[str, ModalitySchema], ignore: set[str]):
        self.schemas, self.ignore = schemas, ignore
        self.members = ["json", *(member for schema in schemas.values() for member in schema.stored)]
        self.seen: dict[str, Path] = {}
        self.labels: set[int] = set()
        self.ignored: Counter[str] = Counter()

    def rows(self, path: Path) -> Iterator[dict[str, Any]]:
        """A row per sample, in the order of the tar."""
        key, found = None, {}
        for here, suffix, offset, data in _members(path):
            if here != key:
                if key is not None:
                    yield self._row(path, key, found)
                key, found = here, {}
            member = self._member(path, here, suffix)
            if member in found:
                raise ValueError(f"{path}: sample {here} has two members {member} (.{suffix} is the second)")
            if member:
                found[member] = (offset, data)
        if key is not None:
            yield self._row(path, key, found)

    def _member(self, path: Path, key: str, suffix: str) -> str | None:
        """Name of a member in the index; None = left out."""
        image = any(schema.kind == "image" for schema in self.schemas.values())
        member = IMAGES.get(suffix, suffix) if image else suffix
        if suffix in self.ignore:
            self.ignored[suffix] += 1
            return None
        if member in self.members or suffix in LABELS:
            return member
        can = ", ".join(f".{m}" for m in [*self.members, *LABELS[:1]])
        raise ValueError(
            f"{path}: {key}.{suffix}: training cannot read it as it is (it reads {can}; .jpeg, .png and .webp as .jpg); "
            f"leave it out with --ignore {suffix}, or build tars from the raw data"
        )

    def _row(self, path: Path, key: str, found: dict[str, tuple[int, bytes]]) -> dict[str, Any]:
        if key in self.seen:
            raise ValueError(f"key {key} occurs in {self.seen[key]} and again in {path}; keys must be unique")
        self.seen[key] = path
        label, group = _label(path, key, found)
        self.labels.add(label)
        row: dict[str, Any] = {
            "key": key,
            "group_hash": group or hashlib.sha256(key.encode()).hexdigest()[:16],
            "presence": 0,
            "label": label,
            "cost": 1.0,
            "source_file": path.name,
            "source_row": len(self.seen),
            "tab": read_npy(found["tab.npy"][1]).tolist() if "tab.npy" in found else [],
        }
        for member in self.members:
            offset, data = found.get(member, (-1, b""))
            row |= {f"offset/{member}": offset, f"size/{member}": len(data), f"crc32/{member}": zlib.crc32(data)}
        for bit, (name, schema) in enumerate(self.schemas.items()):
            there = [member in found for member in schema.members]
            if any(there) and not all(there):
                raise ValueError(f"{path}: {key} has only some of the members {', '.join(schema.members)}")
            length = _length(found, schema) if all(there) else 0
            row["presence"] |= (1 << bit) * all(there)
            row["cost"] += IMAGE_COST * length if schema.kind == "image" else length
            row[f"length/{name}"] = length
        return row


def _members(path: Path) -> Iterator[tuple[str, str, int, bytes]]:
    """(key, suffix, offset of the content, content); a key goes to the first dot of the file name, as in webdataset."""
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                file = tar.extractfile(entry) if entry.isfile() else None
                if file is None:
                    continue
                folder, _, base = entry.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not dot or not stem:
                    continue  # webdataset passes over them too
                yield (f"{folder}/{stem}" if folder else stem), suffix.lower(), entry.offset_data, file.read()
    except (OSError, tarfile.TarError) as error:
        raise ValueError(
            f"{path}: not a plain tar that can be read at random ({error}); unpack a .tar.gz first"
        ) from None


def _label(path: Path, key: str, found: dict[str, tuple[int, bytes]]) -> tuple[int, str | None]:
    """Class id (-1 = none) and, in our own tars, the group."""
    try:
        header = json.loads(found["json"][1]) if "json" in found else {}
        if "cls" in found:
            return int(found["cls"][1]), None
        header = header if isinstance(header, dict) else {}
        return int(header.get("label", -1)), header.get("group")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: label of {key}: {error}") from None


def _length(found: dict[str, tuple[int, bytes]], schema: ModalitySchema) -> int:
    member = schema.members[0]
    return len(read_npy(found[member][1])) if member in ("tok.npy", "ts.npy") else 1


def _labels(parent: Manifest | None, ids: set[int]) -> list[str]:
    names = parent.labels if parent else [str(i) for i in range(max(ids, default=-1) + 1)]
    if max(ids, default=-1) >= len(names) or min(ids, default=0) < -1:
        raise ValueError(f"labels from {min(ids)} to {max(ids)}: allowed are -1 (none) to {len(names) - 1}")
    return names


def _copy_tokenizer(parent: Manifest | None, like: Path | None, folder: Path) -> Tokenizer | None:
    if parent is None or like is None or parent.tokenizer is None:
        return None
    shutil.copyfile(like / parent.tokenizer.file, folder / parent.tokenizer.file)
    return parent.tokenizer


def _index_tar(path: Path, split: str, number: int, out: Path, folder: Path, scan: _Scan) -> Shard:
    if not path.is_file():
        raise ValueError(f"{path}: no such tar")
    rows = list(scan.rows(path))
    masks = Counter(row["presence"] for row in rows)
    index_path = f"{split}/{number:05d}-{path.stem}.parquet"
    (folder / split).mkdir(exist_ok=True)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(
        split=split,
        path=os.path.relpath(path.resolve(), out.resolve()),
        index=index_path,
        n=len(rows),
        bytes=path.stat().st_size,
        sha256=digest,
        index_sha256=write_index(folder / index_path, rows, dict(scan.schemas)),
        n_by_mask={str(mask): masks[mask] for mask in sorted(masks)},
    )
