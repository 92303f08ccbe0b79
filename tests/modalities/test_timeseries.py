"""Guards the position tables of the time-series transformer."""

import math

import pytest
import torch

from lanistr.modalities.timeseries import SeriesConfig, SeriesTransformer, sinusoids


@pytest.mark.parametrize("width", [1, 5, 8])
def test_sinusoids_are_those_of_a_naive_loop(width: int) -> None:
    half = (width + 1) // 2
    for step, row in enumerate(sinusoids(7, width).tolist()):
        angles = [step / 1e4 ** (2 * f / width) for f in range(half)]
        want = ([math.sin(a) for a in angles] + [math.cos(a) for a in angles])[:width]
        assert row == pytest.approx(want, abs=1e-5)


def test_fixed_positions_are_neither_trained_nor_saved_and_learnable_ones_are_both() -> None:
    config = SeriesConfig(hidden=8, layers=1, heads=2, intermediate=16, max_steps=5)
    learnable = SeriesTransformer(config, 3, "sdpa")
    fixed = SeriesTransformer(config.model_copy(update={"positions": "fixed"}), 3, "sdpa")
    assert "positions" in learnable.state_dict()
    assert "positions" in dict(learnable.named_parameters())
    assert "positions" not in fixed.state_dict()
    assert "positions" not in dict(fixed.named_parameters())
    assert torch.equal(fixed.positions, sinusoids(5, 8))
