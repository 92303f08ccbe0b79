"""Bidirectional attention over packed sequences: one function, several backends.

``torch_varlen`` and ``flash_attn`` need CUDA; ``sdpa_bucketed`` is the CPU's default; ``sdpa_padded`` and ``reference``
are comparators. No backend asks the device a question: every index is in the layout.

Shape suffixes: T packed rows, H heads, K head width, S sequences, L bucket length.
"""

import importlib.util
import itertools
import logging
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lanistr.batch import Bucket, Layout

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "sdpa_padded", "sdpa_bucketed", "torch_varlen", "flash_attn")


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
        return _bucketed(q_THK, k_THK, v_THK, layout)
    if backend == "torch_varlen":
        return _torch_varlen(q_THK, k_THK, v_THK, layout)
    if backend == "flash_attn":
        return _flash_attn(q_THK, k_THK, v_THK, layout)
    if backend == "sdpa_padded":
        return _padded(q_THK, k_THK, v_THK, layout)
    assert backend == "reference", backend
    return _reference(q_THK, k_THK, v_THK, layout)


def resolve_backend(name: str, device: str) -> str:
    """The backend that ``name`` means on ``device``.

    Args:
        name: a backend, or ``auto``: ``torch_varlen`` on CUDA, ``sdpa_bucketed`` elsewhere.
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: a requested backend that is unknown or cannot run here. There is no silent fall-back.
    """
    if name == "auto":
        chosen = "sdpa_bucketed"
        if device.startswith("cuda"):
            chosen = "torch_varlen" if _has_varlen() else "flash_attn"
        _log_once(chosen, device)
        return resolve_backend(chosen, device)
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r}: allowed are auto, {', '.join(BACKENDS)}")
    if name in ("torch_varlen", "flash_attn"):
        if not device.startswith("cuda"):
            raise ValueError(f"attention backend {name} needs CUDA, this is {device}; use auto or sdpa_bucketed")
        if name == "torch_varlen" and not _has_varlen():
            raise ValueError("attention backend torch_varlen needs torch >= 2.10")
        if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
            raise ValueError("attention backend flash_attn: install the extra 'flash'")
    return name


def _has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


@lru_cache
def _log_once(chosen: str, device: str) -> None:
    logger.info("attention backend: %s on %s", chosen, device)


def _bucketed(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: Layout) -> Tensor:
    outputs = [_one_bucket(q_THK, k_THK, v_THK, bucket) for bucket in layout.buckets]
    return torch.cat(outputs).index_select(0, layout.restore_T)


def _one_bucket(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, bucket: Bucket) -> Tensor:
    """(real rows of the bucket, H, K)."""
    shape, rows = bucket.gather_SL.shape, bucket.gather_SL.flatten()
    q_SHLK, k_SHLK, v_SHLK = (
        x.index_select(0, rows).unflatten(0, shape).transpose(1, 2) for x in (q_THK, k_THK, v_THK)
    )
    out_SHLK = _dense(q_SHLK, k_SHLK, v_SHLK, bucket.keep_S11L)
    return out_SHLK.transpose(1, 2).flatten(0, 1).index_select(0, bucket.real)


def _dense(q_SHLK: Tensor, k_SHLK: Tensor, v_SHLK: Tensor, keep_S11L: Tensor | None) -> Tensor:
    if q_SHLK.dtype == torch.bfloat16 and not q_SHLK.is_cuda:
        # Fused bf16 attention has a very slow backward on CPUs at short lengths (7x, measured).
        scores_SHLL = (q_SHLK @ k_SHLK.transpose(-1, -2)).float() * q_SHLK.shape[-1] ** -0.5
        if keep_S11L is not None:
            scores_SHLL = scores_SHLL.masked_fill(~keep_S11L, float("-inf"))
        return scores_SHLL.softmax(-1).to(v_SHLK.dtype) @ v_SHLK
    return scaled_dot_product_attention(q_SHLK, k_SHLK, v_SHLK, attn_mask=keep_S11L)


def _padded(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: Layout) -> Tensor:
    starts_S, lengths_S = layout.cu_seqlens[:-1].long(), layout.cu_seqlens.diff()
    slots_L = torch.arange(layout.max_seqlen, device=q_THK.device)
    keep_SL = slots_L < lengths_S[:, None]
    rows_SL = starts_S[:, None] + slots_L * keep_SL
    q, k, v = (x[rows_SL].transpose(1, 2) for x in (q_THK, k_THK, v_THK))
    out = scaled_dot_product_attention(q, k, v, attn_mask=keep_SL[:, None, None, :])
    return out.transpose(1, 2)[keep_SL]


def _reference(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: Layout) -> Tensor:
    outputs = []
    bounds = layout.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1) for x in (q_THK, k_THK, v_THK))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def _torch_varlen(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: Layout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = layout.cu_seqlens, layout.max_seqlen
    out = varlen_attn(q_THK.contiguous(), k_THK.contiguous(), v_THK.contiguous(), cu, cu, longest, longest)
    assert isinstance(out, Tensor)
    return out


def _flash_attn(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, layout: Layout) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    cu, longest = layout.cu_seqlens, layout.max_seqlen
    return flash_attn_varlen_func(q_THK, k_THK, v_THK, cu, cu, longest, longest)
