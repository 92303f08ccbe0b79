"""Fills the feature cache: what frozen encoders say about every sample that fine-tuning will ask for, computed once."""

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock

import lanistr
from lanistr.batch import Batch, to_device
from lanistr.config import FinetuneConfig, PretrainConfig
from lanistr.data.features import (
    CACHE,
    FORMAT,
    CachedDataset,
    CacheMeta,
    Features,
    PartWriter,
    part_path,
    positions_path,
)
from lanistr.data.loader import Collator
from lanistr.data.prefetch import prefetch
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import intact, read_samples
from lanistr.manifest import Manifest
from lanistr.modalities.base import Modality, ModalityEncoder
from lanistr.modalities.encoded import EncodedModality
from lanistr.training import distributed
from lanistr.training.durable import write_durably

logger = logging.getLogger(__name__)
BATCH = 64
ORIGIN = ("_name_or_path", "transformers_version")  # of a configuration: where it comes from
CODE = ("batch.py", "transforms.py", "modalities/*.py", "ops/*.py", "model/lanistr.py", "training/features.py")


class Encodes(Protocol):
    """A model with an encoder per modality: `Lanistr`, or a baseline's encoders."""

    encoders: torch.nn.ModuleDict

    def encoder(self, name: str) -> ModalityEncoder[Any]:
        """Of one modality."""
        ...


def cache_features(
    model: Encodes,
    config: FinetuneConfig | PretrainConfig,
    frozen: Sequence[str],
    splits: Mapping[str, GoldDataset],
    wanted: dict[str, np.ndarray],
    run: Path,
    device: torch.device,
    workers: int,
) -> dict[str, CachedDataset]:
    """The splits with the outputs of the frozen encoders in the place of their inputs. Every rank must call it.

    Args:
        model: with its weights, frozen.
        config: ``cache`` (a folder to share between runs, or True = in the run folder), ``cache_views``, ``precision``.
        frozen: parts, see `FinetuneConfig`.
        splits: ``train``, whose samples may have several views, and others, by name.
        wanted: positions of the samples that the cache holds, by split.
        run: run folder.
        device: where encoders run.
        workers: of the loader.

    Raises:
        ValueError: no frozen encoder, a stale or damaged cache, a sample that cannot be read, views of nothing.
    """
    names = [name for name in model.encoders if name in frozen]
    if not names:
        raise ValueError("finetune.cache: no encoder is frozen; give finetune.freeze=encoders, or leave the cache off")
    count = config.cache_views if isinstance(config, FinetuneConfig) else 1
    views = {name: count if splits["train"].modalities[name].augments else 1 for name in names}
    if count > 1 and max(views.values()) == 1:
        raise ValueError(f"finetune.cache_views: {count}, but none of {', '.join(names)} is augmented")
    folder = Path(config.cache).expanduser() if isinstance(config.cache, str) else run / "features"
    identity = identify(model, config, names, views, splits["train"], wanted)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")) if distributed.rank() == 0 else nullcontext():
        distributed.barrier()  # another run may have been filling it
        meta = CacheMeta.load(folder)
        if meta is not None:
            meta.check(identity, folder)
            if distributed.rank() == 0:
                logger.info("features of %s: from %s", ", ".join(names), folder)
        else:
            _refuse_other_files(folder)
            distributed.barrier()  # nobody writes before all have looked
            maker = _Maker(model, names, views, config, device, workers)
            meta = _make(folder, maker, splits, wanted, identity)
    once = dict.fromkeys(views, 1)
    return {
        name: _open(split, folder, meta, config.precision, views if name == "train" else once)
        for name, split in splits.items()
    }


def _open(dataset: GoldDataset, folder: Path, meta: CacheMeta, dtype: str, views: dict[str, int]) -> CachedDataset:
    features = Features(folder, dataset.split, meta, dtype, views)
    encoded = [
        EncodedModality(dataset.modalities[name], meta.hidden[name], dtype, count) for name, count in views.items()
    ]
    return CachedDataset(dataset, features, encoded)


def identify(
    model: Encodes,
    config: FinetuneConfig | PretrainConfig,
    names: Sequence[str],
    views: dict[str, int],
    train: GoldDataset,
    wanted: dict[str, np.ndarray],
) -> dict[str, Any]:
    """All that the features depend on, and which samples there are."""
    manifest = train.manifest
    return {
        "format": FORMAT,
        "data": train.view_id,
        "weights": {name: hash_weights(model.encoder(name).encoder) for name in names},
        "architecture": {name: _hash_architecture(model.encoder(name).encoder) for name in names},
        "transform": {name: _hash_transform(manifest, train.modalities[name]) for name in names},
        "tokenizer": manifest.tokenizer.sha256 if manifest.tokenizer else None,
        "dtype": config.precision,
        "views": views,
        "seed": config.seed if max(views.values()) > 1 else None,
        "samples": {split: hashlib.sha256(p.astype("<i8").tobytes()).hexdigest() for split, p in wanted.items()},
        "code": hash_code(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }


def hash_weights(module: torch.nn.Module) -> str:
    """sha256 over names, shapes, dtypes and bytes of parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _hash_architecture(module: torch.nn.Module) -> str | None:
    """Of what a published model's own configuration says beside its weights: heads, activation, epsilon."""
    config = getattr(module, "config", None)
    if config is None:
        return None
    described = {key: value for key, value in config.to_dict().items() if key not in ORIGIN}
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _hash_transform(manifest: Manifest, modality: Modality[Any, Any]) -> str:
    """Of what a sample goes through before the encoder. Where its weights lay does not matter: they are hashed."""
    block = {key: value for key, value in modality.block.items() if key != "pretrained"}
    described = [manifest.modalities[modality.name].model_dump(mode="json"), block]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def hash_code() -> str:
    """sha256 over the source files that features come out of."""
    root = Path(lanistr.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in root.glob(pattern)):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Batches:
    """Batch ``i`` of some samples. Runs in worker processes."""

    dataset: GoldDataset
    collator: Collator
    positions: np.ndarray
    augment: tuple[object, ...] | None

    def __call__(self, index: int) -> Batch:
        chosen = self.positions[index * BATCH : (index + 1) * BATCH].tolist()
        samples = intact(read_samples(self.dataset, chosen, None, self.augment))
        return self.collator(samples, [1.0] * len(samples), 0)


class _Maker:
    """Copies of the frozen encoders, in the precision of the run."""

    def __init__(
        self,
        model: Encodes,
        names: Sequence[str],
        views: dict[str, int],
        config: FinetuneConfig | PretrainConfig,
        device: torch.device,
        workers: int,
    ):
        dtype = getattr(torch, config.precision)
        encoders = {name: copy.deepcopy(model.encoder(name)) for name in names}
        self.encoders = {name: encoder.to(device=device, dtype=dtype).eval() for name, encoder in encoders.items()}
        self.names, self.views, self.config, self.device, self.workers = list(names), views, config, device, workers

    def batches(self, dataset: GoldDataset, names: Sequence[str], positions: np.ndarray, view: int) -> Iterator[Batch]:
        """Of the given modalities only; augmented where there are several views."""
        modalities = {name: dataset.modalities[name] for name in names}
        own = dataset.only(names)
        augmented = dataset.split == "train" and max(self.views.values()) > 1
        augment = (self.config.seed, "view", view) if augmented else None
        make = _Batches(own, Collator(modalities, views=1, seed=0), positions, augment)
        heavy = any(modality.heavy for modality in modalities.values())
        return prefetch(make, range(-(-len(positions) // BATCH)), self.workers, heavy, self.device)

    @torch.no_grad()
    def rows(self, name: str, source: int, sources: int, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a modality that enter fusion, and how many each sample has."""
        encoder, inputs = self.encoders[name], batch.inputs[name]
        slot_T = batch.fusion.slot_T.cpu().numpy()
        counts_B = np.bincount(slot_T, minlength=batch.size * sources).reshape(batch.size, sources)[:, source]
        rows_RH = encoder.entering(encoder.encode(inputs), inputs)[: int(counts_B.sum())].cpu()
        rows_RH = rows_RH.to(getattr(torch, self.config.precision))
        bits = rows_RH.view(torch.uint16) if rows_RH.dtype == torch.bfloat16 else rows_RH
        return bits.numpy(), counts_B

    def write(self, folder: Path, part: int, dataset: GoldDataset, positions: np.ndarray) -> dict[str, int]:
        """Write this rank's part of a split; returns the width per modality."""
        np.save(positions_path(folder, dataset.split, part), positions)
        hidden: dict[str, int] = {}
        for view in range(max(self.views.values()) if dataset.split == "train" else 1):
            names = [name for name in self.names if view < self.views[name]]
            writers = {name: PartWriter(part_path(folder, dataset.split, part, name, view)) for name in names}
            for batch in self.batches(dataset, names, positions, view):
                here = to_device(batch, self.device)
                for i, name in enumerate(names):
                    rows_RH, counts_B = self.rows(name, i + 1, 1 + len(names), here)
                    writers[name].add(rows_RH, counts_B)
                    hidden[name] = rows_RH.shape[1]
            for writer in writers.values():
                writer.close()
        return hidden


def _make(
    folder: Path,
    maker: _Maker,
    splits: Mapping[str, GoldDataset],
    wanted: dict[str, np.ndarray],
    identity: dict[str, Any],
) -> CacheMeta:
    """Every rank encodes its share; the description is written last."""
    rank, world = distributed.rank(), distributed.world_size()
    if rank == 0:
        logger.info("features of %s: computing, into %s", ", ".join(maker.names), folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    hidden: dict[str, int] = {}
    for split, dataset in splits.items():
        share = np.array_split(np.sort(wanted[split]), world)[rank]
        hidden |= maker.write(folder, rank, dataset, share)
    widths = [h for h in distributed.gather_objects(hidden) if h]
    meta = CacheMeta(json.loads(json.dumps(identity)), {k: v for h in widths for k, v in h.items()}, world)
    distributed.barrier()
    if rank == 0:
        write_durably(folder / CACHE, json.dumps(meta.__dict__, indent=1))
    distributed.barrier()
    return meta


def _refuse_other_files(folder: Path) -> None:
    """What may be overwritten is an unfinished cache and nothing else."""
    others = [p.name for p in folder.iterdir() if p.suffix not in (".rows", ".npy")] if folder.is_dir() else []
    if others:
        raise ValueError(f"finetune.cache {folder}: holds {others[0]}, which is no feature cache; give an empty folder")
