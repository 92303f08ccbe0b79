import itertools

import pytest

from lanistr.training.schedule import lr_at


def test_first_update_is_positive_the_peak_is_reached_and_the_end_is_near_final() -> None:
    rates = [lr_at(step, 100, 1e-3, 0.1, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[9] == rates[10] == pytest.approx(1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)


def test_without_warmup_the_first_update_has_the_peak_rate() -> None:
    assert lr_at(0, 10, 1e-3, 0.0, 0.0) == pytest.approx(1e-3)
