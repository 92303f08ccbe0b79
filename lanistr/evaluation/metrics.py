"""Classification metrics with bootstrap intervals, in NumPy. Shape suffixes: N samples, C classes."""

from collections.abc import Callable
from typing import Any

import numpy as np


def accuracy(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of samples whose most probable class is right."""
    return float((probabilities_NC.argmax(1) == labels_N).mean())


def macro_f1(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean F1 over the classes that occur in the labels or the predictions."""
    predicted_N = probabilities_NC.argmax(1)
    scores = []
    for value in np.union1d(labels_N, predicted_N):
        true_positive = ((predicted_N == value) & (labels_N == value)).sum()
        scores.append(2 * true_positive / ((predicted_N == value).sum() + (labels_N == value).sum()))
    return float(np.mean(scores))


def auroc(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Area under the ROC curve; with more than two classes the mean of one against the rest.

    Classes without a positive or a negative sample are left out; NaN where none remains.
    """
    classes = [1] if probabilities_NC.shape[1] == 2 else range(probabilities_NC.shape[1])
    areas = [_binary_auroc(probabilities_NC[:, c], labels_N == c) for c in classes]
    known = [area for area in areas if not np.isnan(area)]
    return float(np.mean(known)) if known else float("nan")


def _binary_auroc(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks_N = (last - (counts - 1) / 2)[inverse_N]  # ties share their mean rank
    return float((ranks_N[positive_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "auroc": auroc,
}


def evaluate_classification(
    probabilities_NC: np.ndarray, labels_N: np.ndarray, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Every metric with its 95 % percentile bootstrap interval.

    Args:
        probabilities_NC: rows sum to 1.
        labels_N: in [0, C).
        draws: bootstrap samples.
        seed: of the bootstrap.

    Raises:
        ValueError: no samples.
    """
    n = len(labels_N)
    if not n:
        raise ValueError("no labelled samples to evaluate")
    rng = np.random.default_rng(seed)
    picks = [rng.integers(0, n, n) for _ in range(draws)]
    found: dict[str, Any] = {}
    for name, metric in METRICS.items():
        resampled = np.array([metric(probabilities_NC[p], labels_N[p]) for p in picks])
        low, high = np.nanpercentile(resampled, [2.5, 97.5])
        found[name] = {"value": metric(probabilities_NC, labels_N), "ci95": [float(low), float(high)]}
    return found
