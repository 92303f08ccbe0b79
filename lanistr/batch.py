"""Contract 2: packed batches.

Text tokens, time steps and fusion tokens are packed: sequences one after the other, no padding. Images and tabular
rows are dense over the *present rows only*. Every index that the forward pass needs is computed here, on the CPU,
once, so that the forward pass never asks the device a question.

Shape suffixes: B samples, S sequences, T packed rows (tokens or steps), L slots of a padded sequence, G slots of all
buckets, N rows of a modality.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
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
        gather_T: row of the token pool per fusion row; the pool is ``cat([cls (1, D), tokens of modality 1, ...])``, then
            a learnt token for each modality that has one.
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
        alone: per modality of `Collator.alone`, the index of [CLS] and its tokens in the clean view.
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
    alone: dict[str, FusionIndex] = field(default_factory=dict)

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
    ends_S = lengths_S.cumsum()
    starts_S = ends_S - lengths_S
    order, sizes = _split_by_length(lengths_S)
    ordered = lengths_S[order]
    assert ordered[0] > 0, "a packed sequence has at least one row"
    widths = ordered[np.array(sizes).cumsum() - 1]
    width_S = widths.repeat(sizes)
    ordered_starts_S, slots_S = starts_S[order], width_S.cumsum()
    ahead_S = np.empty_like(lengths_S)  # the first slot of each sequence, less its first row
    ahead_S[order] = slots_S - width_S - ordered_starts_S
    row_T = np.arange(ends_S[-1])
    row_G = _ranges(ordered_starts_S, width_S)
    padding_S = width_S - ordered
    padding = _ranges(slots_S - padding_S, padding_S)
    row_G[padding] = ordered_starts_S.repeat(padding_S)
    bias_G = np.zeros(len(row_G), dtype=np.float32)
    bias_G[padding] = -np.inf
    cu_seqlens = np.zeros(len(ends_S) + 1, dtype=np.int32)
    cu_seqlens[1:] = ends_S
    return Layout(
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(widths[-1]),
        positions_T=torch.from_numpy(row_T - starts_S.repeat(lengths_S)),
        row_G=torch.from_numpy(row_G),
        bias_G=torch.from_numpy(bias_G),
        slot_T=torch.from_numpy(row_T + ahead_S.repeat(lengths_S)),
        buckets=tuple(zip(sizes, widths.tolist(), strict=True)),
    )


def _ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``first, first + 1, ...`` of each range, one range after the other."""
    ends = counts.cumsum()
    found = (firsts - (ends - counts)).repeat(counts)
    found += np.arange(len(found))
    return found


def _split_by_length(lengths_S: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Sequence ids from short to long, and the sizes of the at most `MAX_BUCKETS` groups that they are cut into.

    Cuts are where the jump in length saves most padded slots. One that saves fewer than `MIN_SAVING` slots costs more in
    calls than it saves in work.
    """
    order = lengths_S.argsort(kind="stable")
    ordered = lengths_S[order]
    cuts = [_best_cut(ordered, 0, len(ordered))]
    while len(cuts) < MAX_BUCKETS:
        widest = max(cuts, key=attrgetter("saving"))
        if widest.saving < MIN_SAVING:
            break
        place = cuts.index(widest)
        cuts[place : place + 1] = [
            _best_cut(ordered, widest.low, widest.at),
            _best_cut(ordered, widest.at, widest.high),
        ]
    return order, [cut.high - cut.low for cut in cuts]


class _Cut(NamedTuple):
    """Padded slots that are saved when ``[low, high)`` is cut at ``at``."""

    saving: int
    low: int
    at: int
    high: int


def _best_cut(ordered: np.ndarray, low: int, high: int) -> _Cut:
    """Of sequences in the order of their length."""
    if high - low < 2:
        return _Cut(0, low, low, high)
    saving = np.arange(1, high - low) * (ordered[high - 1] - ordered[low : high - 1])
    best = int(saving.argmax())
    return _Cut(int(saving[best]), low, low + 1 + best, high)


def make_fusion_index(
    token_counts: Sequence[np.ndarray],
    rows: Sequence[np.ndarray],
    pool_sizes: Sequence[int],
    weights_B: np.ndarray,
    views: int,
    absent_tokens: Sequence[bool] = (),
    pool_views: int | None = None,
) -> FusionIndex:
    """Index that assembles the fusion sequences of ``views`` views of B samples.

    Args:
        token_counts: per modality, tokens that each real row contributes to one view (empty where all are dummies).
        rows: per modality, the sample of each real row, ascending.
        pool_sizes: per modality, tokens of one view in the pool, dummies included. The pool of a modality holds
            view 0, then view 1.
        weights_B: sample weights.
        views: 1 or 2.
        absent_tokens: per modality, whether a learnt token stands in for it where a sample lacks it; none = nowhere.
        pool_views: in the pool, of which ``views`` are assembled; None = as many.
    """
    sources, size = 1 + len(rows), len(weights_B)
    sizes_BS = np.zeros((size, sources), dtype=np.int64)
    sizes_BS[:, 0] = 1  # [CLS], row 0 of the pool
    first_VBS = np.zeros((views, size, sources), dtype=np.int64)
    end = 1
    for source, (counts, sample_of, pool) in enumerate(zip(token_counts, rows, pool_sizes, strict=True), 1):
        sizes_BS[:, source] = np.bincount(sample_of, counts, size)
        # Rows of a sample are neighbours in the pool: the first one, written last, tells where all of them are.
        first = (end + counts.cumsum() - counts)[::-1]
        for view in range(views):
            first_VBS[view, sample_of[::-1], source] = first + view * pool
        end += (pool_views or views) * pool
    sizes_S = sizes_BS.reshape(-1)
    slots_S, slot_weights_S = np.arange(len(sizes_S)), (1 / sizes_S.clip(1)).astype(np.float32)
    for token, source in enumerate(1 + np.flatnonzero(absent_tokens)):
        lacking_B = sizes_BS[:, source] == 0
        sizes_BS[lacking_B, source], first_VBS[:, lacking_B, source] = 1, end + token  # behind all others in the pool
        # A learnt token is no content of its modality: it belongs to [CLS], with weight 0.
        lacking = lacking_B.nonzero()[0] * sources
        slots_S[lacking + source], slot_weights_S[lacking + source] = lacking, 0
    tokens_B = sizes_BS.sum(1)
    sizes_VS, tokens_VB = np.concatenate([sizes_S] * views), np.concatenate([tokens_B] * views)
    return FusionIndex(
        gather_T=torch.from_numpy(_ranges(first_VBS.reshape(-1), sizes_VS)),
        layout=make_layout(tokens_VB),
        cls_S=torch.from_numpy(tokens_VB.cumsum() - tokens_VB),
        token_weight_T=torch.from_numpy((weights_B / tokens_B).astype(np.float32).repeat(tokens_B)),
        slot_T=torch.from_numpy(slots_S.repeat(sizes_S)),
        slot_weight_T=torch.from_numpy(slot_weights_S.repeat(sizes_S)),
    )


def make_alone_index(
    source: int,
    token_counts: Sequence[np.ndarray],
    rows: Sequence[np.ndarray],
    pool_sizes: Sequence[int],
    weights_B: np.ndarray,
    pool_views: int,
) -> FusionIndex:
    """Index of [CLS] and the tokens of one modality in the first of the pool's views; arguments of `make_fusion_index`."""
    nothing = np.zeros(0, dtype=np.int64)
    counts, samples = ([a if i == source else nothing for i, a in enumerate(part)] for part in (token_counts, rows))
    return make_fusion_index(counts, samples, pool_sizes, weights_B, 1, pool_views=pool_views)
