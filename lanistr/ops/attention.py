"""Bidirectional attention over packed sequences: one function, several backends.

``torch_varlen`` and ``flash_attn`` need CUDA and 16-bit floats; they are custom operators of their libraries.
``sdpa_bucketed`` (the CPU's default) and ``sdpa_padded`` are the custom operator `lanistr::padded_attention` of this
file; ``reference`` is a float64 loop. No backend but ``reference`` asks the device a question: every index is in the
layout.

Shape suffixes: T packed rows, G slots of all buckets, H heads, K head width, S sequences, L slots of a sequence.
"""

import importlib
import importlib.util
import itertools
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lanistr.batch import Layout

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "sdpa_padded", "sdpa_bucketed", "torch_varlen", "flash_attn")
# FlashAttention 3 (Hopper), 4 (Hopper, Blackwell), 2.8: the same function under three names.
FLASH_MODULES = ("flash_attn_interface", "flash_attn.cute", "flash_attn")


def attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: Layout, backend: str) -> Tensor:
    """Softmax attention within each packed sequence, scale 1 / sqrt(K), no dropout.

    Args:
        q_THK, k_THK, v_THK: packed rows of ``layout``.
        layout: where sequences begin and end.
        backend: resolved by `resolve_backend`.

    Returns:
        (T, H, K).
    """
    if backend == "sdpa_bucketed":
        out_THK, _ = padded_attention(
            q_THK, k_THK, v_THK, layout.row_G, layout.bias_G, layout.slot_T, list(itertools.chain(*layout.buckets))
        )
        return out_THK
    if backend in ("torch_varlen", "flash_attn"):
        return _varlen(q_THK, k_THK, v_THK, layout, backend)
    if backend == "sdpa_padded":
        out_THK, _ = padded_attention(q_THK, k_THK, v_THK, *_one_bucket(layout))
        return out_THK
    assert backend == "reference", backend
    return _reference(q_THK, k_THK, v_THK, layout)


def resolve_backend(name: str, device: str, precision: str = "float32") -> str:
    """The backend that ``name`` means.

    Args:
        name: a backend, or ``auto``: in 16 bits on CUDA ``torch_varlen``, else ``flash_attn``; ``sdpa_bucketed`` elsewhere.
        device: ``cpu`` or ``cuda``.
        precision: ``float32`` or ``bfloat16``.

    Raises:
        ValueError: a requested backend that is unknown or cannot run here. There is no silent fall-back.
    """
    if name == "auto":
        chosen = "sdpa_bucketed"
        if device.startswith("cuda") and precision != "float32":
            chosen = "torch_varlen" if _has_module("torch.nn.attention.varlen") else "flash_attn"
        _log_once(chosen, device, precision)
        return resolve_backend(chosen, device, precision)
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r}: allowed are auto, {', '.join(BACKENDS)}")
    if name in ("torch_varlen", "flash_attn"):
        if not device.startswith("cuda"):
            raise ValueError(f"attention backend {name} needs CUDA, this is {device}; use auto or sdpa_bucketed")
        if precision == "float32":
            raise ValueError(f"attention backend {name} needs precision bfloat16, this is float32; use auto")
        if name == "torch_varlen" and not _has_module("torch.nn.attention.varlen"):
            raise ValueError("attention backend torch_varlen needs torch >= 2.10")
        if name == "flash_attn" and not any(map(_has_module, FLASH_MODULES)):
            raise ValueError("attention backend flash_attn: install the extra 'flash'")
    return name


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a dotted name, a parent
        return False


@lru_cache
def _log_once(chosen: str, device: str, precision: str) -> None:
    logger.info("attention backend: %s on %s in %s", chosen, device, precision)


def _varlen(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: Layout, backend: str) -> Tensor:
    """Kernels that take packed rows. Their defaults are ours: scale 1 / sqrt(K), no dropout, not causal."""
    q_THK, k_THK, v_THK = q_THK.contiguous(), k_THK.contiguous(), v_THK.contiguous()
    cu, longest = layout.cu_seqlens, layout.max_seqlen
    if backend == "torch_varlen":
        module = importlib.import_module("torch.nn.attention.varlen")
        return module.varlen_attn(q_THK, k_THK, v_THK, cu, cu, longest, longest)
    module = importlib.import_module(next(filter(_has_module, FLASH_MODULES)))
    out = module.flash_attn_varlen_func(
        q_THK, k_THK, v_THK, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest
    )
    return out[0] if isinstance(out, tuple) else out  # FlashAttention 4 also returns the log-sum-exp


def _reference(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: Layout) -> Tensor:
    outputs = []
    for start, end in itertools.pairwise(layout.cu_seqlens.tolist()):
        q_HSK, k_HSK, v_HSK = (x[start:end].transpose(0, 1).double() for x in (q_THK, k_THK, v_THK))
        scores_HSS = q_HSK @ k_HSK.transpose(-1, -2) * q_HSK.shape[-1] ** -0.5
        outputs.append((scores_HSS.softmax(-1) @ v_HSK).transpose(0, 1))
    return torch.cat(outputs).to(q_THK.dtype)


def _one_bucket(layout: Layout) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Rows, bias, slots and size of a single bucket that holds all sequences, computed where the layout is."""
    starts_S, longest = layout.cu_seqlens[:-1].long(), layout.max_seqlen
    slots_L = torch.arange(longest, device=starts_S.device)
    keep_SL = slots_L < layout.cu_seqlens.diff()[:, None]
    row_G = (starts_S[:, None] + slots_L * keep_SL).flatten()
    bias_G = torch.zeros_like(keep_SL, dtype=torch.float32).masked_fill(~keep_SL, float("-inf")).flatten()
    rows_T = torch.arange(len(layout.positions_T), device=starts_S.device)
    sequence_T = torch.searchsorted(starts_S, rows_T, right=True) - 1
    return row_G, bias_G, sequence_T * longest + layout.positions_T, [len(starts_S), longest]


@torch.library.custom_op("lanistr::padded_attention", mutates_args=())
def padded_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    row_G: Tensor,
    bias_G: Tensor,
    slot_T: Tensor,
    buckets: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Attention with sequences padded bucket by bucket, inside this operator only.

    Args:
        q_THK, k_THK, v_THK: packed rows.
        row_G, bias_G, slot_T: see `lanistr.batch.Layout`.
        buckets: sequences and slots per sequence of each bucket, flattened.

    Returns:
        (T, H, K) and the log-sum-exp of the scores, (T, H) at least float32.
    """
    q_G, k_G, v_G = (x.index_select(0, row_G) for x in (q_THK, k_THK, v_THK))
    outputs, sums = [], []
    for q, k, v, bias in _by_bucket(buckets, q_G, k_G, v_G, bias_G):
        out_SHLK, lse_SHL = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias[:, None, None])
        outputs.append(out_SHLK.transpose(1, 2).flatten(0, 1))
        sums.append(lse_SHL.transpose(1, 2).flatten(0, 1))
    return _join(outputs).index_select(0, slot_T), _join(sums).index_select(0, slot_T)


@torch.library.custom_op("lanistr::padded_attention_backward", mutates_args=())
def padded_attention_backward(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    out_THK: Tensor,
    lse_TH: Tensor,
    row_G: Tensor,
    bias_G: Tensor,
    slot_T: Tensor,
    buckets: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; scores are computed anew."""
    tensors = [x.index_select(0, row_G) for x in (grad_THK, q_THK, k_THK, v_THK, out_THK, lse_TH)]
    tensors[0] *= bias_G.exp()[:, None, None]  # a padding slot repeats a real row: its output counts for nothing
    grads: list[list[Tensor]] = [[], [], []]
    for *padded, bias in _by_bucket(buckets, *tensors, bias_G):
        grad, q, k, v, out, lse = (x.transpose(1, 2) for x in padded)
        found = _attend_backward(grad, q, k, v, out, lse, bias[:, None, None])
        for collected, grad_SHLK in zip(grads, found, strict=True):
            collected.append(grad_SHLK.transpose(1, 2).flatten(0, 1))
    dq, dk, dv = (_join(collected).index_select(0, slot_T) for collected in grads)
    return dq, dk, dv


def _by_bucket(buckets: Sequence[int], *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Views (S, L, ...) of every tensor (G, ...), one tuple per bucket."""
    shapes = list(zip(buckets[::2], buckets[1::2], strict=True))
    parts = [x.split([s * length for s, length in shapes]) for x in tensors]
    return [
        tuple(x.unflatten(0, shape) for x in bucket)
        for shape, bucket in zip(shapes, zip(*parts, strict=True), strict=True)
    ]


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _use_fused(q_SHLK: Tensor) -> bool:
    """Torch's fused CPU kernel; its 16-bit backward is slow at short lengths (3 to 8 times, measured: DECISIONS.md)."""
    return q_SHLK.device.type == "cpu" and (q_SHLK.dtype.itemsize > 2 or q_SHLK.shape[2] > 160)


def _attend(q_SHLK: Tensor, k_SHLK: Tensor, v_SHLK: Tensor, bias_S11L: Tensor) -> tuple[Tensor, Tensor]:
    scale = q_SHLK.shape[-1] ** -0.5
    if _use_fused(q_SHLK):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_SHLK, k_SHLK, v_SHLK, attn_mask=bias_S11L.to(q_SHLK.dtype), scale=scale
        )
    scores_SHLL = (q_SHLK @ k_SHLK.transpose(-1, -2)).float() * scale + bias_S11L
    lse_SHL = scores_SHLL.logsumexp(-1)
    weights_SHLL = (scores_SHLL - lse_SHL[..., None]).exp_()
    return weights_SHLL.to(v_SHLK.dtype) @ v_SHLK, lse_SHL


def _attend_backward(
    grad_SHLK: Tensor,
    q_SHLK: Tensor,
    k_SHLK: Tensor,
    v_SHLK: Tensor,
    out_SHLK: Tensor,
    lse_SHL: Tensor,
    bias_S11L: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    scale = q_SHLK.shape[-1] ** -0.5
    if _use_fused(q_SHLK):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_SHLK,
            q_SHLK,
            k_SHLK,
            v_SHLK,
            out_SHLK,
            lse_SHL,
            0.0,
            False,
            attn_mask=bias_S11L.to(q_SHLK.dtype),
            scale=scale,
        )
    scores_SHLL = (q_SHLK @ k_SHLK.transpose(-1, -2)).float() * scale + bias_S11L
    weights_SHLL = (scores_SHLL - lse_SHL[..., None]).exp_()
    inner_SHL1 = (grad_SHLK * out_SHLK).float().sum(-1, keepdim=True)
    dweights_SHLL = (grad_SHLK @ v_SHLK.transpose(-1, -2)).float()
    dscores_SHLL = (weights_SHLL * (dweights_SHLL - inner_SHL1) * scale).to(q_SHLK.dtype)
    dv_SHLK = weights_SHLL.to(grad_SHLK.dtype).transpose(-1, -2) @ grad_SHLK
    return dscores_SHLL @ k_SHLK, dscores_SHLL.transpose(-1, -2) @ q_SHLK, dv_SHLK


@padded_attention.register_fake
def _fake(q_THK: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_THK.dtype, torch.float32)
    return torch.empty_like(q_THK, memory_format=torch.contiguous_format), q_THK.new_empty(q_THK.shape[:2], dtype=wide)


@padded_attention_backward.register_fake
def _fake_backward(
    grad_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_THK, v_THK))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.buckets = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_THK: Tensor, _: Any) -> tuple[Any, ...]:
    q_THK, k_THK, v_THK, row_G, bias_G, slot_T, out_THK, lse_TH = ctx.saved_tensors
    grads = padded_attention_backward(
        grad_THK, q_THK, k_THK, v_THK, out_THK, lse_TH, row_G, bias_G, slot_T, ctx.buckets
    )
    return *grads, None, None, None, None


padded_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.lanistr.padded_attention)
def _flops(q_shape: Sequence[int], *shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * _matrix_product(q_shape, shapes[-1])


@register_flop_formula(torch.ops.lanistr.padded_attention_backward)
def _flops_backward(grad_shape: Sequence[int], *shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return 5 * _matrix_product(grad_shape, shapes[-1])  # the scores are computed anew


def _matrix_product(shape: Sequence[int], buckets: Sequence[int]) -> int:
    """Floating-point operations of one (L, K) x (K, L) product per head and sequence."""
    _, heads, head_width = shape
    return sum(2 * s * length**2 * heads * head_width for s, length in zip(buckets[::2], buckets[1::2], strict=True))
