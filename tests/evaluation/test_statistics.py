"""Intervals and paired tests: their coverage, and that pairs are kept."""

import numpy as np
import pytest

from lanistr.evaluation.statistics import compare, estimate
from lanistr.metrics import accuracy, mae


def outputs(labels: np.ndarray, right: np.ndarray) -> np.ndarray:
    p = np.where(right, labels, 1 - labels)
    return np.stack([1 - p, p], 1).astype(float)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        labels = rng.integers(0, 2, 120)
        found = estimate(accuracy, [outputs(labels, rng.random(120) < 0.7)], labels, draws=200, seed=trial)
        covered += found.low <= 0.7 <= found.high
    assert 88 <= covered <= 100


def test_interval_shrinks_with_samples_and_not_with_copies_of_a_group() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 100)
    one = outputs(labels, rng.random(100) < 0.7)
    copied, truth, groups = np.tile(one, (9, 1)), np.tile(labels, 9), np.tile(np.arange(100), 9)
    alone = estimate(accuracy, [one], labels, draws=400)
    naive = estimate(accuracy, [copied], truth, draws=400)
    grouped = estimate(accuracy, [copied], truth, groups_N=groups, draws=400)
    assert naive.high - naive.low < 0.5 * (alone.high - alone.low)
    assert grouped.high - grouped.low == pytest.approx(alone.high - alone.low, rel=0.25)


def test_seeds_widen_the_interval_where_they_differ() -> None:
    labels = np.zeros(400, dtype=int)
    rng = np.random.default_rng(1)
    bad, good = (outputs(labels, rng.random(400) < share) for share in (0.5, 0.9))
    spread = estimate(accuracy, [bad, good], labels, draws=300)
    assert spread.high - spread.low > 0.3
    assert spread.std == pytest.approx(np.std([accuracy(bad, labels), accuracy(good, labels)], ddof=1))


def test_pairing_finds_a_small_difference_that_unpaired_samples_hide() -> None:
    rng = np.random.default_rng(4)
    truth = rng.normal(size=(300, 1)) * 10
    noise = rng.normal(size=(300, 1)) * 3
    a, b = truth + noise, truth + noise * 1.03
    paired = compare(mae, [a], [b], truth, draws=400)
    assert paired.difference < 0
    assert paired.high < 0
    assert paired.p_bootstrap < 0.02
    assert paired.p_permutation < 0.02
    shuffled = rng.permutation(300)
    apart = compare(mae, [a], [b[shuffled] - truth[shuffled] + truth], truth, draws=400)
    assert apart.p_permutation > 0.05


def test_p_values_are_uniform_enough_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(5)
    boot, permuted = [], []
    for trial in range(80):
        labels = rng.integers(0, 2, 80)
        a, b = (outputs(labels, rng.random(80) < 0.7) for _ in range(2))
        found = compare(accuracy, [a], [b], labels, draws=150, seed=trial)
        boot.append(found.p_bootstrap)
        permuted.append(found.p_permutation)
    assert np.mean(np.array(permuted) < 0.05) <= 0.11
    assert np.mean(np.array(boot) < 0.05) <= 0.14
    assert np.median(permuted) > 0.25


def test_equal_methods_have_p_one() -> None:
    labels = np.array([0, 1, 1, 0])
    same = outputs(labels, np.array([True, False, True, True]))
    found = compare(accuracy, [same], [same], labels, draws=50)
    assert (found.difference, found.p_bootstrap, found.p_permutation) == (0, 1, 1)


def test_nothing_to_evaluate_and_unequal_samples_are_errors() -> None:
    with pytest.raises(ValueError, match="no labelled samples"):
        estimate(accuracy, [np.zeros((0, 2))], np.zeros(0))
    with pytest.raises(ValueError, match="not the same samples"):
        estimate(accuracy, [np.zeros((3, 2))], np.zeros(2))
    with pytest.raises(ValueError, match="same seeds"):
        compare(accuracy, [np.zeros((2, 2))], [np.zeros((2, 2))] * 2, np.zeros(2, dtype=int))
