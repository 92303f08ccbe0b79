"""Guards the position tables and the masks of the time-series transformer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lanistr.batch import make_layout
from lanistr.modalities.timeseries import SeriesConfig, SeriesTransformer, _runs, sinusoids


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
    fixed = SeriesTransformer(config.model_copy(update={"positions": "fixed"}), 3, "sdpa_bucketed")
    assert "positions" in learnable.state_dict()
    assert "positions" in dict(learnable.named_parameters())
    assert "positions" not in fixed.state_dict()
    assert "positions" not in dict(fixed.named_parameters())
    assert torch.equal(fixed.positions, sinusoids(5, 8))
    for parameter in fixed.parameters():  # as DeepSpeed does: parameters only
        parameter.data = parameter.data.bfloat16()
    assert fixed(torch.zeros(4, 3), make_layout([4])).dtype == torch.bfloat16


@settings(max_examples=60)
@given(
    steps=st.integers(1, 30),
    ratio=st.sampled_from([0.05, 0.15, 0.5, 0.7, 0.95]),
    length=st.sampled_from([1.0, 1.5, 3.0, 10.0]),
    seed=st.integers(0, 999),
)
def test_masked_runs_equal_a_loop_over_steps(steps: int, ratio: float, length: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    draws, first = rng.random((steps, 5)), rng.random(5) < ratio
    stop = 1 / length
    start = min(1.0, stop * ratio / (1 - ratio))
    expected, state = np.zeros((steps, 5), dtype=bool), first
    for step in range(steps):
        expected[step] = state
        state = np.where(state, draws[step] >= stop, draws[step] < start)
    assert np.array_equal(_runs(draws[:-1], first, start, stop), expected)


def test_series_encoder_equals_torchs_own_layers_on_a_padded_batch() -> None:
    """Zerveas et al. build on `torch.nn.TransformerEncoderLayer` (GELU, after-norm) with a padding mask."""
    torch.manual_seed(0)
    config = SeriesConfig(hidden=16, layers=2, heads=4, intermediate=32, max_steps=9)
    ours = SeriesTransformer(config, 3, "sdpa_bucketed").eval()
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation="gelu", batch_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for block, reference in zip(ours.blocks, theirs.layers, strict=True):
            for parameter in block.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
            reference.self_attn.in_proj_weight.copy_(block.qkv.weight)
            reference.self_attn.in_proj_bias.copy_(block.qkv.bias)
            pairs = (
                ("self_attn.out_proj", "out"),
                ("linear1", "up"),
                ("linear2", "down"),
                ("norm1",) * 2,
                ("norm2",) * 2,
            )
            for theirs_name, ours_name in pairs:
                reference.get_submodule(theirs_name).load_state_dict(getattr(block, ours_name).state_dict())
    lengths = [9, 2, 5]
    values = torch.randn(16, 3)
    hidden = ours(values, make_layout(lengths))
    padded = torch.nn.utils.rnn.pad_sequence(list(ours.input(values).split(lengths)), batch_first=True)
    keep = torch.arange(9) < torch.tensor(lengths)[:, None]
    expected = theirs(padded + ours.positions, src_key_padding_mask=~keep)
    torch.testing.assert_close(hidden, expected[keep], rtol=1e-5, atol=1e-5)
