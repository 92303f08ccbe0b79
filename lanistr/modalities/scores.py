"""Numbers by their rank in train: what a long tail leaves of a column.

Shape suffixes: N values, K knots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class NormalScores:
    """Piecewise linear from a column's quantiles to normal quantiles, of mean 0 and deviation 1 over train.

    Prices and file sizes have a few values a thousand times the median: standardised, all others are the same number.
    Gorishniy et al. 2021 (Revisiting Deep Learning Models for Tabular Data, section 4.2) and scikit-learn's
    `QuantileTransformer` map ranks to normal quantiles; values beyond those of train get the scores of its ends.

    Attributes:
        knots_K: strictly ascending.
        scores_K: equal values in train have the score of their mean rank.
    """

    knots_K: np.ndarray
    scores_K: np.ndarray

    @classmethod
    def of(cls, quantiles: Sequence[float]) -> "NormalScores":
        """From evenly spaced quantiles, both ends included; at least one."""
        knots_K, first_K, equal_K = np.unique(quantiles, return_index=True, return_counts=True)
        steps = len(quantiles) - 1
        ranks_K = (first_K + (equal_K - 1) / 2) / max(1, steps)
        margin = 0.5 / max(1, steps)  # the ends of a normal are infinite
        scores_K = np.array([NormalDist().inv_cdf(p) for p in ranks_K.clip(margin, 1 - margin)])
        return cls(knots_K, _standardised(np.asarray(quantiles), knots_K, scores_K))

    def __call__(self, values_N: np.ndarray) -> np.ndarray:
        """(N,) float64; NaN stays NaN."""
        return _between(values_N, self.knots_K, self.scores_K)


def _between(values_N: np.ndarray, knots_K: np.ndarray, scores_K: np.ndarray) -> np.ndarray:
    """Linear between the knots, the ends' scores outside; never descends.

    `np.interp` multiplies by a slope: its rounding can order two values the wrong way round, and between knots that
    lie closer than the smallest normal number the slope is infinite.
    """
    if len(knots_K) == 1:
        return np.where(np.isnan(values_N), np.nan, scores_K[0])
    inside_N = np.clip(values_N, knots_K[0], knots_K[-1])
    left_N = np.clip(np.searchsorted(knots_K, inside_N, side="right") - 1, 0, len(knots_K) - 2)
    low_N, high_N = scores_K[left_N], scores_K[left_N + 1]
    share_N = (inside_N - knots_K[left_N]) / (knots_K[left_N + 1] - knots_K[left_N])
    return np.minimum(low_N + share_N * (high_N - low_N), high_N)


def _standardised(quantiles: np.ndarray, knots_K: np.ndarray, scores_K: np.ndarray) -> np.ndarray:
    """Scores of mean 0 and deviation 1 (0 for a constant) over what the quantiles stand for."""
    found = _between(quantiles, knots_K, scores_K)
    weights = np.ones(len(found))
    weights[[0, -1]] = 0.5
    mean = np.average(found, weights=weights)
    std = np.sqrt(np.average((found - mean) ** 2, weights=weights))
    return (scores_K - mean) / std if std > 0 else np.zeros_like(scores_K)
