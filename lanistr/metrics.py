"""Metrics on arrays, in NumPy, for the three kinds of target.

Shape suffixes: N samples, C classes, L labels of a multi-label target or columns of a regression.

* ``class``: probabilities (N, C) that sum to 1, and class ids (N,).
* ``multilabel``: probabilities (N, L), each for itself, and 0 or 1 (N, L).
* ``regression``: values (N, L) and true values (N, L).

In the last two NaN in the truth is an unknown cell: it counts nowhere.
"""

from collections.abc import Callable, Iterator

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]
BINS = 15
EPSILON = 1e-12


def accuracy(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of samples whose most probable class is right."""
    return float((probabilities_NC.argmax(1) == labels_N).mean())


def balanced_accuracy(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their samples that are found."""
    right_N = probabilities_NC.argmax(1) == labels_N
    return float(np.mean([right_N[labels_N == value].mean() for value in np.unique(labels_N)]))


def macro_f1(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean F1 over the classes that occur in the labels or the predictions."""
    predicted_N = probabilities_NC.argmax(1)
    both = np.union1d(labels_N, predicted_N)
    return float(np.mean([_f1(predicted_N == value, labels_N == value) for value in both]))


def auroc(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Area under the ROC curve; with more than two classes the mean of one against the rest.

    Classes without a positive or a negative sample are left out; NaN where none remains.
    """
    return _mean([_auroc(scores, positive) for scores, positive in _one_against_rest(probabilities_NC, labels_N)])


def average_precision(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Average precision of class 1; with more than two classes the mean over those that occur."""
    pairs = _one_against_rest(probabilities_NC, labels_N)
    return _mean([_average_precision(scores, positive) for scores, positive in pairs])


def ece(probabilities_NC: np.ndarray, labels_N: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of the most probable class (Guo et al. 2017): `bins` of equal width."""
    right_N = probabilities_NC.argmax(1) == labels_N
    return _calibration_error(probabilities_NC.max(1), right_N, bins)


def brier(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean squared distance to the one-hot truth; halved with two classes, so that it is that of class 1."""
    truth_NC = np.eye(probabilities_NC.shape[1])[labels_N]
    scale = 0.5 if probabilities_NC.shape[1] == 2 else 1.0
    return float(scale * ((probabilities_NC - truth_NC) ** 2).sum(1).mean())


def log_loss(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean negative logarithm of the true class's probability."""
    return float(-np.log(np.maximum(probabilities_NC[np.arange(len(labels_N)), labels_N], EPSILON)).mean())


def exact_match(probabilities_NL: np.ndarray, truth_NL: np.ndarray) -> float:
    """Share of samples of which every known label is right at a threshold of 0.5."""
    wrong_NL = np.isfinite(truth_NL) & ((probabilities_NL >= 0.5) != (truth_NL == 1))
    return 1 - float(wrong_NL.any(1).mean())


def label_accuracy(probabilities_NL: np.ndarray, truth_NL: np.ndarray) -> float:
    """Share of known labels that are right at a threshold of 0.5 (1 - Hamming loss)."""
    known_NL = np.isfinite(truth_NL)
    return float(((probabilities_NL >= 0.5) == (truth_NL == 1))[known_NL].mean())


def label_macro_f1(probabilities_NL: np.ndarray, truth_NL: np.ndarray) -> float:
    """Mean F1 over the labels at a threshold of 0.5; 0 for a label that neither occurs nor is predicted."""
    return _mean([_f1(scores >= 0.5, truth == 1) for scores, truth in _columns(probabilities_NL, truth_NL)])


def label_micro_f1(probabilities_NL: np.ndarray, truth_NL: np.ndarray) -> float:
    """F1 over all known labels at a threshold of 0.5."""
    known_NL = np.isfinite(truth_NL)
    return _f1(probabilities_NL[known_NL] >= 0.5, truth_NL[known_NL] == 1)


def label_auroc(probabilities_NL: np.ndarray, truth_NL: np.ndarray) -> float:
    """Mean area under the ROC curve over the labels that have a positive and a negative sample."""
    return _mean([_auroc(scores, truth == 1) for scores, truth in _columns(probabilities_NL, truth_NL)])


def label_average_precision(probabilities_NL: np.ndarray, truth_NL: np.ndarray) -> float:
    """Mean average precision over the labels that occur."""
    return _mean([_average_precision(scores, truth == 1) for scores, truth in _columns(probabilities_NL, truth_NL)])


def label_ece(probabilities_NL: np.ndarray, truth_NL: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of "this label holds", over all known labels."""
    known_NL = np.isfinite(truth_NL)
    return _calibration_error(probabilities_NL[known_NL], truth_NL[known_NL] == 1, bins)


def label_brier(probabilities_NL: np.ndarray, truth_NL: np.ndarray) -> float:
    """Mean squared distance to 0 or 1 over all known labels."""
    return float(np.nanmean((probabilities_NL - truth_NL) ** 2))


def mae(values_NL: np.ndarray, truth_NL: np.ndarray) -> float:
    """Mean absolute error, the mean over the columns."""
    return _mean([float(np.abs(v - t).mean()) for v, t in _columns(values_NL, truth_NL)])


def rmse(values_NL: np.ndarray, truth_NL: np.ndarray) -> float:
    """Root of the mean squared error, the mean over the columns."""
    return _mean([float(np.sqrt(((v - t) ** 2).mean())) for v, t in _columns(values_NL, truth_NL)])


def r2(values_NL: np.ndarray, truth_NL: np.ndarray) -> float:
    """Share of the variance explained, the mean over the columns that vary; NaN where none does."""
    found = []
    for values, truth in _columns(values_NL, truth_NL):
        variance = ((truth - truth.mean()) ** 2).sum()
        found.append(float(1 - ((values - truth) ** 2).sum() / variance) if variance > 0 else float("nan"))
    return _mean(found)


METRICS: dict[str, dict[str, Metric]] = {
    "class": {
        "accuracy": accuracy,
        "balanced_accuracy": balanced_accuracy,
        "macro_f1": macro_f1,
        "auroc": auroc,
        "average_precision": average_precision,
        "ece": ece,
        "brier": brier,
        "log_loss": log_loss,
    },
    "multilabel": {
        "exact_match": exact_match,
        "accuracy": label_accuracy,
        "macro_f1": label_macro_f1,
        "micro_f1": label_micro_f1,
        "auroc": label_auroc,
        "average_precision": label_average_precision,
        "ece": label_ece,
        "brier": label_brier,
    },
    "regression": {"mae": mae, "rmse": rmse, "r2": r2},
}
LOWER_IS_BETTER = frozenset({"ece", "brier", "log_loss", "mae", "rmse"})
DEFAULT = {"class": "accuracy", "multilabel": "average_precision", "regression": "rmse"}


def find_metric(target: str, name: str | None) -> str:
    """The name of a metric of this kind of target; None = its `DEFAULT`.

    Raises:
        ValueError: not one of them.
    """
    if name is None:
        return DEFAULT[target]
    if name not in METRICS[target]:
        raise ValueError(f"metric {name!r}: for a {target} target there are {', '.join(METRICS[target])}")
    return name


def goodness(name: str, value: float) -> float:
    """The value with its sign turned where less is better; minus infinity for NaN."""
    signed = -value if name in LOWER_IS_BETTER else value
    return float("-inf") if np.isnan(signed) else signed


def reliability(confidence_N: np.ndarray, right_N: np.ndarray, bins: int = BINS) -> list[tuple[float, float, int]]:
    """What a calibration plot shows: per bin that is not empty, mean confidence, share that is right, samples.

    Args:
        confidence_N: in [0, 1].
        right_N: bool.
        bins: of equal width.
    """
    bin_N = np.minimum((confidence_N * bins).astype(np.int64), bins - 1)
    counts = np.bincount(bin_N, minlength=bins)
    confidence = np.bincount(bin_N, confidence_N, bins)
    right = np.bincount(bin_N, right_N, bins)
    return [(float(confidence[b] / n), float(right[b] / n), int(n)) for b, n in enumerate(counts) if n]


def _calibration_error(confidence_N: np.ndarray, right_N: np.ndarray, bins: int) -> float:
    rows = reliability(confidence_N, right_N, bins)
    return sum(abs(confidence - right) * n for confidence, right, n in rows) / max(1, len(confidence_N))


def _one_against_rest(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores and truth of each class; of two classes only those of the second."""
    for c in [1] if probabilities_NC.shape[1] == 2 else range(probabilities_NC.shape[1]):
        yield probabilities_NC[:, c], labels_N == c


def _columns(outputs_NL: np.ndarray, truth_NL: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each column's known cells; columns without any are left out."""
    for outputs_N, truth_N in zip(outputs_NL.T, truth_NL.T, strict=True):
        known_N = np.isfinite(truth_N)
        if known_N.any():
            yield outputs_N[known_N], truth_N[known_N]


def _mean(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _f1(predicted_N: np.ndarray, positive_N: np.ndarray) -> float:
    both = int(predicted_N.sum()) + int(positive_N.sum())
    return 2 * int((predicted_N & positive_N).sum()) / both if both else 0.0


def _auroc(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks_N = (last - (counts - 1) / 2)[inverse_N]  # ties share their mean rank
    return float((ranks_N[positive_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _average_precision(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Sum over thresholds of the gain in recall times the precision there; equal scores are one threshold."""
    positives = int(positive_N.sum())
    if not positives:
        return float("nan")
    order = np.argsort(-scores_N, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores_N[order])), len(order) - 1)
    hits = np.cumsum(positive_N[order])[ends]
    return float((np.diff(hits, prepend=0) / positives * (hits / (ends + 1))).sum())
