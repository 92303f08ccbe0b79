"""Who reads what, when: the order of samples as a pure function.

The order depends on (content id, seed, epoch, options) and on nothing else: ranks and workers decide who reads, never
what. An epoch is a stream of shards in random order, cut into windows. A window is shuffled as a whole, cut into pools
of a few dozen steps, and each pool is dealt over its steps by presence and length. Only one window is ever in memory,
so that a billion samples plan in the space of a million.

Shape suffixes: N samples of a window, S steps, G samples of a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from lanistr.data.streams import philox

Grouping = Literal["mixed", "stratified", "grouped"]


@dataclass(frozen=True)
class PlanOptions:
    """What the order depends on, beside the data, the seed and the epoch.

    Attributes:
        grouping: ``mixed`` = a plain permutation; ``stratified`` = every presence mask spread evenly over the steps;
            ``grouped`` = stratified, and samples of similar length in the same step.
        global_batch: samples per step over all ranks; with ``max_tokens`` only nominal.
        max_tokens: tokens per step over all ranks, never exceeded; None = steps of ``global_batch`` samples.
        window: samples shuffled together (memory: about 50 bytes each).
        pool: steps that are balanced together (fewer in an epoch of less than four pools): more = more alike within a
            step, fewer = more random.
    """

    grouping: Grouping
    global_batch: int
    max_tokens: int | None = None
    window: int = 1 << 18
    pool: int = 128


@dataclass(frozen=True)
class Facts:
    """What the plan must know of samples.

    Attributes:
        strata_N: presence mask (and dataset, where several are mixed).
        tokens_N: fusion tokens: what a sample costs.
        lengths_N: samples with close values here are alike in length, modality by modality.
    """

    strata_N: np.ndarray
    tokens_N: np.ndarray
    lengths_N: np.ndarray

    def __getitem__(self, rows: Any) -> "Facts":
        return Facts(self.strata_N[rows], self.tokens_N[rows], self.lengths_N[rows])


class Source(Protocol):
    """What the plan must know of a dataset.

    Attributes:
        content_id: identity of the data.
        shard_sizes: samples per shard.
        repeats: how often per epoch each shard's samples are seen; a fraction takes so many of them at random.
    """

    @property
    def content_id(self) -> str: ...  # noqa: D102
    @property
    def shard_sizes(self) -> np.ndarray: ...  # noqa: D102
    @property
    def repeats(self) -> np.ndarray: ...  # noqa: D102

    def facts(self, shard: int) -> Facts:
        """Of the samples of a shard."""
        ...


@dataclass(frozen=True)
class Table:
    """A `Source` in memory, one shard."""

    content_id: str
    columns: Facts

    @property
    def shard_sizes(self) -> np.ndarray:
        """One shard."""
        return np.array([len(self.columns.strata_N)])

    @property
    def repeats(self) -> np.ndarray:
        """Each sample once."""
        return np.ones(1)

    def facts(self, shard: int) -> Facts:
        """As `Source.facts`."""
        assert shard == 0, shard
        return self.columns


@dataclass(frozen=True)
class Step:
    """The global batch of one step.

    Attributes:
        items_G: what to read: position in the source + repeat * number of samples of the source.
        strata_G: presence mask (and dataset).
        tokens_G: fusion tokens of each.
    """

    items_G: np.ndarray
    strata_G: np.ndarray
    tokens_G: np.ndarray


@dataclass(frozen=True)
class Window:
    """Consecutive steps; step ``first + i`` is ``[bounds[i], bounds[i + 1])``."""

    first: int
    bounds: np.ndarray
    items_N: np.ndarray
    strata_N: np.ndarray
    tokens_N: np.ndarray

    @property
    def stop(self) -> int:
        """The step after the last."""
        return self.first + len(self.bounds) - 1

    def step(self, step: int) -> Step:
        """One of its steps."""
        rows = slice(self.bounds[step - self.first], self.bounds[step - self.first + 1])
        return Step(self.items_N[rows], self.strata_N[rows], self.tokens_N[rows])


Samples = tuple[np.ndarray, Facts]
_EMPTY = np.zeros(0, dtype=np.int64)
_NOTHING: Samples = (_EMPTY, Facts(_EMPTY, _EMPTY, _EMPTY))


def _concatenate(parts: list[Samples]) -> Samples:
    parts = [part for part in parts if len(part[0])] or [_NOTHING]
    if len(parts) == 1:
        return parts[0]
    facts = [facts for _, facts in parts]
    return np.concatenate([items for items, _ in parts]), Facts(
        np.concatenate([f.strata_N for f in facts]),
        np.concatenate([f.tokens_N for f in facts]),
        np.concatenate([f.lengths_N for f in facts]),
    )


class Plan:
    """The order of every epoch.

    Args:
        source: the data.
        seed: of the order.
        options: how steps are made.

    Raises:
        ValueError: fewer samples (tokens) than one step needs; a token budget below four of the longest samples, or one
            together with fractional repeats (the number of steps would change from epoch to epoch).
    """

    def __init__(self, source: Source, seed: int, options: PlanOptions):
        self.source, self.seed, self.options = source, seed, options
        self.starts = np.concatenate([[0], np.cumsum(source.shard_sizes)])
        self.samples = int(self.starts[-1])
        self._shard, self._repeat, self._taken = _draws(source.shard_sizes, source.repeats)
        self.longest = 0
        if options.max_tokens is None:
            self.step_weight = options.global_batch
            self.steps_per_epoch = int(self._taken.sum()) // options.global_batch
        else:
            total, self.longest = self._count_tokens()
            # A pool may hold one sample too much, and each of its steps another.
            self.step_weight = options.max_tokens - 2 * self.longest
            if self.step_weight < 2 * self.longest:
                raise ValueError(
                    f"max_tokens {options.max_tokens}: the longest sample has {self.longest} tokens; "
                    f"give at least {4 * self.longest}"
                )
            self.steps_per_epoch = total // self.step_weight
        self.pool = min(options.pool, max(4, self.steps_per_epoch // 4))
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{int(self._taken.sum())} samples are fewer than one global batch of {options.global_batch}"
                f"{f' or {options.max_tokens} tokens' if options.max_tokens else ''}; lower global_batch"
            )

    def _count_tokens(self) -> tuple[int, int]:
        if (self._taken != self.source.shard_sizes[self._shard]).any():
            raise ValueError("max_tokens needs whole numbers as weights of the mixed datasets")
        sums = [(int(f.tokens_N.sum()), int(f.tokens_N.max())) for f in map(self.source.facts, range(self._shards))]
        return sum(sums[shard][0] for shard in self._shard), max(longest for _, longest in sums)

    @property
    def _shards(self) -> int:
        return len(self.source.shard_sizes)

    @cached_property
    def _window_steps(self) -> int:
        """Steps of a window of equal batches: whole pools, so that no pool spans two windows."""
        pool = self.pool * self.options.global_batch
        return max(1, self.options.window // pool) * self.pool

    @property
    def fewest_samples(self) -> int:
        """A bound on how few samples a step may have."""
        if self.options.max_tokens is None:
            return self.options.global_batch
        return (self.step_weight - 2 * self.longest) // self.longest

    def steps(self, epoch: int, first: int = 0) -> Iterator[Step]:
        """The steps of an epoch from ``first`` on."""
        for window in self.windows(epoch, first):
            yield from map(window.step, range(max(first, window.first), window.stop))

    def windows(self, epoch: int, first: int = 0) -> Iterator[Window]:
        """The windows of an epoch from the one that holds step ``first`` on.

        With ``max_tokens`` the earlier ones are planned too: where they end depends on their lengths.
        """
        number = first // self._window_steps if self.options.max_tokens is None else 0
        done, pending, ahead = number * self._window_steps, _NOTHING, 0
        order, ends = self._stream(epoch)
        while done < self.steps_per_epoch:
            low, high = self._slice(number, int(ends[-1]))
            rng = philox("window", self.source.content_id, self.seed, epoch, number)
            items, facts = self._read(epoch, order, ends, low, high)
            shuffled = rng.permutation(high - low)
            pending = _concatenate([pending, (items[shuffled], facts[shuffled])])
            window = self._deal_pools(done, ahead, *pending, rng, last=high == ends[-1])
            used, steps = len(window.items_N), window.stop - done
            ahead += int(self._weights(pending[1])[:used].sum()) - steps * self.step_weight
            pending = pending[0][used:], pending[1][used:]
            done, number = window.stop, number + 1
            if window.stop > max(first, window.first):
                yield window

    def shards_of_window(self, epoch: int, step: int) -> list[int]:
        """The shards that the window of a step reads (with ``max_tokens`` none: known only when it is planned)."""
        if self.options.max_tokens is not None:
            return []
        order, ends = self._stream(epoch)
        low, high = self._slice(step // self._window_steps, int(ends[-1]))
        return [int(self._shard[order[place]]) for place in _places(ends, low, high)]

    def _stream(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The passes over shards in the order of an epoch, and where in the stream of samples each ends."""
        order = philox("shards", self.source.content_id, self.seed, epoch).permutation(len(self._shard))
        return order, np.cumsum(self._taken[order])

    def _weights(self, facts: Facts) -> np.ndarray:
        """What a step counts: samples or tokens."""
        return np.ones_like(facts.tokens_N) if self.options.max_tokens is None else facts.tokens_N

    def _slice(self, number: int, total: int) -> tuple[int, int]:
        """The part of the stream that window ``number`` shuffles; the last one takes the tail along."""
        if self.options.max_tokens is None:
            size = self._window_steps * self.options.global_batch
            last = (number + 1) * self._window_steps >= self.steps_per_epoch
            return number * size, total if last else (number + 1) * size
        low = number * self.options.window
        high = low + self.options.window
        return low, total if total - high < self.options.window // 2 else high

    def _read(self, epoch: int, order: np.ndarray, ends: np.ndarray, low: int, high: int) -> Samples:
        """The stream from ``low`` to ``high``."""
        found: list[Samples] = [_NOTHING]
        for place in _places(ends, low, high):
            draw = order[place]
            shard, repeat, taken = int(self._shard[draw]), int(self._repeat[draw]), int(self._taken[draw])
            begin = int(ends[place]) - taken
            facts = self.source.facts(shard)
            rows = np.arange(len(facts.tokens_N))
            if taken < len(rows):
                rows = philox("part", self.source.content_id, self.seed, epoch, shard).permutation(rows)[:taken]
            rows = rows[max(0, low - begin) : high - begin]
            found.append((rows + (self.starts[shard] + repeat * self.samples), facts[rows]))
        return _concatenate(found)

    def _deal_pools(
        self, done: int, ahead: int, items_N: np.ndarray, facts: Facts, rng: np.random.Generator, last: bool
    ) -> Window:
        """Steps of all complete pools of the shuffled samples (and of the rest, if these are the last of the epoch).

        Args:
            done: steps before; their samples weighed ``ahead`` more than they should.
            items_N, facts: the samples; the window uses the first of them.
            rng: of this window.
            last: no more samples will come.
        """
        step, pool = self.step_weight, self.pool
        weight_N = self._weights(facts)
        begin_N = np.cumsum(weight_N) - weight_N + ahead
        total = int(weight_N.sum()) + ahead
        steps = self.steps_per_epoch - done if last else total // step // pool * pool
        used = int(np.searchsorted(begin_N, steps * step))
        pool_N = begin_N[:used] // (pool * step)
        order = _spread(self.options.grouping, pool_N, facts[:used], rng)
        if self.options.max_tokens is None:
            bounds = np.arange(steps + 1) * step
        else:
            bounds = _cut(pool_N, weight_N[order], steps, pool)
        # Steps of a pool come in random order: grouped, the short samples would come first.
        shuffled = _argsort(np.arange(steps) // pool, (rng.random(steps) * (1 << 30)).astype(np.int64))
        sizes = np.diff(bounds)[shuffled]
        moved = np.concatenate([[0], np.cumsum(sizes)])
        chosen = order[np.repeat(bounds[:-1][shuffled] - moved[:-1], sizes) + np.arange(used)]
        return Window(done, moved, items_N[chosen], facts.strata_N[chosen], facts.tokens_N[chosen])


def _places(ends: np.ndarray, low: int, high: int) -> range:
    """Which passes over shards the stream from ``low`` to ``high`` touches."""
    return range(int(np.searchsorted(ends, low, "right")), int(np.searchsorted(ends, high, "left")) + 1)


def _draws(sizes: np.ndarray, repeats: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shard, repeat, samples taken) of every pass over a shard in an epoch."""
    parts = []
    for repeat in range(int(np.ceil(repeats.max(initial=0)))):
        share = np.clip(repeats - repeat, 0, 1)
        # Rounded on running sums, so that a fraction is exact over all shards, not in each.
        taken = np.diff(np.floor(np.cumsum(sizes * share) + 1e-6), prepend=0).astype(np.int64)
        shards = np.flatnonzero(taken)
        parts.append((shards, np.full(len(shards), repeat), taken[shards]))
    if not parts:
        raise ValueError("no samples: every weight is 0")
    shard, repeat, taken = (np.concatenate(column) for column in zip(*parts, strict=True))
    return shard, repeat, taken


def _spread(grouping: Grouping, pool_N: np.ndarray, facts: Facts, rng: np.random.Generator) -> np.ndarray:
    """An order of the samples, pool by pool, in which neighbours make good steps.

    In each pool a stratum's samples (by length if grouped) are laid evenly over the pool; a random phase keeps strata
    from aligning at the borders of steps.
    """
    if grouping == "mixed":
        return np.arange(len(pool_N))
    keys = [pool_N, facts.strata_N, facts.lengths_N] if grouping == "grouped" else [pool_N, facts.strata_N]
    order = _argsort(*keys)
    changes = (np.diff(pool_N[order], prepend=-1) != 0) | (np.diff(facts.strata_N[order], prepend=-1) != 0)
    begins = np.flatnonzero(changes)
    counts = np.diff(begins, append=len(order))
    spacing = (1 << 30) / counts
    offset = (rng.random(len(counts)) - begins) * spacing
    place_N = np.arange(len(order)) * np.repeat(spacing, counts) + np.repeat(offset, counts)
    return order[_argsort(pool_N, place_N.astype(np.int64))]


def _cut(pool_N: np.ndarray, weight_N: np.ndarray, steps: int, pool: int) -> np.ndarray:
    """(steps + 1,) bounds that cut every pool into its steps at equal weight, give or take a sample."""
    pools = -(-steps // pool)
    weight_P = np.bincount(pool_N, weights=weight_N, minlength=pools).astype(np.int64)
    steps_P = np.minimum(pool, steps - np.arange(pools) * pool)
    within_N = np.cumsum(weight_N) - weight_N - (np.cumsum(weight_P) - weight_P)[pool_N]
    step_N = pool_N * pool + within_N * steps_P[pool_N] // weight_P[pool_N]
    return np.searchsorted(step_N, np.arange(steps + 1))


def _argsort(*keys: np.ndarray) -> np.ndarray:
    """Stable order by the first key, then the next: non-negative integers, the same on every machine.

    Packed with their position into 64 bits they sort several times as fast as `np.lexsort`, and no ties are left to the
    processor's kind of sort.
    """
    columns = [*keys, np.arange(len(keys[0]))]
    bits = [int(column.max(initial=0)).bit_length() for column in columns]
    if sum(bits) > 64:
        return np.lexsort(keys[::-1])
    packed = np.zeros(len(keys[0]), dtype=np.uint64)
    for column, width in zip(columns, bits, strict=True):
        packed <<= np.uint64(width)
        packed |= column.astype(np.int64, copy=False).view(np.uint64)
    packed.sort()
    packed &= np.uint64((1 << bits[-1]) - 1)
    return packed.view(np.int64)
