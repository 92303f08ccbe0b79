"""Useful floating-point operations: what a batch needs, not what was executed for it.

A batch's work is counted by torch's own counter on the meta device, where nothing is computed, with every sequence at its
own length (no padding in attention) and nothing computed twice. The backward pass counts twice the forward pass.
"""

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lanistr.batch import Batch, Layout, map_leaves, to_device
from lanistr.config import Recipe
from lanistr.manifest import ModalitySchema
from lanistr.modalities import MODALITIES
from lanistr.modalities.base import Modality
from lanistr.model.lanistr import Lanistr
from lanistr.tasks import Pretrain


def meta_pretrain(
    recipe: Recipe, schemas: Mapping[str, ModalitySchema]
) -> tuple[Pretrain, dict[str, Modality[Any, Any]]]:
    """The pretraining task without memory, and its modalities.

    Args:
        recipe: sizes; ``pretrained`` names are not loaded: the sizes written in the recipe count.
        schemas: of the dataset.
    """
    modalities = {
        name: MODALITIES[schemas[name].kind](name, _without_weights(block), schemas[name])
        for name, block in recipe.model.modalities.items()
        if name in schemas
    }
    fusion = recipe.model.fusion.model_copy(update={"pretrained": None})
    off = {"fusion": fusion, "compile": False}
    with torch.device("meta"):
        model = Lanistr(recipe.model.model_copy(update=off), modalities, backend="sdpa_bucketed")
        task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, seed=0)
    return task.to("meta"), modalities  # with the buffers that were made from numpy


def _without_weights(block: dict[str, Any]) -> dict[str, Any]:
    return {key: None if key == "pretrained" else value for key, value in block.items()}


def unpadded(batch: Batch) -> Batch:
    """The batch on the meta device; each sequence is a bucket of its own, so that attention is counted without padding.

    The one-token dummies of modalities that nobody has stay in it.
    """
    exact = map_leaves(batch, Layout, _one_bucket_each)
    return to_device(exact, "meta")


def _one_bucket_each(layout: Layout) -> Layout:
    lengths = layout.cu_seqlens.diff().tolist()
    return Layout(
        layout.cu_seqlens, layout.max_seqlen, layout.positions_T, layout.row_G, layout.bias_G, layout.slot_T,
        tuple((1, length) for length in lengths),
    )  # fmt: skip


def useful_flops(task: Pretrain, batch: Batch) -> int:
    """Operations of a training step (forward and backward) on a micro-batch.

    Args:
        task: on the meta device.
        batch: on the CPU, as the loader gives it.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        task(unpadded(batch))
    return 3 * counter.get_total_flops()


class Useful:
    """Useful operations per fusion token, counted on one batch now and then: batches differ less in that than in size.

    Args:
        recipe, schemas: as `meta_pretrain`; the task is built at the first count.
    """

    def __init__(self, recipe: Recipe, schemas: Mapping[str, ModalitySchema]):
        self.recipe, self.schemas = recipe, schemas

    @cached_property
    def task(self) -> Pretrain:
        """On the meta device."""
        return meta_pretrain(self.recipe, self.schemas)[0]

    def per_token(self, batch: Batch) -> float:
        """Of a micro-batch."""
        return useful_flops(self.task, batch) / len(batch.fusion.token_weight_T)


def measured_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations per second of the best of some square matrix products: what is reachable here."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = min(_seconds(lambda: a @ b, device) for _ in range(6))
    return 2 * size**3 / best


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
