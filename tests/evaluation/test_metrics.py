import numpy as np
import pytest

from lanistr.evaluation.metrics import METRICS, auroc, evaluate_classification


def brute_auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    return float(np.mean(pairs))


def test_auroc_equals_the_share_of_ordered_pairs_ties_counted_half() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 60) / 6
    labels = rng.integers(0, 2, 60)
    binary = np.stack([1 - scores, scores], 1)
    assert auroc(binary, labels) == pytest.approx(brute_auroc(scores, labels == 1))
    three = rng.dirichlet(np.ones(3), 60)
    labels = rng.integers(0, 3, 60)
    expected = np.mean([brute_auroc(three[:, c], labels == c) for c in range(3)])
    assert auroc(three, labels) == pytest.approx(expected)


def test_metrics_agree_with_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    probabilities, labels = rng.dirichlet(np.ones(4), 80), rng.integers(0, 4, 80)
    predicted = probabilities.argmax(1)
    assert METRICS["accuracy"](probabilities, labels) == pytest.approx(sklearn.accuracy_score(labels, predicted))
    assert METRICS["macro_f1"](probabilities, labels) == pytest.approx(
        sklearn.f1_score(labels, predicted, average="macro")
    )


def test_bootstrap_interval_covers_the_estimate_and_shrinks_with_n() -> None:
    rng = np.random.default_rng(2)

    def width(n: int) -> float:
        labels = rng.integers(0, 2, n)
        right = rng.random(n) < 0.7
        p = np.where(right, labels, 1 - labels)
        result = evaluate_classification(np.stack([1 - p, p], 1), labels, draws=300)["accuracy"]
        low, high = result["ci95"]
        assert low <= result["value"] <= high
        return high - low

    assert width(2000) < 0.5 * width(100)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no labelled samples"):
        evaluate_classification(np.zeros((0, 2)), np.zeros(0))
