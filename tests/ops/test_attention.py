import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lanistr.batch import make_layout
from lanistr.ops.attention import attention, resolve_backend

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def qkv(rows: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("backend", ["sdpa_bucketed", "sdpa_padded"])
@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS)
def test_backend_equals_a_float64_loop_in_values_and_gradients(backend: str, lengths: list[int]) -> None:
    layout = make_layout(lengths)
    ours, reference = qkv(sum(lengths), torch.float32), qkv(sum(lengths), torch.float64)
    with torch.no_grad():
        for a, b in zip(ours, reference, strict=True):
            b.copy_(a)
    out = attention(*ours, layout, backend)
    expected = attention(*reference, layout, "reference")
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours, reference, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_close_to_the_reference() -> None:
    lengths = [3, 17, 30, 1]
    layout = make_layout(lengths)
    q, k, v = qkv(sum(lengths), torch.float32)
    expected = attention(q, k, v, layout, "reference")
    out = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout, "sdpa_bucketed")
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


def test_other_sequences_and_padding_slots_change_nothing_bitwise() -> None:
    lengths = [5, 9, 6, 30]
    layout = make_layout(lengths)
    first, second = qkv(50, torch.float32), qkv(50, torch.float32)
    with torch.no_grad():
        for tensor in second:
            tensor[5:14] += 1000.0  # sequence 1
    a, b = attention(*first, layout, "sdpa_bucketed"), attention(*second, layout, "sdpa_bucketed")
    assert torch.equal(a[:5], b[:5])
    assert torch.equal(a[14:], b[14:])


@given(lengths=LENGTHS)
def test_buckets_hold_every_row_once_and_waste_little(lengths: list[int]) -> None:
    layout = make_layout(lengths)
    rows = torch.cat([b.gather_SL.flatten()[b.real] for b in layout.buckets])
    assert sorted(rows.tolist()) == list(range(sum(lengths)))
    assert torch.equal(rows[layout.restore_T], torch.arange(sum(lengths)))
    slots = sum(b.gather_SL.numel() for b in layout.buckets)
    assert slots <= len(lengths) * max(lengths)


def test_a_backend_that_cannot_run_is_an_error_never_a_fall_back() -> None:
    assert resolve_backend("auto", "cpu") == "sdpa_bucketed"
    for name in ("torch_varlen", "flash_attn"):
        with pytest.raises(ValueError, match=f"{name} needs CUDA"):
            resolve_backend(name, "cpu")
    with pytest.raises(ValueError, match="allowed are auto, reference"):
        resolve_backend("xformers", "cpu")
