import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import norm, rankdata

from lanistr.modalities.scores import NormalScores

GRID = np.linspace(0, 1, 129)


def test_scores_are_normal_quantiles_of_mean_ranks() -> None:
    rng = np.random.default_rng(0)
    train = np.concatenate([rng.lognormal(0, 3, 4000), np.zeros(1500)])  # a long tail, and many ties
    found = NormalScores.of(np.quantile(train, GRID).tolist())(train)
    ranks = (rankdata(train) - 0.5) / len(train)
    expected = norm.ppf(ranks.clip(0.5 / 128, 1 - 0.5 / 128))
    expected = (expected - expected.mean()) / expected.std()
    assert np.abs(found - expected).mean() < 0.02
    assert found.mean() == pytest.approx(0, abs=0.02)
    assert found.std() == pytest.approx(1, abs=0.02)
    assert np.ptp(found[-1500:]) == 0


def test_the_median_of_a_long_tail_is_told_from_its_tenth_percentile() -> None:
    train = np.random.default_rng(0).lognormal(0, 3, 4000)
    tenth, median = np.quantile(train, [0.1, 0.5])
    scores = NormalScores.of(np.quantile(train, GRID).tolist())
    assert scores(np.array([median]))[0] - scores(np.array([tenth]))[0] > 1
    assert (median - tenth) / train.std() < 0.02  # standardised, they are one number


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(allow_nan=False))
@example([0.0, 0.0, 0.0, 0.0, -1.0], -3.0067090367264473e-147)  # np.interp puts it above 0
@example([0.0, 1e-310], 5e-311)  # no float holds the slope
def test_scores_are_finite_ascending_and_bounded_by_those_of_train(train: list[float], value: float) -> None:
    scores = NormalScores.of(np.quantile(train, GRID).tolist())
    found = scores(np.sort(np.array([*train, value])))
    assert np.isfinite(found).all()
    assert (np.diff(found) >= 0).all()
    assert (scores.scores_K[0] <= found).all()
    assert (found <= scores.scores_K[-1]).all()


def test_what_is_not_known_stays_so_and_a_constant_is_zero() -> None:
    assert np.isnan(NormalScores.of([0.0, 1.0, 2.0])(np.array([np.nan]))).all()
    assert NormalScores.of([3.0] * 129)(np.array([3.0, 9.0])).tolist() == [0, 0]
    assert NormalScores.of([0.0])(np.array([5.0])).tolist() == [0]
