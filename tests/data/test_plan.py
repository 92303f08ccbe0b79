import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanistr.data.plan import deal, epoch_order, eval_order


def draw(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 6, n), rng.lognormal(3, 1, n)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(8, 300),
    batch=st.integers(1, 8),
    seed=st.integers(0, 99),
    grouping=st.sampled_from(["mixed", "stratified"]),
)
def test_every_sample_at_most_once_and_the_tail_is_below_one_batch(
    n: int, batch: int, seed: int, grouping: str
) -> None:
    order = epoch_order("id", seed, 0, grouping, batch, *draw(n, seed))
    assert order.shape == (n // batch, batch)
    assert len(np.unique(order)) == order.size
    assert order.min() >= 0
    assert order.max() < n


def test_order_is_a_pure_function_of_its_arguments_and_changes_with_each() -> None:
    presence, cost = draw(200, 0)
    base = epoch_order("id", 1, 2, "stratified", 8, presence, cost)
    assert np.array_equal(base, epoch_order("id", 1, 2, "stratified", 8, presence, cost))
    for other in (("xx", 1, 2), ("id", 9, 2), ("id", 1, 3)):
        assert not np.array_equal(base, epoch_order(*other, "stratified", 8, presence, cost))


def test_stratified_steps_have_their_share_of_every_mask_and_similar_costs() -> None:
    rng = np.random.default_rng(0)
    presence = (rng.random(3200) < 0.2).astype(np.int64)
    cost = rng.lognormal(3, 0.6, 3200) + 100 * presence
    order = epoch_order("id", 0, 0, "stratified", 32, presence, cost)
    per_step = presence[order].sum(1)
    assert per_step.max() - per_step.min() <= 3
    text = np.where(presence[order] == 0, cost[order], np.nan)
    mixed = epoch_order("id", 0, 0, "mixed", 32, presence, cost)
    text_mixed = np.where(presence[mixed] == 0, cost[mixed], np.nan)
    assert np.nanstd(text, axis=1).mean() < 0.5 * np.nanstd(text_mixed, axis=1).mean()


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (8, 1)])
def test_ranks_and_accumulation_divide_a_global_batch_and_never_change_it(ranks: int, micro: int) -> None:
    step = np.random.default_rng(0).permutation(100)[:16]
    dealt = deal(step, ranks, micro)
    assert dealt.shape == (ranks, micro, 16 // ranks // micro)
    assert sorted(dealt.flatten()) == sorted(step)


def test_dealing_balances_cost_over_ranks() -> None:
    presence, cost = draw(3200, 3)
    order = epoch_order("id", 0, 0, "stratified", 64, presence, cost)
    loads = np.array([[cost[rows].sum() for rows in deal(row, 4, 1)] for row in order])
    balance = (loads.mean(1) / loads.max(1)).mean()
    mixed = epoch_order("id", 0, 0, "mixed", 64, presence, cost)
    loads = np.array([[cost[rows].sum() for rows in deal(row, 4, 1)] for row in mixed])
    assert balance > max(0.9, (loads.mean(1) / loads.max(1)).mean())


@given(n=st.integers(1, 60), ranks=st.integers(1, 4), batch=st.integers(1, 9))
def test_evaluation_reads_every_sample_exactly_once_with_equal_steps(n: int, ranks: int, batch: int) -> None:
    order = eval_order(np.arange(n), ranks, batch)
    assert sorted(order[order >= 0]) == list(range(n))
    assert order.shape[1:] == (ranks, batch)


def test_a_split_smaller_than_a_batch_is_an_error_that_says_what_to_change() -> None:
    with pytest.raises(ValueError, match="lower global_batch"):
        epoch_order("id", 0, 0, "mixed", 8, *draw(7, 0))
