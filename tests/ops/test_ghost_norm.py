"""Vectorised ghost batch norm against a loop over chunks in float64 (the rules of contract 3)."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lanistr.ops.ghost_norm import GhostBatchNorm, chunk_rows


def loop(norm: GhostBatchNorm, x: torch.Tensor, views: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and running statistics: chunk by chunk, view by view; a last chunk of one row joins its neighbour."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    outputs = []
    for view, rows in enumerate(x.double().chunk(views)):
        chunks = list(rows.split(norm.virtual_batch or len(rows)))
        if len(chunks) > 1 and len(chunks[-1]) == 1:
            chunks[-2:] = [torch.cat(chunks[-2:])]
        for chunk in chunks:
            center, spread = chunk.mean(0), chunk.var(0, correction=0)
            outputs.append((chunk - center) / (spread + norm.eps).sqrt() * norm.weight + norm.bias)
            if view == 0:
                mean = (1 - norm.momentum) * mean + norm.momentum * center.detach()
                var = (1 - norm.momentum) * var + norm.momentum * chunk.var(0).detach()
    return torch.cat(outputs), mean, var


@settings(max_examples=60)
@given(rows=st.integers(2, 40), chunk=st.none() | st.integers(2, 12), views=st.integers(1, 2), seed=st.integers(0, 99))
def test_equals_a_loop_over_chunks_in_outputs_gradients_and_running_statistics(
    rows: int, chunk: int | None, views: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm = GhostBatchNorm(5, chunk, momentum=0.3).double()
    with torch.no_grad():
        norm.weight += 0.3 * torch.randn(5, generator=generator)
        norm.bias += 0.3 * torch.randn(5, generator=generator)
    twin = copy.deepcopy(norm)
    x = (3 + 2 * torch.randn(views * rows, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    expected, mean, var = loop(twin, y, views)
    out = norm(x, views)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.rows_seen == rows
    up = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(up)
    expected.backward(up)
    for ours, theirs in ((x, y), (norm.weight, twin.weight), (norm.bias, twin.bias)):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_float32_is_as_good_as_torchs_batch_norm_and_gradients_pass_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    norm, reference = GhostBatchNorm(6, None, momentum=0.1), torch.nn.BatchNorm1d(6)
    x = 100 + torch.randn(64, 6, generator=generator)
    torch.testing.assert_close(norm(x), reference(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var, reference.running_var, rtol=1e-4, atol=1e-5)
    norm = GhostBatchNorm(3, 4, momentum=0.1).double()
    rows = torch.randn(18, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: norm(r, views=2), (rows,))


@given(rows=st.integers(2, 500), chunk=st.integers(2, 100))
def test_every_chunk_has_two_rows_and_none_is_lost(rows: int, chunk: int) -> None:
    full, rest = chunk_rows(rows, chunk)
    assert full * chunk + rest == rows
    assert rest != 1
    assert rest <= chunk + 1


@pytest.mark.parametrize("training", [True, False])
def test_without_batch_statistics_the_running_ones_normalise_and_do_not_move(training: bool) -> None:
    norm = GhostBatchNorm(3, 4, momentum=0.1).train(training)
    norm.running_mean += 2
    norm.running_var *= 4
    x = torch.randn(1, 3)
    out = norm(x, batch_statistics=False)
    torch.testing.assert_close(out, (x - 2) / (4 + norm.eps) ** 0.5)
    assert torch.equal(norm.running_mean, torch.full((3,), 2.0))
    assert norm.rows_seen == 0


def test_statistics_stay_float32_in_a_bfloat16_module() -> None:
    norm = GhostBatchNorm(3, 4, momentum=0.1).bfloat16()
    assert norm(torch.randn(9, 3).bfloat16()).dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
