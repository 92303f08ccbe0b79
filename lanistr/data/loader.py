"""Samples -> batches: corruption masks, dummies, packing, and the order of the plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lanistr.batch import Batch, make_fusion_index
from lanistr.data.plan import deal, epoch_order, eval_order, philox
from lanistr.data.reader import GoldDataset, Sample
from lanistr.modalities.base import Collated, Modality


@dataclass(frozen=True)
class Collator:
    """Makes a `Batch` of samples.

    Masks come from a counter-based generator keyed by (seed, epoch, sample key, modality): they depend on neither rank,
    worker nor batch.

    Attributes:
        views: 2 = clean and masked (pretraining), 1 = clean.
        modality_dropout: chance that a present modality is treated as absent; a sample that would lose all keeps all.
    """

    modalities: Mapping[str, Modality[Any, Any]]
    views: int
    seed: int
    modality_dropout: float = 0.0

    def __call__(self, samples: Sequence[Sample], weights: Sequence[float], epoch: int) -> Batch:
        """Collate at least one sample.

        Args:
            samples: decoded.
            weights: 0 for the padding samples of evaluation.
            epoch: draws new masks.
        """
        if self.modality_dropout:
            samples = [self._drop(sample, epoch) for sample in samples]
        weights_B = np.asarray(weights, dtype=np.float32)
        inputs: dict[str, Any] = {}
        samples_with_weight = float((weights_B > 0).sum())
        counts: dict[str, float] = {"mmm": samples_with_weight, "decorrelation": samples_with_weight}
        tokens, rows, pools = [], [], []
        for name, modality in self.modalities.items():
            present = [i for i, sample in enumerate(samples) if name in sample.contents]
            collated = self._collate(name, modality, [samples[i] for i in present], weights_B[present], epoch)
            inputs[name] = collated.inputs
            counts[modality.term] = counts.get(modality.term, 0.0) + collated.count
            pools.append(int(collated.token_counts.sum()))
            tokens.append(collated.token_counts if present else np.zeros(0, dtype=np.int64))
            rows.append(np.array(present, dtype=np.int64))
        labels = np.array([sample.label for sample in samples], dtype=np.int64)
        if self.views == 1:
            counts = {"cls": float(((labels >= 0) & (weights_B > 0)).sum())}
        return Batch(
            keys=tuple(sample.key for sample in samples),
            views=self.views,
            labels_B=torch.from_numpy(labels),
            weights_B=torch.from_numpy(weights_B),
            presence_B=torch.tensor([sample.presence for sample in samples]),
            inputs=inputs,
            fusion=make_fusion_index(tokens, rows, pools, weights_B, self.views),
            counts=counts,
        )

    def _drop(self, sample: Sample, epoch: int) -> Sample:
        draws = philox("drop", self.seed, epoch, sample.key).random(len(self.modalities))
        dropped = {name for name, draw in zip(self.modalities, draws, strict=True) if draw < self.modality_dropout}
        kept = {name: content for name, content in sample.contents.items() if name not in dropped}
        return replace(sample, contents=kept) if kept else sample

    def _collate(
        self, name: str, modality: Modality[Any, Any], present: list[Sample], weights: np.ndarray, epoch: int
    ) -> Collated[Any]:
        contents = [sample.contents[name] for sample in present]
        keys = [sample.key for sample in present]
        if not present:  # the law of equal work: a dummy of weight 0 runs in the same place
            contents, keys, weights = [modality.dummy()], ["dummy"], np.zeros(1, dtype=np.float32)
        masks = None
        if self.views == 2:
            masks = [
                modality.corrupt(content, philox("corrupt", self.seed, epoch, key, name))
                for content, key in zip(contents, keys, strict=True)
            ]
        return modality.collate(contents, masks, weights.tolist())


class _Batches(Dataset[Batch]):
    """Micro-batch ``i`` of a fixed list of positions (-1 = a padding sample of weight 0)."""

    def __init__(self, dataset: GoldDataset, collator: Collator, positions: Sequence[np.ndarray], epoch: int):
        self.dataset, self.collator, self.positions, self.epoch = dataset, collator, positions, epoch

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> Batch:
        samples = [self.dataset.read(max(0, int(position))) for position in self.positions[i]]
        weights = [float(position >= 0) for position in self.positions[i]]
        return self.collator(samples, weights, self.epoch)


def _iterate(batches: _Batches, workers: int) -> Iterator[Batch]:
    if workers == 0:
        return (batches[i] for i in range(len(batches)))
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="forkserver",
        worker_init_fn=_one_thread,
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class LoaderState:
    """Where a run is in the data: a few integers and the identity of what they count."""

    content_id: str
    seed: int
    grouping: str
    global_batch: int
    samples: int
    step: int

    def check(self, other: "LoaderState") -> None:
        """Raises ValueError naming both values where two states count different things."""
        for name in ("content_id", "seed", "grouping", "global_batch", "samples"):
            saved, now = getattr(self, name), getattr(other, name)
            if saved != now:
                raise ValueError(f"cannot resume: the checkpoint was trained with {name} {saved}, this run has {now}")


class TrainLoader:
    """Optimizer steps of one rank, in the order of the plan.

    Args:
        dataset: the split.
        collator: makes batches.
        global_batch: samples per step over all ranks.
        micro_batch: samples per rank and forward pass; None = global_batch / ranks.
        ranks, rank: the world.
        seed, grouping: of the plan.
        workers: loader processes; 0 = in this process.
        positions: a subset of the split (None = all of it).

    Raises:
        ValueError: sizes that do not divide, or fewer samples than one global batch.
    """

    def __init__(
        self,
        dataset: GoldDataset,
        collator: Collator,
        *,
        global_batch: int,
        micro_batch: int | None,
        ranks: int,
        rank: int,
        seed: int,
        grouping: str,
        workers: int = 0,
        positions: np.ndarray | None = None,
    ):
        self.dataset, self.collator, self.workers = dataset, collator, workers
        self.ranks, self.rank, self.seed, self.grouping = ranks, rank, seed, grouping
        self.global_batch = global_batch
        per_rank, rest = divmod(global_batch, ranks)
        if rest:
            raise ValueError(f"global_batch {global_batch} is not a multiple of {ranks} ranks")
        self.micro_batches, rest = divmod(per_rank, micro_batch or per_rank)
        if rest or not self.micro_batches:
            raise ValueError(f"{per_rank} samples per rank and step are not a multiple of micro_batch {micro_batch}")
        self.positions = np.arange(dataset.n) if positions is None else positions
        self.steps_per_epoch = len(self.positions) // global_batch
        self._order(0)  # raises for a split smaller than one global batch

    def state(self, step: int) -> LoaderState:
        """The state before step ``step``."""
        content_id = self.dataset.manifest.content_id
        return LoaderState(content_id, self.seed, self.grouping, self.global_batch, len(self.positions), step)

    def _order(self, epoch: int) -> np.ndarray:
        local = epoch_order(
            self.dataset.manifest.content_id,
            self.seed,
            epoch,
            self.grouping,
            self.global_batch,
            self.dataset.presence[self.positions],
            self.dataset.cost[self.positions],
        )
        return self.positions[local]

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of steps ``start`` to ``stop`` (counted over all epochs)."""
        step = start
        while step < stop:
            epoch, first = divmod(step, self.steps_per_epoch)
            last = min(self.steps_per_epoch, first + stop - step)
            rows = self._order(epoch)[first:last]
            mine = [micro for row in rows for micro in deal(row, self.ranks, self.micro_batches)[self.rank]]
            batches = _iterate(_Batches(self.dataset, self.collator, mine, epoch), self.workers)
            for _ in rows:
                yield [next(batches) for _ in range(self.micro_batches)]
            step += len(rows)


def eval_batches(
    dataset: GoldDataset,
    collator: Collator,
    *,
    batch: int,
    ranks: int,
    rank: int,
    workers: int = 0,
    positions: np.ndarray | None = None,
) -> Iterator[Batch]:
    """This rank's share of the samples, each exactly once; every rank gets equally many batches."""
    order = eval_order(np.arange(dataset.n) if positions is None else positions, ranks, batch)
    return _iterate(_Batches(dataset, collator, list(order[:, rank]), 0), workers)
