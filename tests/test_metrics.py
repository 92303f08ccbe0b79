"""Metrics against scikit-learn and against loops over pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanistr import metrics as ours
from lanistr.metrics import METRICS, find_metric, goodness, reliability

theirs = pytest.importorskip("sklearn.metrics")


def draw(seed: int, n: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with many ties, and labels of which every class occurs."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(1, 6, (n, classes)).astype(float)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    return scores / scores.sum(1, keepdims=True), labels


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(12, 90), classes=st.integers(2, 5))
def test_class_metrics_equal_scikit_learn(seed: int, n: int, classes: int) -> None:
    p, y = draw(seed, n, classes)
    predicted = p.argmax(1)
    one_hot = np.eye(classes)[y]
    expected = {
        "accuracy": theirs.accuracy_score(y, predicted),
        "balanced_accuracy": theirs.balanced_accuracy_score(y, predicted),
        "macro_f1": theirs.f1_score(y, predicted, average="macro"),
        "auroc": theirs.roc_auc_score(y, p[:, 1] if classes == 2 else p, multi_class="ovr"),
        "average_precision": theirs.average_precision_score(*((y, p[:, 1]) if classes == 2 else (one_hot, p))),
        "brier": theirs.brier_score_loss(y, p[:, 1]) if classes == 2 else ((p - one_hot) ** 2).sum(1).mean(),
        "log_loss": theirs.log_loss(y, p),
    }
    for name, value in expected.items():
        assert METRICS["class"][name](p, y) == pytest.approx(value, abs=1e-9), name


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), n=st.integers(10, 60), labels=st.integers(1, 4))
def test_multilabel_metrics_equal_scikit_learn(seed: int, n: int, labels: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.integers(0, 11, (n, labels)) / 10
    y = rng.integers(0, 2, (n, labels))
    y[0], y[1] = 0, 1
    predicted = p >= 0.5
    expected = {
        "exact_match": theirs.accuracy_score(y, predicted),
        "accuracy": 1 - theirs.hamming_loss(y, predicted),
        "macro_f1": np.mean([theirs.f1_score(y[:, i], predicted[:, i], zero_division=0) for i in range(labels)]),
        "micro_f1": theirs.f1_score(y.ravel(), predicted.ravel(), zero_division=0),
        "auroc": np.mean([theirs.roc_auc_score(y[:, i], p[:, i]) for i in range(labels)]),
        "average_precision": np.mean([theirs.average_precision_score(y[:, i], p[:, i]) for i in range(labels)]),
        "brier": np.mean([theirs.brier_score_loss(y[:, i], p[:, i]) for i in range(labels)]),
    }
    for name, value in expected.items():
        assert METRICS["multilabel"][name](p, y.astype(float)) == pytest.approx(value, abs=1e-9), name


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), n=st.integers(3, 60), columns=st.integers(1, 3))
def test_regression_metrics_equal_scikit_learn(seed: int, n: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    y, found = rng.normal(size=(2, n, columns)) * 3
    assert ours.mae(found, y) == pytest.approx(theirs.mean_absolute_error(y, found))
    assert ours.rmse(found, y) == pytest.approx(theirs.root_mean_squared_error(y, found))
    assert ours.r2(found, y) == pytest.approx(theirs.r2_score(y, found))


def test_unknown_cells_count_nowhere() -> None:
    rng = np.random.default_rng(0)
    p, y = rng.random((40, 3)), rng.integers(0, 2, (40, 3)).astype(float)
    y[rng.random((40, 3)) < 0.3] = np.nan
    known = np.isfinite(y)
    columns = range(3)
    expected = {
        "accuracy": theirs.accuracy_score(y[known], p[known] >= 0.5),
        "auroc": np.mean([theirs.roc_auc_score(y[known[:, i], i], p[known[:, i], i]) for i in columns]),
        "brier": np.mean((p[known] - y[known]) ** 2),
    }
    for name, value in expected.items():
        assert METRICS["multilabel"][name](p, y) == pytest.approx(value), name
    maes = [np.abs(p[known[:, i], i] - y[known[:, i], i]).mean() for i in columns]
    assert ours.mae(p, y) == pytest.approx(np.mean(maes))


def test_calibration_error_equals_a_loop_over_bins() -> None:
    rng = np.random.default_rng(3)
    p, y = rng.dirichlet(np.ones(4), 300), rng.integers(0, 4, 300)
    total = 0.0
    for b in range(15):
        inside = [i for i in range(300) if min(int(p[i].max() * 15), 14) == b]
        if inside:
            confidence = sum(p[i].max() for i in inside) / len(inside)
            right = sum(p[i].argmax() == y[i] for i in inside) / len(inside)
            total += len(inside) / 300 * abs(confidence - right)
    assert ours.ece(p, y) == pytest.approx(total)
    assert ours.label_ece(p, np.eye(4)[y]) == pytest.approx(
        sum(abs(c - r) * n for c, r, n in reliability(p.ravel(), np.eye(4)[y].ravel() == 1)) / 1200
    )
    assert ours.ece(np.eye(4)[y], y) == 0


def test_a_class_that_does_not_occur_is_left_out_of_the_area() -> None:
    p, y = draw(0, 40, 3)
    y = y % 2
    occurring = [theirs.roc_auc_score(y == c, p[:, c]) for c in (0, 1)]
    assert ours.auroc(p, y) == pytest.approx(np.mean(occurring))
    assert np.isnan(ours.auroc(p[:, :2], np.zeros(40, dtype=int)))


def test_unknown_metric_names_those_there_are() -> None:
    assert find_metric("regression", None) == "rmse"
    with pytest.raises(ValueError, match="mae, rmse, r2"):
        find_metric("regression", "accuracy")


def test_goodness_orders_losses_downwards_and_nothing_last() -> None:
    assert goodness("rmse", 1.0) > goodness("rmse", 2.0) > goodness("rmse", float("nan"))
    assert goodness("accuracy", 0.6) > goodness("accuracy", 0.5)
