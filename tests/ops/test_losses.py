import pytest
import torch

from lanistr.losses import decorrelation_loss
from lanistr.ops import masked_ce
from lanistr.ops.cosine import neg_cosine
from lanistr.ops.masked_ce import linear_cross_entropy


def test_linear_cross_entropy_equals_a_float64_loop_and_passes_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_ce, "CHUNK", 4)  # several chunks
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((10, 3), (7, 3)))
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 7, (10,)), torch.rand(10, dtype=torch.float64)
    expected = sum(-float(weights[i]) * (hidden[i] @ weight.T + bias).log_softmax(0)[targets[i]] for i in range(10))
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, bias, targets, weights), expected)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, b, targets, weights), (hidden, weight, bias)
    )


def test_rows_of_weight_zero_add_exactly_nothing() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(6, 3), torch.randn(7, 3), torch.randn(7)
    targets, weights = torch.randint(0, 7, (6,)), torch.tensor([1.0, 1, 1, 0, 0, 0])
    whole = linear_cross_entropy(hidden, weight, bias, targets, weights)
    hidden[3:] = 1e3
    assert torch.equal(whole, linear_cross_entropy(hidden, weight, bias, targets, weights))


def test_neg_cosine_is_minus_one_for_aligned_rows_and_gives_the_target_no_gradient() -> None:
    p, z = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    torch.testing.assert_close(neg_cosine(3 * p, p.detach()), -torch.ones(4))
    neg_cosine(p, z).sum().backward()
    assert p.grad is not None
    assert z.grad is None
    p, z = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda prediction: neg_cosine(prediction, z), (p,))


def test_decorrelation_is_low_for_independent_and_high_for_collapsed_embeddings() -> None:
    torch.manual_seed(0)
    independent = torch.randn(4000, 8)
    collapsed = independent[:, :1].expand(-1, 8)
    constant = torch.zeros(4000, 8)
    assert decorrelation_loss(independent) < 0.05
    assert decorrelation_loss(collapsed) == pytest.approx(7.0, rel=0.01)
    assert decorrelation_loss(constant) > 5
