"""The probe against scikit-learn and against what was planted."""

import numpy as np
import pytest

from lanistr.evaluation.probe import Probe, Truth, alignment, bootstrap, fit_predict, linear_kernel, make_folds

EVERYONE = np.ones(120, dtype=bool)


def truth_of(values_NL: np.ndarray, groups_N: np.ndarray | None = None) -> Truth:
    n = len(values_NL)
    groups = np.arange(n) if groups_N is None else groups_N
    return Truth(values_NL, np.isfinite(values_NL), groups, values_NL.argmax(1))


def test_a_fit_is_kernel_ridge_regression() -> None:
    from sklearn.kernel_ridge import KernelRidge

    rng = np.random.default_rng(0)
    kernel = linear_kernel(rng.normal(size=(120, 7)), EVERYONE, np.arange(120), whiten=True)
    truth = truth_of(rng.normal(size=(120, 3)))
    train, test = np.arange(90), np.arange(90, 120)
    mean = truth.values_NL[train].mean(0)
    theirs = KernelRidge(alpha=2, kernel="precomputed").fit(kernel[np.ix_(train, train)], truth.values_NL[train] - mean)
    expected = theirs.predict(kernel[np.ix_(test, train)]) + mean
    _, found = fit_predict(kernel[:, train], truth.take(train), [3.0, 2.0])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_samples_without_a_source_have_its_mean_and_a_flag() -> None:
    rng = np.random.default_rng(0)
    present = rng.random(120) < 0.6
    features = np.where(present[:, None], rng.normal(size=(120, 4)), np.nan)
    kernel = linear_kernel(features, present, np.arange(120), whiten=False)
    assert np.isfinite(kernel).all()
    centred = features - features[present].mean(0)
    scale = (centred[present] ** 2).sum(1).mean()
    flag = present - present.mean()
    i, j = np.flatnonzero(present)[:2]
    k = np.flatnonzero(~present)[0]
    assert kernel[i, j] == pytest.approx(centred[i] @ centred[j] / scale + flag[i] * flag[j], abs=1e-5)
    assert kernel[i, k] == pytest.approx(flag[i] * flag[k], abs=1e-5)


def test_folds_keep_groups_whole_and_strata_alike() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 200)
    strata = groups % 4
    truth = Truth(np.zeros((200, 1)), np.ones((200, 1), dtype=bool), groups, strata)
    fold = make_folds(truth, 5, rng)
    for group in np.unique(groups):
        assert len(set(fold[groups == group])) == 1
    for value in range(4):
        counts = [len(set(groups[(fold == f) & (strata == value)])) for f in range(5)]
        assert max(counts) - min(counts) <= 1


def test_alignment_of_noise_is_a_standard_deviate_and_of_signal_far_above() -> None:
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(80, 5))
        y = np.eye(3)[rng.integers(0, 3, 80)]
        found.append(alignment(linear_kernel(x, EVERYONE[:80], np.arange(80), whiten=False), y - y.mean(0)))
    assert abs(np.mean(found)) < 0.3
    assert 0.75 < np.std(found) < 1.25
    rng = np.random.default_rng(0)
    y = np.eye(3)[rng.integers(0, 3, 80)]
    kernel = linear_kernel(y + rng.normal(size=y.shape), EVERYONE[:80], np.arange(80), whiten=False)
    assert alignment(kernel, y - y.mean(0)) > 5


def exclusive_or(n: int) -> Probe:
    """Two coins whose exclusive or is the class, beside noise."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2, n), rng.integers(0, 2, n)
    bank = {
        "a": linear_kernel(np.eye(2)[a], np.ones(n, dtype=bool), np.arange(n), whiten=False),
        "b": linear_kernel(np.eye(2)[b], np.ones(n, dtype=bool), np.arange(n), whiten=False),
        "noise": linear_kernel(rng.normal(size=(n, 6)), np.ones(n, dtype=bool), np.arange(n), whiten=True),
    }
    cases = [("a",), ("b",), ("noise",), ("a", "b"), ("a", "noise")]
    return Probe(bank, {name: [name] for name in bank}, cases, truth_of(np.eye(2)[a ^ b]))


def test_a_pair_that_only_tells_together_is_seen_and_noise_is_not() -> None:
    scores = exclusive_or(160).score(repeats=2, seed=0)
    assert scores.value(("a", "b")) > 0.9
    assert max(scores.value(case) for case in [("a",), ("b",), ("noise",), ("a", "noise")]) < 0.05
    assert scores.accuracy(("a", "b")) == 1.0
    assert scores.value(()) == 0


def test_scores_are_of_samples_that_were_not_fitted_on() -> None:
    """A kernel that recognises every sample and nothing else explains nothing."""
    n = 60
    identity = {"own": np.eye(n, dtype=np.float32)}
    rng = np.random.default_rng(0)
    probe = Probe(identity, {"own": ["own"]}, [("own",)], truth_of(np.eye(2)[rng.integers(0, 2, n)]))
    scores = probe.score(repeats=2, seed=0)
    assert scores.value(("own",)) == pytest.approx(0, abs=1e-6)


def test_the_deviation_of_the_bootstrap_is_that_of_other_samples() -> None:
    """Against the deviation of the value over 40 other samples of the same kind."""

    def probe(seed: int) -> Probe:
        rng = np.random.default_rng([seed, 7])
        y = rng.integers(0, 2, 150)
        x = np.eye(2)[y] + rng.normal(size=(150, 2))
        kernel = linear_kernel(x, np.ones(150, dtype=bool), np.arange(150), whiten=False)
        return Probe({"x": kernel}, {"x": ["x"]}, [("x",)], truth_of(np.eye(2)[y]))

    others = [probe(seed).score(1, 0) for seed in range(40)]
    expected = np.std([scores.value(("x",)) for scores in others])
    drawn, factor = bootstrap(probe(0), others[0].usual(), draws=60, most=1000, seed=0)
    assert factor == 1
    assert 0.6 < drawn[("x",)].std() / expected < 1.6
    few, factor = bootstrap(probe(0), others[0].usual(), draws=60, most=75, seed=0)
    assert factor == pytest.approx(0.5**0.5)
    assert 0.6 < few[("x",)].std() * factor / expected < 1.7
