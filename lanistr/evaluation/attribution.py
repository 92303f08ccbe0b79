"""What a fine-tuned model rests on: what it loses without each modality, where it looks, which columns it reads.

Shape suffixes: N samples, B samples of a batch, T packed fusion rows, H heads, K head width, Q queries and L keys of a sample,
S sources ([CLS], then the modalities), C cells of a modality.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lanistr.batch import Batch, to_device
from lanistr.data.hiding import HidingDataset
from lanistr.data.loader import Collator, eval_batches
from lanistr.data.reader import GoldDataset
from lanistr.evaluation.evaluate import Tuned, estimate_metric, load_tuned
from lanistr.evaluation.robustness import Predict
from lanistr.evaluation.statistics import compare
from lanistr.metrics import METRICS, Metric, find_metric, goodness
from lanistr.ops.transformer import Block
from lanistr.tasks import Finetune
from lanistr.training.best import predict

logger = logging.getLogger(__name__)
BATCH = 32


def explain(run: Path, data: Path, split: str, metric: str | None, rows: int, seed: int) -> dict[str, Any]:
    """Presence ablation on a split, and attention and column shares of some of its samples.

    Args:
        run: finished fine-tuning run.
        data: gold dataset.
        split: of it.
        metric: of the ablation; None = the default of the target.
        rows: samples that attention and columns are looked at in, at most.
        seed: of their draw.

    Raises:
        ValueError: not a fine-tuning run, a metric that the target has not, no labelled samples, or no rows.
    """
    if rows < 1:
        raise ValueError(f"{rows} rows to look at; at least 1 is needed")
    tuned = load_tuned(run, data, split)
    dataset, positions = tuned.dataset, tuned.dataset.labelled(None, 0)
    if not len(positions):
        raise ValueError(f"{data}: split {split} has no labelled sample")
    chosen = find_metric(dataset.manifest.target, metric)
    logger.info("%s: hiding modalities", run)
    answer = partial(predict, tuned.task, device=tuned.device)
    presence = ablate_presence(
        answer, dataset, positions, METRICS[dataset.manifest.target][chosen], goodness(chosen, 1.0)
    )
    looked_at = np.sort(np.random.default_rng(seed).permutation(positions)[:rows])
    logger.info("%s: looking at %d samples", run, len(looked_at))
    return {
        "run": str(run),
        "dataset": dataset.manifest.name,
        "content_id": dataset.content_id,
        "split": split,
        "samples": len(positions),
        "metric": chosen,
        "looked_at": len(looked_at),
        "pooling": tuned.task.pooling,
        **presence,
        "attention": _attention(tuned, looked_at),
        "columns": _columns(tuned, looked_at),
    }


def ablate_presence(
    answer: Predict, dataset: GoldDataset, positions: np.ndarray, metric: Metric, sign: float
) -> dict[str, Any]:
    """A metric with each modality hidden, and with each alone.

    Args:
        answer: outputs and truth of samples of a split, see `lanistr.metrics`.
        dataset: the split as it is.
        positions: in it.
        metric: to measure.
        sign: 1 where more is better, -1 where less is.

    Returns:
        ``whole`` and ``nothing`` (all hidden) over all samples. ``modalities``: per modality, over the ``n`` samples that
        have it, ``whole``, ``without``, ``alone``, and ``adds``: how much better whole is than without, with the 95 %
        interval and the p-value of the paired bootstrap. None where a metric is undefined.
    """
    names = list(dataset.modalities)

    def without(hidden: Sequence[str]) -> np.ndarray:
        return answer(HidingDataset(dataset, dict.fromkeys(hidden, 1.0), 0), positions)[0]

    whole, truth = answer(dataset, positions)
    rows = []
    for name in names:
        own = (dataset.presence[positions] & dataset.index.bits[name]) > 0
        row: dict[str, Any] = {"modality": name, "n": int(own.sum())}
        if own.any():
            less, alone = without([name])[own], without([other for other in names if other != name])[own]
            estimates = {"whole": whole[own], "without": less, "alone": alone}
            row |= {key: estimate_metric(metric, [outputs], truth[own]) for key, outputs in estimates.items()}
            found = compare(metric, [whole[own]], [less], truth[own])
            low, high = sorted([sign * found.low, sign * found.high])
            row["adds"] = {
                "value": _number(sign * found.difference),
                "ci95": [_number(low), _number(high)],
                "p": found.p_bootstrap,
            }
        rows.append(row)
    return {
        "whole": estimate_metric(metric, [whole], truth),
        "nothing": estimate_metric(metric, [without(names)], truth),
        "modalities": rows,
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _batches(dataset: GoldDataset, positions: np.ndarray) -> Iterator[Batch]:
    collator = Collator(dataset.modalities, views=1, seed=0)
    return eval_batches(dataset, collator, batch=BATCH, ranks=1, rank=0, positions=positions)


def _attention(tuned: Tuned, positions: np.ndarray) -> dict[str, Any]:
    """Mean shares over the samples that have the source: per layer, and of the tokens (what an even look would give)."""
    sources = ["[CLS]", *tuned.dataset.modalities]
    shares, tokens = [], []
    tuned.task.eval()
    for batch in _batches(tuned.dataset, positions):
        here = to_device(batch, tuned.device)
        shares.append(attention_shares(tuned.task, here).cpu().numpy())
        tokens.append(token_shares(here, len(sources)).cpu().numpy())
    shares_YNS = np.concatenate(shares, axis=1)[:, : len(positions)]
    tokens_NS = np.concatenate(tokens)[: len(positions)]
    there_NS = tokens_NS > 0
    rows = []
    for s, name in enumerate(sources):
        own = there_NS[:, s]
        row: dict[str, Any] = {"source": name, "n": int(own.sum())}
        if own.any():
            layers = shares_YNS[:, own, s].mean(1)
            row |= {"share": float(layers.mean()), "tokens": float(tokens_NS[own, s].mean()), "layers": layers.tolist()}
        rows.append(row)
    return {"query": "[CLS]" if tuned.task.pooling == "cls" else "mean of all tokens", "sources": rows}


@torch.no_grad()
def attention_shares(task: Finetune, batch: Batch) -> Tensor:
    """How the fusion encoder's attention falls on the sources, mean over heads.

    The query is what the classifier sees: [CLS], or the mean over all of a sample's tokens. The weights are computed anew
    from queries and keys; no attention backend gives them.

    Args:
        task: in eval mode, not compiled.
        batch: one view, on the task's device.

    Returns:
        (layers, B, S) float32; a sample's shares in a layer sum to 1.
    """
    caught: list[Tensor] = []

    def catch(_: nn.Module, __: Any, out: Tensor) -> None:
        caught.append(out)

    blocks = [cast(Block, block) for block in task.model.fusion.blocks]
    hooks = [block.qkv.register_forward_hook(catch) for block in blocks]
    try:
        task.model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    sources, only_cls = 1 + len(task.model.encoders), task.pooling == "cls"
    pairs = zip(blocks, caught, strict=True)
    return torch.stack([_shares(qkv_TD, batch, block.heads, sources, only_cls) for block, qkv_TD in pairs])


def _shares(qkv_TD: Tensor, batch: Batch, heads: int, sources: int, only_cls: bool) -> Tensor:
    """(B, S) of one layer."""
    q_THK, k_THK, _ = qkv_TD.float().unflatten(-1, (3, heads, -1)).unbind(1)
    source_T = batch.fusion.slot_T % sources
    rows = []
    for start, end in itertools.pairwise(batch.fusion.layout.cu_seqlens.tolist()):
        q_HQK = q_THK[start : start + 1 if only_cls else end].transpose(0, 1)
        k_HLK = k_THK[start:end].transpose(0, 1)
        weights_HQL = (q_HQK @ k_HLK.transpose(1, 2) * k_HLK.shape[-1] ** -0.5).softmax(-1)
        on_L = weights_HQL.mean((0, 1))
        rows.append(on_L.new_zeros(sources).index_add(0, source_T[start:end], on_L))
    return torch.stack(rows)


def token_shares(batch: Batch, sources: int) -> Tensor:
    """(B, S): the share of each source in a sample's fusion tokens."""
    counts_BS = torch.bincount(batch.fusion.slot_T, minlength=batch.size * sources).view(batch.size, sources)
    return counts_BS / counts_BS.sum(1, keepdim=True)


@torch.no_grad()
def _columns(tuned: Tuned, positions: np.ndarray) -> list[dict[str, Any]]:
    """Per modality whose encoder attends to cells, and cell: the mean share, and how often it is the largest."""
    rows = []
    for name, modality in tuned.dataset.modalities.items():
        shares = []
        for batch in _batches(tuned.dataset, positions) if modality.items == 1 else ():
            own_B = (batch.presence_B & tuned.dataset.index.bits[name]) > 0
            found = tuned.task.model.encoder(name).cell_shares(to_device(batch.inputs[name], tuned.device))
            if found is None:
                break
            if own_B.any():  # else the only row is a dummy
                shares.append(found.cpu()[batch.weights_B[own_B] > 0].numpy())
        if shares:
            cells = list(modality.cells(modality.example()))
            rows += _cells(name, cells, np.concatenate(shares))
    return sorted(rows, key=lambda row: -row["share"])


def _cells(name: str, cells: Sequence[str], shares_NC: np.ndarray) -> list[dict[str, Any]]:
    first_N = shares_NC.argmax(1)
    return [
        {"modality": name, "cell": cell, "share": float(shares_NC[:, c].mean()), "first": float((first_N == c).mean())}
        for c, cell in enumerate(cells)
    ]
