"""Embeddings of samples: one per modality, and two of all that is there together.

Shape suffixes: N samples, B samples of a batch, D width of fusion, H hidden width of a modality's encoder, R packed fusion
rows, M modalities.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lanistr.batch import Batch, to_device
from lanistr.data.loader import Collator, eval_batches
from lanistr.data.reader import GoldDataset
from lanistr.model.lanistr import Lanistr
from lanistr.tasks import mean_tokens

EVAL_BATCH = 64


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of N samples, float32.

    Attributes:
        keys: of the samples.
        present: per modality, (N,) bool.
        modalities: per modality, (N, H) mean of its encoder's hidden states that enter fusion; NaN where it is absent.
        cls_ND: the fused [CLS] (the paper's; untrained by a SimMMM over tokens).
        fused_ND: mean of the fused tokens, [CLS] included: of any present subset of modalities.
    """

    keys: tuple[str, ...]
    present: dict[str, np.ndarray]
    modalities: dict[str, np.ndarray]
    cls_ND: np.ndarray
    fused_ND: np.ndarray


def embed(
    model: Lanistr,
    dataset: GoldDataset,
    positions: np.ndarray,
    device: torch.device | str = "cpu",
    *,
    workers: int = 0,
    batch: int = EVAL_BATCH,
) -> Embeddings:
    """Embeddings of the samples at these positions, in this order; the model is in eval mode afterwards.

    Args:
        model: on ``device``.
        dataset: its modalities are the model's, or some of them in the same order.
        positions: in the split.
        device: where the model is.
        workers: of the loader.
        batch: samples at a time.

    Raises:
        ValueError: a sample that cannot be read; no positions.
    """
    if not len(positions):
        raise ValueError("no samples to embed")
    collator = Collator(dataset.modalities, views=1, seed=0)
    batches = eval_batches(
        dataset, collator, batch=batch, ranks=1, rank=0, workers=workers, positions=np.asarray(positions)
    )
    return collect(model, batches, device, len(positions))


def collect(model: Lanistr, batches: Iterator[Batch], device: torch.device | str, n: int) -> Embeddings:
    """Embeddings of the first ``n`` samples of one-view batches."""
    model.eval()
    found = [embed_batch(model, to_device(b, device)) for b in batches]
    return join(found, n)


def join(parts: list[Embeddings], n: int) -> Embeddings:
    """One after the other, the first ``n``."""
    assert parts, "nothing to join"
    names = list(parts[0].modalities)
    return Embeddings(
        keys=tuple(key for part in parts for key in part.keys)[:n],
        present={name: np.concatenate([p.present[name] for p in parts])[:n] for name in names},
        modalities={name: np.concatenate([p.modalities[name] for p in parts])[:n] for name in names},
        cls_ND=np.concatenate([p.cls_ND for p in parts])[:n],
        fused_ND=np.concatenate([p.fused_ND for p in parts])[:n],
    )


@torch.no_grad()
def embed_batch(model: Lanistr, batch: Batch) -> Embeddings:
    """Embeddings of a one-view batch that is on the model's device."""
    assert batch.views == 1, "embeddings are of the clean view"
    fused_RD, hidden = model(batch)
    present, means = {}, {}
    start = 1  # row 0 of the pool is [CLS]
    for i, name in enumerate(model.encoders):
        rows_H = model.encoder(name).entering(hidden[name], batch.inputs[name])
        there_B, mean_BH = _means(rows_H, batch, i + 1, 1 + len(model.encoders), start)
        start += len(rows_H)
        present[name] = there_B.cpu().numpy()
        means[name] = mean_BH.cpu().numpy()
    return Embeddings(
        keys=batch.keys,
        present=present,
        modalities=means,
        cls_ND=fused_RD.index_select(0, batch.fusion.cls_S).float().cpu().numpy(),
        fused_ND=mean_tokens(fused_RD, batch).cpu().numpy(),
    )


def _means(rows_H: Tensor, batch: Batch, source: int, sources: int, start: int) -> tuple[Tensor, Tensor]:
    """Which samples have a modality, (B,), and the mean of its rows in each of them, (B, H) float32, NaN elsewhere."""
    own_R = batch.fusion.slot_T % sources == source
    sample_R = batch.fusion.slot_T[own_R] // sources
    rows = rows_H.float().index_select(0, batch.fusion.gather_T[own_R] - start)
    sums_BH = rows.new_zeros(batch.size, rows.shape[1]).index_add(0, sample_R, rows)
    count_B = rows.new_zeros(batch.size).index_add(0, sample_R, rows.new_ones(len(sample_R)))
    return count_B > 0, sums_BH / torch.where(count_B > 0, count_B, torch.nan)[:, None]
