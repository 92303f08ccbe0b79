import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanistr.data.deal import deal, eval_order
from lanistr.data.plan import Facts, Plan, PlanOptions, Step, Table, _argsort
from lanistr.data.streams import Streams, philox

GROUPINGS = ["mixed", "stratified", "grouped"]


class Shards:
    """A source of several shards; the strata and lengths of a shard are a function of its number."""

    content_id = "shards"

    def __init__(self, sizes: list[int], repeats: list[float] | None = None, seed: int = 0):
        self.shard_sizes = np.array(sizes)
        self.repeats = np.ones(len(sizes)) if repeats is None else np.array(repeats)
        self.seed, self.asked, self.made = seed, [], {}

    def facts(self, shard: int) -> Facts:
        self.asked.append(shard)
        if shard not in self.made:
            self.made[shard] = self.make(shard)
        return self.made[shard]

    def make(self, shard: int) -> Facts:
        rng = np.random.default_rng([self.seed, shard])
        n = int(self.shard_sizes[shard])
        lengths = np.clip(rng.lognormal(3, 0.7, n), 1, 120).astype(np.int64)
        strata = rng.integers(1, 5, n)
        return Facts(strata, 1 + lengths + 50 * (strata & 1), lengths)


def table(n: int, seed: int = 0, image: float = 0.3) -> Table:
    """Text always, images of 197 tokens, series in two of five samples."""
    rng = np.random.default_rng(seed)
    text = np.clip(rng.lognormal(3.8, 0.6, n), 4, 128).astype(np.int64)
    has_image = (rng.random(n) < image).astype(np.int64)
    series = np.where(rng.random(n) < 0.4, np.clip(rng.lognormal(3.2, 0.5, n), 1, 48), 0).astype(np.int64)
    strata = 1 + 2 * has_image + 4 * (series > 0)
    return Table("table", Facts(strata, 4 + text + 197 * has_image + series, text * 64 + series))


def read_all(plan: Plan, epoch: int = 0, first: int = 0) -> list[list[int]]:
    return [step.items_G.tolist() for step in plan.steps(epoch, first)]


sources = st.builds(Shards, st.lists(st.integers(1, 60), min_size=1, max_size=9), st.none(), st.integers(0, 5))


@settings(max_examples=150)
@given(
    source=sources,
    grouping=st.sampled_from(GROUPINGS),
    batch=st.integers(1, 12),
    window=st.sampled_from([1, 20, 64, 1 << 18]),
    pool=st.sampled_from([1, 4, 128]),
    epoch=st.integers(0, 3),
)
def test_each_sample_at_most_once_and_the_tail_is_below_one_batch(
    source: Shards, grouping: str, batch: int, window: int, pool: int, epoch: int
) -> None:
    n = int(source.shard_sizes.sum())
    options = PlanOptions(grouping, batch, None, window, pool)  # type: ignore[arg-type]
    if n < batch:
        with pytest.raises(ValueError, match="lower global_batch"):
            Plan(source, 0, options)
        return
    plan = Plan(source, 0, options)
    steps = read_all(plan, epoch)
    assert [len(step) for step in steps] == [batch] * (n // batch)
    seen = [item for step in steps for item in step]
    assert len(seen) == len(set(seen))
    assert n - len(seen) < batch
    assert set(seen) <= set(range(n))
    for first in {0, len(steps) // 2, len(steps) - 1}:
        assert read_all(plan, epoch, first) == steps[first:]


@settings(max_examples=60)
@given(
    source=sources,
    grouping=st.sampled_from(GROUPINGS),
    budget=st.integers(4 * 171, 3000),
    window=st.sampled_from([7, 30, 1 << 18]),
    pool=st.sampled_from([1, 4, 128]),
)
def test_token_budgets_are_never_exceeded_and_epochs_have_equally_many_steps(
    source: Shards, grouping: str, budget: int, window: int, pool: int
) -> None:
    tokens = np.concatenate([source.facts(shard).tokens_N for shard in range(len(source.shard_sizes))])
    options = PlanOptions(grouping, 8, budget, window, pool)  # type: ignore[arg-type]
    if tokens.sum() < budget - 2 * tokens.max():
        with pytest.raises(ValueError, match="fewer than one global batch"):
            Plan(source, 0, options)
        return
    plan = Plan(source, 0, options)
    for epoch in range(2):
        steps = read_all(plan, epoch)
        assert len(steps) == plan.steps_per_epoch
        seen = [item for step in steps for item in step]
        assert len(seen) == len(set(seen))
        assert all(plan.fewest_samples <= len(step) for step in steps)
        assert all(0 < tokens[step].sum() <= budget for step in steps)
        assert tokens.sum() - tokens[seen].sum() < budget
        middle = len(steps) // 2
        assert read_all(plan, epoch, middle) == steps[middle:]


def test_order_is_a_pure_function_of_its_arguments_and_changes_with_each() -> None:
    source = table(400)

    def order(source: Table = source, seed: int = 1, epoch: int = 2, batch: int = 8, grouping: str = "grouped") -> list:
        return read_all(Plan(source, seed, PlanOptions(grouping, batch)), epoch)  # type: ignore[arg-type]

    base = order()
    assert base == order()
    for other in (order(replace(source, content_id="other")), order(seed=2), order(epoch=3), order(grouping="mixed")):
        assert other != base
        assert len(other) == len(base)


def test_a_step_can_be_planned_without_the_windows_before_it() -> None:
    source = Shards([100] * 40)
    plan = Plan(source, 0, PlanOptions("grouped", 10, window=400, pool=4))
    source.asked.clear()
    plan_of_last = next(plan.windows(0, plan.steps_per_epoch - 1))
    assert plan_of_last.stop == plan.steps_per_epoch
    assert len(set(source.asked)) <= 6


def test_a_billion_samples_plan_in_the_memory_of_a_window() -> None:
    import tracemalloc

    class Billion(Shards):
        def __init__(self) -> None:
            super().__init__([10_000] * 100_000)
            self.one = Shards([10_000]).facts(0)

        def facts(self, shard: int) -> Facts:
            return self.one

    tracemalloc.start()
    plan = Plan(Billion(), 0, PlanOptions("grouped", 256))
    window = next(plan.windows(0, 2_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.samples == 10**9
    assert window.first <= 2_000_000 < window.stop
    assert peak < 80 * 2**20


@pytest.mark.parametrize("grouping", ["stratified", "grouped"])
def test_every_step_has_its_share_of_every_mask(grouping: str) -> None:
    source = table(3200, image=0.2)
    images = [int((step.strata_G & 2 > 0).sum()) for step in Plan(source, 0, PlanOptions(grouping, 32)).steps(0)]  # type: ignore[arg-type]
    mixed = [int((step.strata_G & 2 > 0).sum()) for step in Plan(source, 0, PlanOptions("mixed", 32)).steps(0)]
    expected = 32 * float((source.columns.strata_N & 2 > 0).mean())
    # A pool of the mixed order is itself a draw; within it the share is exact, give or take one.
    assert np.std(images) < 0.5 * np.std(mixed)
    assert abs(np.mean(images) - expected) < 0.5


def test_grouped_steps_hold_similar_lengths_and_new_neighbours_each_epoch() -> None:
    source = table(6400)
    text = source.columns.lengths_N // 64

    def spread(grouping: str) -> float:
        steps = read_all(Plan(source, 0, PlanOptions(grouping, 32)), 0)  # type: ignore[arg-type]
        return float(np.mean([text[step].std() for step in steps]))

    assert spread("grouped") < 0.25 * spread("stratified")
    plan = Plan(source, 0, PlanOptions("grouped", 32))
    neighbours = [{(a, b) for step in read_all(plan, e) for a in step for b in step if a < b} for e in (0, 1)]
    assert len(neighbours[0] & neighbours[1]) < 0.25 * len(neighbours[0])


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_steps_come_in_random_order_not_from_short_to_long(grouping: str) -> None:
    source = table(6400)
    means = [source.columns.lengths_N[step].mean() for step in read_all(Plan(source, 0, PlanOptions(grouping, 32)))]  # type: ignore[arg-type]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.25


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    weights=st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0, 2.5]), min_size=5, max_size=5),
)
@settings(max_examples=60)
def test_weights_say_how_often_each_sample_is_seen(sizes: list[int], weights: list[float]) -> None:
    source = Shards(sizes, weights[: len(sizes)])
    n = sum(sizes)
    if sum(np.floor(np.cumsum([s * w for s, w in zip(sizes, weights, strict=False)])[-1:])) < 1:
        return
    plan = Plan(source, 0, PlanOptions("grouped", 1))
    items = [item for step in read_all(plan) for item in step]
    assert len(items) == len(set(items)), "the same repeat twice"
    times = Counter(item % n for item in items)
    first = np.concatenate([[0], np.cumsum(sizes)])
    for shard, (size, weight) in enumerate(zip(sizes, weights, strict=False)):
        counts = [times[p] for p in range(first[shard], first[shard + 1])]
        assert min(counts) >= np.floor(weight)
        assert max(counts) <= np.ceil(weight)
        assert abs(sum(counts) - size * weight) <= 2
    assert abs(len(items) - sum(s * w for s, w in zip(sizes, weights, strict=False))) <= 3


def test_the_fraction_of_a_dataset_that_is_seen_changes_from_epoch_to_epoch() -> None:
    plan = Plan(Shards([200, 200], [1.0, 0.25]), 0, PlanOptions("mixed", 5))
    parts = [{item for step in read_all(plan, epoch) for item in step if item >= 200} for epoch in range(2)]
    assert len(parts[0]) == len(parts[1]) == 50
    assert len(parts[0] & parts[1]) < 30


def test_a_token_budget_with_fractional_weights_or_below_four_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        Plan(Shards([50, 50], [1, 0.5]), 0, PlanOptions("mixed", 8, 1000))
    with pytest.raises(ValueError, match="give at least"):
        Plan(Shards([50, 50]), 0, PlanOptions("mixed", 8, 300))


@settings(max_examples=100)
@given(
    n=st.integers(1, 80),
    equal=st.booleans(),
    ranks=st.sampled_from([1, 2, 3, 8]),
    micro=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_dealing_divides_a_step_evenly_and_loses_nothing(
    n: int, equal: bool, ranks: int, micro: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    step = Step(rng.permutation(1000)[:n], rng.integers(0, 3, n), rng.integers(1, 300, n))
    slots = ranks * micro
    if n < slots:
        with pytest.raises(ValueError, match="less than one for each"):
            deal(step, ranks, micro)
        return
    dealt = deal(step, ranks, micro, equal)
    flat = [items for rank in dealt for items in rank]
    assert len(dealt) == ranks
    assert all(len(items) for items in flat)
    assert sorted(np.concatenate(flat)) == sorted(step.items_G)
    loads = [int(step.tokens_G[np.isin(step.items_G, items)].sum()) for items in flat]
    assert max(loads) - min(loads) <= step.tokens_G.max()
    if equal:
        assert max(map(len, flat)) - min(map(len, flat)) <= 1
        for stratum in range(3):
            per_slot = [int(np.isin(items, step.items_G[step.strata_G == stratum]).sum()) for items in flat]
            assert max(per_slot) - min(per_slot) <= 2


@pytest.mark.parametrize("ranks", [8, 16])
@pytest.mark.parametrize("image", [0.02, 0.2, 0.5, 0.98])
def test_no_rank_waits_and_hardly_anything_is_padding_at_32_samples_per_rank(image: float, ranks: int) -> None:
    source = table(512 * 32 * ranks, image=image)
    text, tokens = source.columns.lengths_N // 64, source.columns.tokens_N
    balance, real, padded = [], 0, 0
    plan = Plan(source, 0, PlanOptions("grouped", 32 * ranks))
    for step in itertools.islice(plan.steps(0), plan.pool):
        slots = [micro for rank in deal(step, ranks, 1) for micro in rank]
        loads = np.array([tokens[items].sum() for items in slots])
        balance.append(loads.mean() / loads.max())
        real += loads.sum()
        padded += sum(int((tokens[i] - text[i]).sum() + len(i) * text[i].max()) for i in slots)
    assert np.mean(balance) > 0.95
    assert real / padded > 0.98


@settings(max_examples=50)
@given(st.integers(0, 40), st.integers(0, 3))
def test_packed_sorting_equals_lexsort(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for top in (5, 1 << 40):  # the second does not fit into 64 bits
        keys = [rng.integers(0, 4, n), rng.integers(0, top, n), rng.integers(0, top, n)]
        assert np.array_equal(_argsort(*keys), np.lexsort(keys[::-1]))


@given(n=st.integers(1, 60), ranks=st.integers(1, 4), batch=st.integers(1, 9))
def test_evaluation_reads_every_sample_exactly_once_with_equal_steps(n: int, ranks: int, batch: int) -> None:
    order = eval_order(np.arange(n), ranks, batch)
    assert sorted(order[order >= 0]) == list(range(n))
    assert order.shape[1:] == (ranks, batch)


def test_streams_give_the_numbers_of_philox_whatever_was_drawn_before() -> None:
    stream = Streams()
    for part in range(20):
        fresh, reused = philox("a", part), stream("a", part)
        assert np.array_equal(fresh.random(part), reused.random(part))
        assert np.array_equal(fresh.integers(0, 7, 5, dtype=np.uint32), reused.integers(0, 7, 5, dtype=np.uint32))
        assert np.array_equal(fresh.permutation(9), reused.permutation(9))
        assert fresh.normal() == reused.normal()
