"""Shapley values and interactions against averages over all orders."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanistr.evaluation.shapley import interactions, shapley_values, subsets

PLAYERS = ["a", "b", "c", "d"]


def game(numbers: list[float], players: list[str]) -> dict[frozenset[str], float]:
    found = {frozenset(s): number for s, number in zip(subsets(players), numbers, strict=False)}
    return {frozenset(): 0.0, **found}


@settings(max_examples=25)
@given(st.lists(st.floats(-5, 5), min_size=15, max_size=15))
def test_values_are_the_mean_gain_over_all_orders_and_sum_to_the_whole(numbers: list[float]) -> None:
    values = game(numbers, PLAYERS)
    found = shapley_values(values, PLAYERS)
    for player in PLAYERS:
        gains = []
        for order in itertools.permutations(PLAYERS):
            before = frozenset(order[: order.index(player)])
            gains.append(values[before | {player}] - values[before])
        assert found[player] == pytest.approx(np.mean(gains), abs=1e-9)
    assert sum(found.values()) == pytest.approx(values[frozenset(PLAYERS)], abs=1e-9)


@settings(max_examples=25)
@given(st.lists(st.floats(-5, 5), min_size=15, max_size=15))
def test_an_interaction_is_the_mean_over_orders_that_join_a_pair_as_one(numbers: list[float]) -> None:
    values = game(numbers, PLAYERS)
    found = interactions(values, PLAYERS)
    assert len(found) == 6
    for (a, b), index in found.items():
        others = [p for p in PLAYERS if p not in (a, b)]
        terms = []
        for order in itertools.permutations(["pair", *others]):
            rest = frozenset(order[: order.index("pair")])
            terms.append(values[rest | {a, b}] - values[rest | {a}] - values[rest | {b}] + values[rest])
        assert index == pytest.approx(np.mean(terms), abs=1e-9)


def test_draws_are_taken_element_by_element() -> None:
    rng = np.random.default_rng(0)
    many = {frozenset(s): rng.normal(size=3) for s in subsets(PLAYERS)} | {frozenset(): np.zeros(3)}
    together = shapley_values(many, PLAYERS)
    for draw in range(3):
        one = shapley_values({s: float(v[draw]) for s, v in many.items()}, PLAYERS)
        assert {p: together[p][draw] for p in PLAYERS} == pytest.approx(one)  # type: ignore[index]
