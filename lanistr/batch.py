"""Contract 2: packed batches.

Text tokens, time steps and fusion tokens are packed: sequences one after the other, no padding. Images and tabular
rows are dense over the *present rows only*. Every index that the forward pass needs is computed here, on the CPU,
once, so that the forward pass never asks the device a question.

Shape suffixes: B samples, S sequences, T packed rows (tokens or steps), L slots of a padded sequence, G slots of all
buckets, N rows of a modality.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

MAX_BUCKETS = 6
MIN_SAVING = 64
T = TypeVar("T")
L = TypeVar("L")


@dataclass(frozen=True)
class Layout:
    """Where packed sequences begin and end.

    Attention backends without varlen kernels pad sequences of similar length to the longest of them: a bucket. The
    slots of all buckets, one after the other, form one grid of G slots.

    Attributes:
        cu_seqlens: (S + 1,) int32 cumulative lengths.
        max_seqlen: longest sequence.
        positions_T: int64, 0, 1, ... restarting at each sequence.
        row_G: packed row of each slot; a padding slot repeats its sequence's first row (finite, masked).
        bias_G: float32, 0 where a slot is real, -inf where it is padding: added to the scores of the keys.
        slot_T: slot of each packed row.
        buckets: (sequences, slots per sequence) of each bucket.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    positions_T: Tensor
    row_G: Tensor
    bias_G: Tensor
    slot_T: Tensor
    buckets: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packed:
    """``values`` (T, ...) of the sequences that ``layout`` describes."""

    values: Tensor
    layout: Layout

    @property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,) int32."""
        return self.layout.cu_seqlens

    @property
    def max_seqlen(self) -> int:
        """Longest sequence."""
        return self.layout.max_seqlen


@dataclass(frozen=True)
class FusionIndex:
    """How fusion sequences are assembled: ``[CLS]`` and the tokens of every present modality, for each view.

    Sequences are ordered view by view, so that with two views the first half of the packed rows is the clean view and
    the second half the masked one, row by row aligned.

    Attributes:
        gather_T: row of the token pool per fusion row; the pool is ``cat([cls (1, D), tokens of modality 1, ...])``.
            Rows of dummies are in the pool but never gathered: their gradient is exactly zero.
        layout: of views * B sequences.
        cls_S: fusion row of each sequence's [CLS].
        token_weight_T: of one view: sample weight / number of tokens of the sample.
        slot_T: of one view: sample * (1 + modalities) + source of each row; source 0 is [CLS], i + 1 the i-th modality.
        slot_weight_T: of one view: 1 / rows in the row's slot.
    """

    gather_T: Tensor
    layout: Layout
    cls_S: Tensor
    token_weight_T: Tensor
    slot_T: Tensor
    slot_weight_T: Tensor


@dataclass(frozen=True)
class Loading:
    """How a micro-batch came about.

    Attributes:
        plan_s, read_s, collate_s: seconds; reading includes decoding.
        replaced: key and reason of each sample that another one stands in for.
    """

    plan_s: float = 0.0
    read_s: float = 0.0
    collate_s: float = 0.0
    replaced: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        keys: sample keys.
        views: 2 in pretraining (clean, masked), else 1.
        labels_B: int64, -1 = unlabelled.
        weights_B: float32, 0 for the padding samples of evaluation.
        presence_B: int64 bitmask in the manifest's bit order.
        inputs: per modality, in the manifest's order; what its `collate` returned.
        counts: how much each term predicts in this micro-batch (contract 4): known before forward.
        loading: how it was loaded, for the log.
        targets_BL: float32 numbers of a multi-label target or a regression, NaN = unknown; None with classes.
    """

    keys: tuple[str, ...]
    views: int
    labels_B: Tensor
    weights_B: Tensor
    presence_B: Tensor
    inputs: dict[str, Any]
    fusion: FusionIndex
    counts: dict[str, float]
    loading: Loading = Loading()
    targets_BL: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.keys)


def to_device(tree: T, device: torch.device | str) -> T:
    """Copy every tensor in nested dataclasses, dicts and tuples to ``device``."""
    return cast(T, map_leaves(tree, Tensor, lambda tensor: tensor.to(device, non_blocking=True)))


def map_leaves(tree: Any, kind: type[L], function: Callable[[L], Any]) -> Any:
    """The same nested dataclasses, dicts, lists and tuples with ``function`` of every ``kind`` in them."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(v, kind, function) for v in tree)
    if isinstance(tree, dict):
        return {k: map_leaves(v, kind, function) for k, v in tree.items()}
    if is_dataclass(tree) and not isinstance(tree, type):
        changed = {f.name: map_leaves(getattr(tree, f.name), kind, function) for f in fields(tree)}
        return replace(tree, **changed)
    return tree


def make_layout(lengths: Sequence[int] | np.ndarray) -> Layout:
    """The layout of packed sequences with these lengths (each at least 1)."""
    lengths_S = np.asarray(lengths, dtype=np.int64)
    assert lengths_S.ndim == 1, lengths_S.shape
    assert lengths_S.min(initial=0 if not len(lengths_S) else 1) > 0, "a packed sequence has at least one row"
    starts_S = np.concatenate([[0], np.cumsum(lengths_S)])
    positions_T = np.arange(starts_S[-1])
    positions_T -= np.repeat(starts_S[:-1], lengths_S)
    groups = _split_by_length(lengths_S)
    widths = [int(lengths_S[group].max()) for group in groups]
    ends = np.cumsum([len(group) * width for group, width in zip(groups, widths, strict=True)])
    row_G, bias_G = np.empty(ends[-1], dtype=np.int64), np.zeros(ends[-1], dtype=np.float32)
    first_slot_S = np.empty_like(lengths_S)
    for group, width, end in zip(groups, widths, ends, strict=True):
        begin = end - len(group) * width
        first_slot_S[group] = np.arange(begin, end, width)
        starts_S1, slots_L = starts_S[group, None], np.arange(width)
        padding_SL = slots_L >= lengths_S[group, None]
        row_SL = np.add(starts_S1, slots_L, out=row_G[begin:end].reshape(-1, width))
        np.copyto(row_SL, starts_S1, where=padding_SL)
        np.copyto(bias_G[begin:end].reshape(-1, width), np.float32(-np.inf), where=padding_SL)
    slot_T = np.repeat(first_slot_S, lengths_S)
    slot_T += positions_T
    return Layout(
        cu_seqlens=torch.from_numpy(starts_S.astype(np.int32)),
        max_seqlen=int(lengths_S.max()),
        positions_T=torch.from_numpy(positions_T),
        row_G=torch.from_numpy(row_G),
        bias_G=torch.from_numpy(bias_G),
        slot_T=torch.from_numpy(slot_T),
        buckets=tuple((len(group), width) for group, width in zip(groups, widths, strict=True)),
    )


def _split_by_length(lengths_S: np.ndarray) -> list[np.ndarray]:
    """Sequence ids in at most `MAX_BUCKETS` groups; cuts where the jump in length saves most padded slots.

    A cut that saves fewer than `MIN_SAVING` slots costs more in calls than it saves in work.
    """
    order = np.argsort(lengths_S, kind="stable")
    ordered = lengths_S[order]
    cuts = [_best_cut(ordered, 0, len(ordered))]
    while len(cuts) < MAX_BUCKETS:
        widest = max(range(len(cuts)), key=lambda i: cuts[i].saving)
        _, low, at, high = cuts[widest]
        if cuts[widest].saving < MIN_SAVING:
            break
        cuts[widest : widest + 1] = [_best_cut(ordered, low, at), _best_cut(ordered, at, high)]
    return [order[cut.low : cut.high] for cut in cuts]


class _Cut(NamedTuple):
    """Padded slots that are saved when ``[low, high)`` is cut at ``at``."""

    saving: int
    low: int
    at: int
    high: int


def _best_cut(ordered: np.ndarray, low: int, high: int) -> _Cut:
    """Of sequences in the order of their length."""
    if (high - low) * int(ordered[high - 1] - ordered[low]) < MIN_SAVING:
        return _Cut(0, low, low, high)
    inner = np.arange(low + 1, high)
    saving = (inner - low) * (ordered[high - 1] - ordered[low : high - 1])
    best = int(saving.argmax())
    return _Cut(int(saving[best]), low, int(inner[best]), high)


def make_fusion_index(
    token_counts: Sequence[np.ndarray],
    rows: Sequence[np.ndarray],
    pool_sizes: Sequence[int],
    weights_B: np.ndarray,
    views: int,
) -> FusionIndex:
    """Index that assembles the fusion sequences of ``views`` views of B samples.

    Args:
        token_counts: per modality, tokens that each real row contributes to one view (empty where all are dummies).
        rows: per modality, the sample of each real row, ascending.
        pool_sizes: per modality, tokens of one view in the pool, dummies included. The pool of a modality holds
            view 0, then view 1.
        weights_B: sample weights.
        views: 1 or 2.
    """
    size = len(weights_B)
    rows_in_slot = np.zeros((size, 1 + len(rows)), dtype=np.int64)
    rows_in_slot[:, 0] = 1
    first_in_pool = np.zeros((views, size, 1 + len(rows)), dtype=np.int64)  # row 0 of the pool is [CLS]
    start = 1
    for source, (counts, sample_of, pool) in enumerate(zip(token_counts, rows, pool_sizes, strict=True), 1):
        np.add.at(rows_in_slot[:, source], sample_of, counts)
        # Rows of a sample are neighbours in the pool: the first one tells where all of them are.
        offsets = np.concatenate([[0], np.cumsum(counts)])[:-1].astype(np.int64)
        first_in_pool[:, sample_of[::-1], source] = start + offsets[::-1] + pool * np.arange(views)[:, None]
        start += pool * views
    counts_VS = np.tile(rows_in_slot.ravel(), views)
    ends = np.cumsum(counts_VS)
    gather_T = np.repeat(first_in_pool.ravel() - (ends - counts_VS), counts_VS)
    gather_T += np.arange(ends[-1])
    per_sample = rows_in_slot.sum(1)
    layout = make_layout(np.tile(per_sample, views))
    sizes = rows_in_slot.ravel()
    weights = (1 / np.maximum(sizes, 1)).astype(np.float32)
    return FusionIndex(
        gather_T=torch.from_numpy(gather_T),
        layout=layout,
        cls_S=layout.cu_seqlens[:-1].long(),
        token_weight_T=torch.from_numpy(np.repeat((weights_B / per_sample).astype(np.float32), per_sample)),
        slot_T=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
        slot_weight_T=torch.from_numpy(np.repeat(weights, sizes)),
    )
