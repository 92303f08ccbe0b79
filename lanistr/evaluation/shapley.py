"""Exact Shapley values and pairwise interactions of a few players, from the value of every subset.

Shape suffixes: S subsets.
"""

import itertools
from collections.abc import Mapping, Sequence
from math import factorial

import numpy as np

Values = Mapping[frozenset[str], float | np.ndarray]


def subsets(players: Sequence[str]) -> list[tuple[str, ...]]:
    """All subsets but the empty one, small ones first: 15 of four."""
    return [s for size in range(1, len(players) + 1) for s in itertools.combinations(players, size)]


def shapley_values(values: Values, players: Sequence[str]) -> dict[str, float | np.ndarray]:
    """What each player adds, averaged over all orders in which they could join (Shapley 1953).

    They sum to the value of all players less that of none.

    Args:
        values: of every subset, the empty one included; arrays are taken element by element (draws of a bootstrap).
        players: by name.
    """
    n = len(players)
    found: dict[str, float | np.ndarray] = {}
    for player in players:
        total: float | np.ndarray = 0.0
        for rest in _without(players, [player]):
            weight = factorial(len(rest)) * factorial(n - len(rest) - 1) / factorial(n)
            total = total + weight * (values[rest | {player}] - values[rest])
        found[player] = total
    return found


def interactions(values: Values, players: Sequence[str]) -> dict[tuple[str, str], float | np.ndarray]:
    """The Shapley interaction index of each pair (Grabisch and Roubens 1999).

    The average over subsets S of the others, weighted |S|! (n - |S| - 2)! / (n - 1)!, of
    v(S + both) - v(S + a) - v(S + b) + v(S). Above zero the two tell more together than apart (synergy), below zero they
    tell the same (redundancy).

    Args:
        values, players: as in `shapley_values`; at least two players.
    """
    n = len(players)
    found: dict[tuple[str, str], float | np.ndarray] = {}
    for a, b in itertools.combinations(players, 2):
        total: float | np.ndarray = 0.0
        for rest in _without(players, [a, b]):
            weight = factorial(len(rest)) * factorial(n - len(rest) - 2) / factorial(n - 1)
            both = values[rest | {a, b}] - values[rest | {a}] - values[rest | {b}] + values[rest]
            total = total + weight * both
        found[a, b] = total
    return found


def _without(players: Sequence[str], left_out: Sequence[str]) -> list[frozenset[str]]:
    others = [player for player in players if player not in left_out]
    return [frozenset(), *map(frozenset, subsets(others))]
