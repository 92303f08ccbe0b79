"""``python -m lanistr plan``: what a GPU must hold under a recipe, and the largest micro-batch that fits."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lanistr.batch import Batch, map_leaves, to_device
from lanistr.config import Recipe, load_recipe
from lanistr.data.loader import Collator
from lanistr.data.reader import Sample
from lanistr.describe import schemas_of
from lanistr.manifest import Manifest, ModalitySchema
from lanistr.modalities.base import Modality
from lanistr.model.lanistr import build_model
from lanistr.tasks import Pretrain
from lanistr.training.flops import meta_pretrain
from lanistr.training.memory import States, StepBytes, count_states, count_step

GIB = 2**30
# CUDA context, NCCL's buffers, and what the allocator cannot use. Assumed: nothing of this has run on a GPU.
RESERVED, UNUSABLE = 1.5 * GIB, 0.05
MOST = 4096  # samples per micro-batch that are tried
ZERO = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 50_000_000}  # as in ds_configs


@dataclass(frozen=True)
class Model:
    """A recipe's pretraining task on the meta device; counts are for complete samples of the largest size."""

    recipe: Recipe
    schemas: Mapping[str, ModalitySchema]

    @cached_property
    def built(self) -> tuple[Pretrain, dict[str, Modality[Any, Any]]]:
        """The task in the recipe's precision, and its modalities."""
        task, modalities = meta_pretrain(self.recipe, self.schemas)
        return task.to(dtype_of(self.recipe)).train(), modalities

    @property
    def parameters(self) -> tuple[int, int]:
        """Trained and frozen."""
        every = list(self.built[0].parameters())
        trained = sum(p.numel() for p in every if p.requires_grad)
        return trained, sum(p.numel() for p in every) - trained

    def step(self, samples: int) -> StepBytes:
        """Of a micro-batch."""
        task, modalities = self.built
        return count_step(task, to_device(largest_batch(modalities, samples), "meta"), task.weights)


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Of the parameters that the model computes with."""
    return torch.bfloat16 if recipe.pretrain.precision == "bfloat16" else torch.float32


def largest_batch(modalities: Mapping[str, Modality[Any, Any]], samples: int) -> Batch:
    """Complete samples of the largest size."""
    contents = {name: modality.example() for name, modality in modalities.items()}
    made = [Sample(key=f"{i:016x}", presence=0, label=-1, contents=contents) for i in range(samples)]
    return Collator(dict(modalities), views=2, seed=0)(made, [1.0] * samples, epoch=0)


def largest_fitting(model: Model, room: float, update: float) -> int:
    """The largest micro-batch whose peak is at most ``room`` bytes; 0 = not even one sample, or the update, fits."""
    if max(model.step(1).peak, update) > room:
        return 0
    at, peak, found = 1, model.step(1).peak, 4
    for _ in range(4):  # nearly linear: the secant, then made exact
        now = model.step(found).peak
        slope = max(1.0, (now - peak) / max(1, found - at))
        at, peak, found = found, now, max(1, min(MOST, int(found + (room - now) / slope)))
        if found == at:
            break
    while found > 1 and model.step(found).peak > room:
        found -= 1
    while found < MOST and model.step(found + 1).peak <= room:
        found += 1
    return found


def saved_bytes(recipe: Recipe, schemas: Mapping[str, ModalitySchema], samples: int) -> int:
    """Measured: bytes that autograd really saves on this CPU for backward, by ``saved_tensors_hooks``; each storage once."""
    _, modalities = meta_pretrain(recipe, schemas)
    batch = largest_batch(modalities, samples)
    model = build_model(recipe.model, modalities, seed=0)
    task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, seed=0).to(dtype_of(recipe)).train()
    own = {tensor.untyped_storage()._cdata for tensor in [*task.parameters(), *task.buffers()]}
    map_leaves(batch, Tensor, lambda tensor: own.add(tensor.untyped_storage()._cdata))
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def read_zero(path: Path | None, stage: int) -> dict[str, Any]:
    """``zero_optimization`` of a configuration, or that of the shipped files for a stage."""
    if path is None:
        return {"stage": stage, **ZERO}
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}; give a file like ds_configs/zero2.json") from None


def plan(
    recipe: Recipe, zero: Mapping[str, Any], gpus: int, gpu_memory: float, manifest: Manifest | None = None
) -> str:
    """The plan as a table.

    Args:
        recipe: its ``pretrain`` block counts.
        zero: of DeepSpeed's configuration.
        gpus: ranks.
        gpu_memory: GiB of each.
        manifest: a dataset's schema; None = the paper's.

    Raises:
        ValueError: ``gpus`` or ``gpu_memory`` below 1; more GPUs than samples in a step; bfloat16 at stage 0.
    """
    if gpus < 1 or gpu_memory <= 0:
        raise ValueError(f"--gpus {gpus} --gpu-memory {gpu_memory}: give at least one GPU, and its memory in GiB")
    if gpus > recipe.pretrain.global_batch:
        raise ValueError(
            f"--gpus {gpus}: a step has only {recipe.pretrain.global_batch} samples (pretrain.global_batch)"
        )
    if zero.get("stage", 0) == 0 and recipe.pretrain.precision == "bfloat16":
        raise ValueError("stage 0 with bfloat16 trains wrong and is refused in training; plan stage 1 or 2")
    model = Model(recipe, schemas_of(recipe, manifest))
    states = count_states(*model.parameters, zero, gpus, recipe.pretrain.precision)
    room = gpu_memory * GIB * (1 - UNUSABLE) - RESERVED - states.on_device
    return "\n".join(
        [
            *_head(recipe, zero, gpus, gpu_memory, model),
            *_states_table(states, zero, gpus),
            f"  {'reserved (assumed: CUDA, NCCL, 5 % unusable)':<50}{_gib(RESERVED + UNUSABLE * gpu_memory * GIB)}",
            f"  {'left for a step':<50}{_gib(room)}",
            "",
            *_step_table(model, states, room, gpus, gpu_memory),
            "",
            *_check(),
        ]
    )


def _head(recipe: Recipe, zero: Mapping[str, Any], gpus: int, gpu_memory: float, model: Model) -> list[str]:
    offload = " with CPU offload" if "offload_optimizer" in zero else ""
    kept = "checkpointed" if recipe.model.checkpoint_activations else "kept"
    return [
        f"recipe {recipe.name}, {sum(model.parameters) / 1e6:.1f} M parameters, {recipe.pretrain.precision}",
        f"{gpus} GPUs of {gpu_memory:g} GiB, ZeRO-{zero.get('stage', 0)}{offload}, activations {kept}",
        "",
        f"  {'per GPU':<50}{'GiB':>8}",
    ]


def _states_table(states: States, zero: Mapping[str, Any], gpus: int) -> list[str]:
    stage = zero.get("stage", 0)
    share = f"1/{gpus} of " if gpus > 1 else ""
    optimizer = "AdamW's moments" + (", float32 masters" if stage else "")
    rows = [
        ("parameters", states.parameters),
        (f"{share if stage == 2 else ''}gradients", states.gradients),
        (f"{share if stage else ''}{optimizer}" + (" (on the host)" if states.on_host else ""), states.optimizer),
        ("buckets that gradients travel in", states.buffers),
    ]
    return [f"  {name:<50}{_gib(size)}" for name, size in rows]


def _step_table(model: Model, states: States, room: float, gpus: int, gpu_memory: float) -> list[str]:
    config = model.recipe.pretrain
    per_gpu = config.global_batch // gpus
    micro = config.micro_batch or per_gpu
    lines = [
        "  a step of complete samples of the largest size, both views",
        f"  {'micro-batch':<26}{'held':>12}{'peak':>12}",
    ]
    for samples in sorted({1, micro}):
        step = model.step(samples)
        lines.append(f"  {samples:<26}{_gib(step.held, 12)}{_gib(step.peak, 12)}")
    if states.update:
        lines.append(f"  {'float32 gradients, later, in the update':<38}{_gib(states.update, 12)}")
    largest = largest_fitting(model, room, states.update)
    if not largest:
        return [
            *lines,
            "",
            f"  does not fit: one sample, or the update, needs more than is left of {gpu_memory:g} GiB; {_advice(model.recipe)}",
        ]
    step = model.step(largest)
    verdict = "fits" if micro <= largest else f"does not fit: set pretrain.micro_batch={_divisor(per_gpu, largest)}"
    return [
        *lines,
        f"  {f'{largest} (largest that fits)':<26}{_gib(step.held, 12)}{_gib(step.peak, 12)}",
        "",
        f"  the recipe's micro-batch of {micro} (global batch {config.global_batch} on {gpus} GPUs) {verdict}",
    ]


def _divisor(per_gpu: int, largest: int) -> int:
    """The largest micro-batch that fits and divides a rank's share."""
    return max(n for n in range(1, largest + 1) if per_gpu % n == 0)


def _advice(recipe: Recipe) -> str:
    return "use --offload or more GPUs" if recipe.model.checkpoint_activations else "try --checkpoint-activations"


def _check() -> list[str]:
    """The same count against what this CPU really saves, at the demo's size."""
    recipe, samples = load_recipe("demo"), 8
    schemas = schemas_of(recipe, None)
    predicted, measured = Model(recipe, schemas).step(samples).held, saved_bytes(recipe, schemas, samples)
    return [
        f"checked here: held by {samples} samples of the demo model, predicted {predicted / 2**20:.1f} MiB, measured on this "
        f"CPU {measured / 2**20:.1f} MiB, error {predicted / measured - 1:+.1%}"
    ]


def _gib(size: float, width: int = 8) -> str:
    return f"{size / GIB:>{width}.2f}"
