"""Packed attention: every backend against the float64 loop, or against the contract of the kernels it calls."""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lanistr.batch import Layout, make_layout, to_device
from lanistr.ops import attention as module
from lanistr.ops.attention import FLASH_MODULES, attention, resolve_backend
from tests.dispatch import NoQuestions

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def qkv(rows: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("backend", ["sdpa_bucketed", "sdpa_padded"])
@settings(max_examples=30)
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
    rows = layout.row_G[layout.bias_G == 0]
    assert sorted(rows.tolist()) == list(range(sum(lengths)))
    assert torch.equal(layout.row_G[layout.slot_T], torch.arange(sum(lengths)))
    assert sum(s * length for s, length in layout.buckets) == len(layout.row_G) <= len(lengths) * max(lengths)


def test_a_backend_that_cannot_run_is_an_error_never_a_fall_back() -> None:
    assert resolve_backend("auto", "cpu") == "sdpa_bucketed"
    for name in ("torch_varlen", "flash_attn"):
        with pytest.raises(ValueError, match=f"{name} needs CUDA"):
            resolve_backend(name, "cpu")
        with pytest.raises(ValueError, match=f"{name} needs precision bfloat16"):
            resolve_backend(name, "cuda")
    with pytest.raises(ValueError, match="install the extra 'flash'"):
        resolve_backend("flash_attn", "cuda", "bfloat16")
    with pytest.raises(ValueError, match="allowed are auto, reference"):
        resolve_backend("xformers", "cpu")


def test_auto_chooses_by_device_and_precision_and_logs_once(caplog: pytest.LogCaptureFixture) -> None:
    module._log_once.cache_clear()
    with caplog.at_level("INFO", logger="lanistr.ops.attention"):
        chosen = [resolve_backend("auto", "cuda", p) for p in ("bfloat16", "bfloat16", "float32")]
    assert chosen == ["torch_varlen", "torch_varlen", "sdpa_bucketed"]
    assert [r.getMessage() for r in caplog.records] == [
        "attention backend: torch_varlen on cuda in bfloat16",
        "attention backend: sdpa_bucketed on cuda in float32",
    ]


class VarlenDouble:
    """Stands in for a CUDA kernel: checks the contract that all of them share, then answers with the reference."""

    def __init__(self, layout: Layout, lse: bool) -> None:
        self.layout, self.lse, self.calls = layout, lse, 0

    def check(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, cu_k: torch.Tensor, longest: int
    ) -> Any:
        assert {x.dtype for x in (q, k, v)} == {torch.bfloat16}
        assert all(x.is_contiguous() and x.shape == q.shape and x.ndim == 3 for x in (q, k, v))
        for cumulative in (cu, cu_k):
            assert cumulative.dtype == torch.int32
            assert cumulative.is_contiguous()
            assert cumulative[0] == 0
            assert cumulative[-1] == len(q)
        assert type(longest) is int
        assert longest == cu.diff().max()
        self.calls += 1
        out = attention(q, k, v, self.layout, "reference")
        return (out, torch.zeros(q.shape[:2])) if self.lse else out

    def varlen_attn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Any:
        """The parameters of `torch.nn.attention.varlen.varlen_attn` (2.13)."""
        assert max_q == max_k
        assert scale in (None, query.shape[-1] ** -0.5)
        assert window_size == (-1, -1)
        return self.check(query, key, value, cu_seq_q, cu_seq_k, max_q)

    def flash_attn_varlen_func(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Any:
        """The parameters of flash-attn 2.8 that versions 3 and 4 share, but for dropout, which they lack."""
        assert dropout_p == 0
        assert softmax_scale in (None, q.shape[-1] ** -0.5)
        assert not causal
        assert max_seqlen_q == max_seqlen_k
        return self.check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)


@pytest.mark.parametrize(
    "backend,library",
    [("torch_varlen", "torch.nn.attention.varlen"), *(("flash_attn", name) for name in FLASH_MODULES)],
)
def test_varlen_kernels_get_what_their_contract_asks_for(
    backend: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_layout([3, 17, 30, 1])
    double = VarlenDouble(layout, lse=library == "flash_attn.cute")
    monkeypatch.setattr(module, "_has_module", lambda name: name == library)
    monkeypatch.setattr(module.importlib, "import_module", lambda name: {library: double}[name])
    assert resolve_backend(backend, "cuda", "bfloat16") == backend
    qkv_T3HK = torch.randn(51, 3, 2, 8).bfloat16()  # its slices are not contiguous
    out = attention(*qkv_T3HK.unbind(1), layout, backend)
    assert double.calls == 1
    torch.testing.assert_close(out, attention(*qkv_T3HK.unbind(1), layout, "reference"))


def test_torchs_varlen_function_has_the_parameters_of_the_double() -> None:
    from torch.nn.attention.varlen import varlen_attn

    real = inspect.signature(varlen_attn).parameters
    ours = [p for p in inspect.signature(VarlenDouble.varlen_attn).parameters if p != "self"]
    assert [p for p in real if p in ours] == ours


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch_varlen", "flash_attn"])
def test_real_varlen_kernel_equals_the_reference_in_values_and_gradients(backend: str) -> None:
    resolve_backend(backend, "cuda", "bfloat16")
    layout = to_device(make_layout([3, 17, 30, 1]), "cuda")
    ours = [x.detach().cuda().bfloat16().requires_grad_() for x in qkv(51, torch.float32)]
    reference = [x.detach().double().requires_grad_() for x in ours]
    out, expected = attention(*ours, layout, backend), attention(*reference, layout, "reference")
    torch.testing.assert_close(out.double(), expected, rtol=3e-2, atol=3e-2)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours, reference, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_right_on_both_sides_of_the_choice_of_kernel(dtype: torch.dtype) -> None:
    """In 16 bits short buckets take explicit softmax attention, long ones torch's fused kernel."""
    lengths = [5, 7, 200, 180]
    layout = make_layout(lengths)
    ours = [x.detach().to(dtype).requires_grad_() for x in qkv(sum(lengths), torch.float32)]
    reference = [x.detach().double().requires_grad_() for x in ours]
    out, expected = attention(*ours, layout, "sdpa_bucketed"), attention(*reference, layout, "reference")
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(up.to(dtype))
    expected.backward(up.to(dtype).double())
    allowed = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.double(), expected, rtol=allowed, atol=allowed)
    for a, b in zip(ours, reference, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < allowed


def test_operator_passes_torchs_own_checks_and_gradcheck() -> None:
    layout = make_layout([3, 5, 4])
    inputs = qkv(12, torch.float64)
    buckets = [n for pair in layout.buckets for n in pair]
    torch.library.opcheck(module.padded_attention, (*inputs, layout.row_G, layout.bias_G, layout.slot_T, buckets))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, layout, "sdpa_bucketed"), inputs)


def test_operator_asks_the_device_no_question() -> None:
    layout = make_layout([3, 17, 30, 1])
    q, k, v = (x.detach() for x in qkv(51, torch.float32))
    buckets = [n for pair in layout.buckets for n in pair]
    indices = (layout.row_G, layout.bias_G, layout.slot_T, buckets)
    with NoQuestions():
        out, lse = module.padded_attention._init_fn(q, k, v, *indices)
        module.padded_attention_backward._init_fn(out, q, k, v, out, lse, *indices)
        module._one_bucket(layout)
