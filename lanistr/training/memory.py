"""Bytes that a training step needs beside its states, counted on the meta device: no memory, any size.

The counter watches every tensor that the forward and backward pass make and when it dies. So what checkpointing keeps, what
two layers share and what a modality of your own does needs no formula.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lanistr.batch import Batch


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step without parameters, their gradients, and the batch.

    Attributes:
        held: alive between the forward and the backward pass: the activations.
        peak: largest at any time, also in the middle of an operation that makes its output beside its input.
    """

    held: int
    peak: int


class _Live(TorchDispatchMode):
    """Sums the storages that are alive among those made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bound = self.peak = 0  # no more than ``bound`` bytes are alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                self._note(leaf)
        if self.bound > self.peak:
            self.peak = max(self.peak, self.alive())
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        found = self.storages.get(storage._cdata)
        if found is None or found[0].expired():  # an address may be used again
            self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.bound += storage.nbytes()

    def alive(self) -> int:
        """Bytes alive now."""
        self.storages = {key: found for key, found in self.storages.items() if not found[0].expired()}
        self.bound = sum(size for _, size in self.storages.values())
        return self.bound


def count_step(task: Any, batch: Batch) -> StepBytes:
    """Bytes of the forward and backward pass of one micro-batch.

    Args:
        task: in training mode, on the device of the batch (meta: nothing is computed); its ``weights`` are the lambdas.
        batch: one micro-batch.
    """
    with gradients_dropped(task), _Live() as live:
        loss = weighted_loss(task, batch)
        held = live.alive()
        loss.backward()
    return StepBytes(held, live.peak)


def weighted_loss(task: Any, batch: Batch) -> Tensor:
    """Of one micro-batch (equation 3), by its own counts."""
    totals: dict[str, Tensor] = task(batch)
    return torch.stack([task.weights[n] * t / max(batch.counts[n], 1) for n, t in totals.items()]).sum()


@contextlib.contextmanager
def gradients_dropped(task: nn.Module) -> Iterator[None]:
    """As under ZeRO-2, a gradient leaves as soon as it is whole: it is counted with the states and buffers."""
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in task.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@dataclass(frozen=True)
class States:
    """Bytes per rank that stay (``gradients``: from backward to update).

    Attributes:
        parameters: as the model computes with them.
        gradients: a rank's share of the reduced ones (stage 2), else all.
        optimizer: AdamW's two moments and, from stage 1 on, the float32 masters, which DeepSpeed keeps in float32, too.
        buffers: that gradients travel in.
        update: float32 copy of a rank's gradients while it updates, after the activations are gone.
        on_host: of these, in the memory of the host (offload).
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    update: int
    on_host: int = 0

    @property
    def on_device(self) -> int:
        """All but the update's."""
        return self.parameters + self.gradients + self.optimizer + self.buffers - self.on_host


def count_states(trained: int, frozen: int, zero: Mapping[str, Any], ranks: int, precision: str) -> States:
    """States under ZeRO (Rajbhandari et al. 2020, section 3; buffers and masters as DeepSpeed 0.19 has them).

    Args:
        trained, frozen: numbers of parameters.
        zero: ``zero_optimization`` of DeepSpeed's configuration.
        ranks: number of them.
        precision: ``float32`` or ``bfloat16``.
    """
    size = 2 if precision == "bfloat16" else 4
    stage = zero.get("stage", 0)
    share = -(-trained // ranks)
    moments = 8 * (share if stage else trained)
    masters = 4 * share if stage else 0
    buckets = 0
    if stage and zero.get("contiguous_gradients", True):
        buckets = (2 if zero.get("overlap_comm") else 1) * int(zero.get("reduce_bucket_size", 5e8)) * size
    offload = "offload_optimizer" in zero
    return States(
        parameters=size * (trained + frozen),
        gradients=size * (share if stage == 2 else trained),
        optimizer=moments + masters,
        buffers=buckets,
        update=4 * share if stage and precision == "bfloat16" and not offload else 0,
        on_host=moments + masters if offload else 0,
    )
