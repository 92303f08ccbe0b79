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
        return np.interp(values_N, self.knots_K, self.scores_K)


def _standardised(quantiles: np.ndarray, knots_K: np.ndarray, scores_K: np.ndarray) -> np.ndarray:
    """Scores of mean 0 and deviation 1 (0 for a constant) over what the quantiles stand for."""
    found = np.interp(quantiles, knots_K, scores_K)
    weights = np.ones(len(found))
    weights[[0, -1]] = 0.5
    mean = np.average(found, weights=weights)
    std = np.sqrt(np.average((found - mean) ** 2, weights=weights))
    return (scores_K - mean) / std if std > 0 else np.zeros_like(scores_K)
