"""Samples -> batches, in the order of the plan: corruption masks, dummies, packing; training and evaluation."""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from lanistr.batch import Batch, Loading, make_alone_index, make_fusion_index
from lanistr.data.deal import deal, eval_order
from lanistr.data.mixing import MixedDataset
from lanistr.data.plan import Grouping, Plan, PlanOptions, Table, Window
from lanistr.data.prefetch import prefetch
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import CorruptSample, Sample, intact, read_samples
from lanistr.data.streams import Streams
from lanistr.modalities.base import Collated, Modality

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collator:
    """Makes a `Batch` of samples.

    Masks come from a counter-based generator keyed by (seed, epoch, repeat, sample key, modality): they depend on
    neither rank, worker nor batch.

    Attributes:
        views: 2 = clean and masked (pretraining), 1 = clean.
        alone: modalities that the task also fuses alone (`Batch.alone`).
        modality_dropout: chance that a present modality is treated as absent; a sample that would lose all keeps all.
    """

    modalities: Mapping[str, Modality[Any, Any]]
    views: int
    seed: int
    modality_dropout: float = 0.0
    alone: tuple[str, ...] = ()
    _stream: Streams = field(default_factory=Streams, compare=False, repr=False)

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
            items = _find_items(name, modality, samples)
            present = np.array([i for i, _, _ in items], dtype=np.int64)
            collated = self._collate(name, modality, samples, items, weights_B[present], epoch)
            inputs[name] = collated.inputs
            counts[modality.term] = counts.get(modality.term, 0.0) + collated.count
            pools.append(int(collated.token_counts.sum()))
            tokens.append(collated.token_counts if items else present)
            rows.append(present)
        absent = [modality.absent_token for modality in self.modalities.values()]
        labels = np.array([sample.label for sample in samples], dtype=np.int64)
        if self.views == 1:
            labelled = (labels >= 0) & (weights_B > 0)
            counts = {"cls": float(labelled.sum())}
            for name, of in zip(self.modalities, rows, strict=True):
                has_B = np.zeros(len(samples), dtype=bool)
                has_B[of] = True
                counts[f"cls_{name}"] = float((labelled & has_B).sum())
        sources = {name: i for i, name in enumerate(self.modalities) if name in self.alone}
        if sources and self.views == 2:
            in_sample = np.stack(
                [np.bincount(rows[i], weights_B[rows[i]] > 0, len(samples)) > 0 for i in sources.values()]
            )
            counts["cross"] = float((in_sample.sum(0) * (in_sample.sum(0) - 1)).sum())  # ordered pairs
        return Batch(
            keys=tuple(sample.key for sample in samples),
            views=self.views,
            labels_B=torch.from_numpy(labels),
            weights_B=torch.from_numpy(weights_B),
            presence_B=torch.from_numpy(np.array([sample.presence for sample in samples], dtype=np.int64)),
            inputs=inputs,
            fusion=make_fusion_index(tokens, rows, pools, weights_B, self.views, absent),
            counts=counts,
            targets_BL=_targets(samples),
            alone={
                name: make_alone_index(i, tokens, rows, pools, weights_B, self.views) for name, i in sources.items()
            },
        )

    def _drop(self, sample: Sample, epoch: int) -> Sample:
        draws = self._stream("drop", self.seed, epoch, sample.repeat, sample.key).random(len(self.modalities))
        dropped = {name for name, draw in zip(self.modalities, draws, strict=True) if draw < self.modality_dropout}
        kept = {name: content for name, content in sample.contents.items() if name not in dropped}
        return sample._replace(contents=kept) if kept else sample

    def _collate(
        self,
        name: str,
        modality: Modality[Any, Any],
        samples: Sequence[Sample],
        items: list[tuple[int, int, Any]],
        weights: np.ndarray,
        epoch: int,
    ) -> Collated[Any]:
        """Args: ``items`` are (sample, number within the sample, content)."""
        contents = [content for _, _, content in items]
        if not items:  # the law of equal work: a dummy of weight 0 runs in the same place
            contents, weights = [modality.dummy()], np.zeros(1, dtype=np.float32)
        masks = None
        if self.views == 2:
            names: list[tuple[object, ...]] = [
                (samples[i].repeat, samples[i].key, name, *([item] if item else [])) for i, item, _ in items
            ]
            masks = [
                modality.corrupt(content, self._stream("corrupt", self.seed, epoch, *key))
                for content, key in zip(contents, names or [(0, "dummy", name)], strict=True)
            ]
        return modality.collate(contents, masks, weights.tolist())


def _find_items(name: str, modality: Modality[Any, Any], samples: Sequence[Sample]) -> list[tuple[int, int, Any]]:
    """Sample, number within the sample and content of each text, image, ... of a modality."""
    if modality.items == 1:
        return [(i, 0, sample.contents[name]) for i, sample in enumerate(samples) if name in sample.contents]
    return [
        (i, item, content)
        for i, sample in enumerate(samples)
        for item, content in enumerate(sample.contents.get(name, ()))
    ]


def _targets(samples: Sequence[Sample]) -> torch.Tensor | None:
    """(B, L) float32 where the target is no class."""
    known = [sample.target for sample in samples if sample.target is not None]
    return torch.from_numpy(np.stack(known)) if known else None


@dataclass(frozen=True)
class LoaderState:
    """Where a run is in the data: a few integers and the identity of what they count.

    Attributes:
        content_id: of the data (with the weights of a mixture, or a digest of the chosen samples).
        plan: the plan's options.
        samples: in the data.
        step: optimizer steps done.
    """

    content_id: str
    seed: int
    plan: dict[str, Any]
    samples: int
    step: int

    def differences(self, now: "LoaderState") -> list[tuple[str, Any, Any]]:
        """Name, value here and value there of what makes the two states count different things."""
        mine, theirs = ({**asdict(state), **state.plan} for state in (self, now))
        names = [name for name in mine if name not in ("plan", "step")]
        return [(name, mine[name], theirs.get(name)) for name in names if mine[name] != theirs.get(name)]


class _MicroBatches:
    """Micro-batch ``i`` of one rank, counted over all steps and epochs. Runs in worker processes."""

    def __init__(
        self,
        dataset: GoldDataset | MixedDataset,
        collator: Collator,
        plan: Plan,
        positions: np.ndarray | None,
        ranks: int,
        rank: int,
        micro_batches: int,
    ):
        self.dataset, self.collator, self.plan, self.positions = dataset, collator, plan, positions
        self.ranks, self.rank, self.micro_batches = ranks, rank, micro_batches
        self._windows: Iterator[Window] = iter(())
        self._window: tuple[int, Window] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_windows": iter(()), "_window": None}

    def items(self, index: int) -> tuple[int, np.ndarray]:
        """Epoch and planned items of a micro-batch."""
        step, micro = divmod(index, self.micro_batches)
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        equal_counts = self.plan.options.max_tokens is None
        dealt = deal(self._find_window(epoch, within).step(within), self.ranks, self.micro_batches, equal_counts)
        return epoch, dealt[self.rank][micro]

    def _find_window(self, epoch: int, step: int) -> Window:
        """The window that holds a step; going forward, the next one is planned and nothing before it again."""
        if self._window is None or self._window[0] != epoch or step < self._window[1].first:
            self._fetch_ahead(epoch, step)
            self._windows = self.plan.windows(epoch, step)
            self._window = epoch, next(self._windows)
            self._fetch_ahead(epoch, self._window[1].stop)
        while step >= self._window[1].stop:
            self._window = epoch, next(self._windows)
            self._fetch_ahead(epoch, self._window[1].stop)
        return self._window[1]

    def _fetch_ahead(self, epoch: int, step: int) -> None:
        if self.positions is None:
            epoch, step = epoch + step // self.plan.steps_per_epoch, step % self.plan.steps_per_epoch
            self.dataset.fetch_ahead(self.plan.shards_of_window(epoch, step))

    def __call__(self, index: int) -> Batch:
        """Plan, read and collate."""
        begin = time.perf_counter()
        epoch, items = self.items(index)
        planned = time.perf_counter()
        replaced: list[tuple[str, str]] = []
        samples = self._read(items, epoch, replaced)
        read = time.perf_counter()
        batch = self.collator(samples, [1.0] * len(samples), epoch)
        done = time.perf_counter()
        return replace(batch, loading=Loading(planned - begin, read - planned, done - read, tuple(replaced)))

    def _read(self, items: np.ndarray, epoch: int, replaced: list[tuple[str, str]]) -> list[Sample]:
        repeats_G, positions_G = np.divmod(items, self.plan.samples)
        if self.positions is not None:
            positions_G = self.positions[positions_G]
        positions, repeats = positions_G.tolist(), repeats_G.tolist()
        found = read_samples(self.dataset, positions, repeats, (self.collator.seed, epoch))
        return [
            self._substitute(position, repeat, epoch, sample, replaced) if isinstance(sample, CorruptSample) else sample
            for position, repeat, sample in zip(positions, repeats, found, strict=True)
        ]

    def _substitute(
        self, position: int, repeat: int, epoch: int, bad: CorruptSample, replaced: list[tuple[str, str]]
    ) -> Sample:
        """Another sample in the place of a bad one."""
        replaced.append((bad.key, bad.reason))
        key = (self.collator.seed, epoch)
        for substitute in self.dataset.substitutes(position, *key, repeat):
            (sample,) = read_samples(self.dataset, [substitute], [repeat], key)
            if isinstance(sample, Sample):
                return sample
            replaced.append((sample.key, sample.reason))
        raise ValueError(f"{bad.reason}; and no sample with the same modalities could be read in its place")


class TrainLoader:
    """Optimizer steps of one rank, in the order of the plan.

    Args:
        dataset: the split, or several mixed.
        collator: makes batches.
        global_batch: samples per step over all ranks.
        micro_batch: samples per rank and forward pass; None = global_batch / ranks.
        max_tokens: tokens per step over all ranks instead; ``global_batch`` and ``micro_batch`` then only say into how
            many micro-batches a step is divided.
        ranks, rank: the world.
        seed, grouping, window: of the plan.
        workers: loader processes (a thread where no modality is heavy to decode); 0 = in this process.
        positions: a subset of the split (None = all of it).
        max_bad: bad samples that are replaced before the run ends with an error.

    Attributes:
        bad: reason by key of the samples that were replaced so far.

    Raises:
        ValueError: sizes that do not divide, or fewer samples than one global batch.
    """

    def __init__(
        self,
        dataset: GoldDataset | MixedDataset,
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
        max_tokens: int | None = None,
        window: int = 1 << 18,
        max_bad: int = 100,
    ):
        self.dataset, self.workers, self.max_bad = dataset, workers, max_bad
        self.bad: dict[str, str] = {}
        per_rank, rest = divmod(global_batch, ranks)
        if rest:
            raise ValueError(f"global_batch {global_batch} is not a multiple of {ranks} ranks")
        self.micro_batches, rest = divmod(per_rank, micro_batch or per_rank)
        if rest or not self.micro_batches:
            raise ValueError(f"{per_rank} samples per rank and step are not a multiple of micro_batch {micro_batch}")
        source: Any = dataset
        self._content_id = dataset.content_id
        if positions is not None:
            assert isinstance(dataset, GoldDataset), "a subset of a mixture has no use yet"
            source = Table(dataset.content_id, dataset.facts_of(positions))
            self._content_id += "/" + hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()[:16]
        options = PlanOptions(cast(Grouping, grouping), global_batch, max_tokens, window)
        self.plan = Plan(source, seed, options)
        slots = ranks * self.micro_batches
        if max_tokens and self.plan.fewest_samples < slots:
            raise ValueError(
                f"max_tokens {max_tokens}: a step may hold only {self.plan.fewest_samples} of the longest samples "
                f"({self.plan.longest} tokens), fewer than {slots} micro-batches on all ranks"
            )
        self.steps_per_epoch = self.plan.steps_per_epoch
        self._make = _MicroBatches(dataset, collator, self.plan, positions, ranks, rank, self.micro_batches)

    def state(self, step: int) -> LoaderState:
        """The state before step ``step``."""
        return LoaderState(self._content_id, self.plan.seed, asdict(self.plan.options), self.plan.samples, step)

    def steps(self, start: int, stop: int, device: torch.device | str = "cpu") -> Iterator[list[Batch]]:
        """This rank's micro-batches of steps ``start`` to ``stop`` (counted over all epochs).

        Args:
            start, stop: steps.
            device: GPUs get the batches ahead of time.

        Raises:
            ValueError: more than ``max_bad`` bad samples, or one that nothing can stand in for.
        """
        heavy = any(modality.heavy for modality in self.dataset.modalities.values())
        indices = range(start * self.micro_batches, stop * self.micro_batches)
        batches = prefetch(self._make, indices, self.workers, heavy, device)
        for _ in range(start, stop):
            step = [next(batches) for _ in range(self.micro_batches)]
            self._note_bad(step)
            yield step

    def _note_bad(self, batches: Sequence[Batch]) -> None:
        for key, reason in (bad for batch in batches for bad in batch.loading.replaced):
            if key not in self.bad:
                logger.warning(
                    "sample %s replaced (%d of at most %d): %s", key, len(self.bad) + 1, self.max_bad, reason
                )
            self.bad[key] = reason
        if len(self.bad) > self.max_bad:
            last = list(self.bad.values())[-1]
            raise ValueError(f"{len(self.bad)} bad samples, more than max_bad {self.max_bad}; the last: {last}")


class _EvalBatches:
    """Batch ``i`` of fixed lists of positions; -1 = a padding sample of weight 0."""

    def __init__(self, dataset: GoldDataset, collator: Collator, positions: np.ndarray):
        self.dataset, self.collator, self.positions = dataset, collator, positions

    def __call__(self, index: int) -> Batch:
        samples = intact(read_samples(self.dataset, np.maximum(self.positions[index], 0).tolist()))
        return self.collator(samples, [float(position >= 0) for position in self.positions[index]], 0)


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
    """This rank's share of the samples, each exactly once; every rank gets equally many batches.

    Raises:
        CorruptSample: a sample that cannot be read: a result over other samples than asked for is no result.
    """
    order = eval_order(np.arange(dataset.n) if positions is None else positions, ranks, batch)
    make = _EvalBatches(dataset, collator, order[:, rank])
    heavy = any(modality.heavy for modality in dataset.modalities.values())
    return prefetch(make, range(len(order)), workers, heavy)
