"""Sparsemax against its definition, upstream, and numerical derivatives."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_tabnet.sparsemax import Sparsemax

from lanistr.ops.sparsemax import sparsemax


@settings(max_examples=50)
@given(rows=st.lists(st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4), min_size=1, max_size=5))
def test_equals_upstream_and_lies_on_the_simplex(rows: list[list[float]]) -> None:
    z = torch.tensor(rows)
    out = sparsemax(z)
    torch.testing.assert_close(out, Sparsemax(-1)(z.clone()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.sum(-1), torch.ones(len(z)), rtol=0, atol=1e-5)
    assert (out >= 0).all()


def test_is_the_nearest_point_of_the_simplex() -> None:
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(20, 6, generator=generator, dtype=torch.float64)
    others = torch.distributions.Dirichlet(torch.full((6,), 0.3, dtype=torch.float64)).sample(torch.Size((5000,)))
    ours = (sparsemax(z) - z).square().sum(-1)
    nearest = torch.cdist(z, others).square().amin(-1)
    assert (ours <= nearest + 1e-12).all()


def test_gradient_passes_gradcheck_and_leaves_the_input_alone() -> None:
    z = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    before = z.detach().clone()
    assert torch.autograd.gradcheck(sparsemax, (z,))
    assert torch.equal(z.detach(), before)
