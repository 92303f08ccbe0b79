"""``python -m lanistr plan``: what a GPU must hold under a recipe, and the largest micro-batch that fits."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lanistr.batch import to_device
from lanistr.config import Recipe
from lanistr.describe import schemas_of
from lanistr.manifest import Manifest, ModalitySchema
from lanistr.modalities.base import Modality
from lanistr.tasks import Pretrain
from lanistr.training.flops import meta_pretrain
from lanistr.training.measured import dtype_of, free_memory, largest_batch, measure_apart
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
        return count_step(task, to_device(largest_batch(modalities, samples), "meta"))


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


def read_zero(path: Path | None, stage: int) -> dict[str, Any]:
    """``zero_optimization`` of a configuration, or that of the shipped files for a stage."""
    if path is None:
        return {"stage": stage, **ZERO}
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}; give a file like ds_configs/zero2.json") from None


def plan(
    recipe: Recipe,
    zero: Mapping[str, Any],
    gpus: int,
    gpu_memory: float,
    manifest: Manifest | None = None,
    measure: int = 0,
) -> str:
    """The plan as a table.

    Args:
        recipe: its ``pretrain`` block counts.
        zero: of DeepSpeed's configuration.
        gpus: ranks.
        gpu_memory: GiB of each.
        manifest: a dataset's schema; None = the paper's.
        measure: samples of a real step on this CPU, to check the counts by; 0 = none.

    Raises:
        ValueError: ``gpus`` or ``gpu_memory`` below 1; ``measure`` below 0; more GPUs than samples in a step; bfloat16 at stage 0.
    """
    if gpus < 1 or gpu_memory <= 0:
        raise ValueError(f"--gpus {gpus} --gpu-memory {gpu_memory}: give at least one GPU, and its memory in GiB")
    if gpus > recipe.pretrain.global_batch:
        raise ValueError(
            f"--gpus {gpus}: a step has only {recipe.pretrain.global_batch} samples (pretrain.global_batch)"
        )
    if measure < 0:
        raise ValueError(f"--measure {measure}: give a number of samples, or 0 for no measurement")
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
            *(["", *measured_table(model, zero, measure)] if measure else []),
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


def measured_table(model: Model, zero: Mapping[str, Any], samples: int) -> list[str]:
    """The same counts for one rank against what a real step of it holds on this CPU."""
    zero = {name: value for name, value in zero.items() if name != "offload_optimizer"}  # it is all one memory here
    recipe, step = model.recipe, model.step(samples)
    states = count_states(*model.parameters, zero, 1, recipe.pretrain.precision)
    needed = states.on_device + max(step.peak, states.update) + 4 * sum(model.parameters)  # float32, while it is made
    free = free_memory()
    if needed > 0.9 * free:
        return [f"not measured: a step of one rank here needs some {needed / GIB:.1f} GiB, {free / GIB:.1f} are free"]
    try:
        found = measure_apart(recipe, model.schemas, zero, samples)
    except ValueError as error:
        return [f"not measured: {error}"]
    rows = [
        ("parameters", states.parameters, found.parameters),
        ("gradients", states.gradients, found.gradients),
        ("optimizer", states.optimizer, found.optimizer),
        ("buckets", states.buffers, found.buffers),
        ("held between forward and backward", step.held, found.held),
        ("the process at the peak of both", step.peak, found.peak),
    ]
    return [
        f"checked: a real step on this CPU, 1 rank, ZeRO-{zero.get('stage', 0)}, micro-batch {samples}",
        f"  {'MiB':<36}{'predicted':>12}{'measured':>12}{'error':>9}",
        *(
            f"  {name:<36}{expected / 2**20:>12,.1f}{real / 2**20:>12,.1f}{_error(expected, real):>9}"
            for name, expected, real in rows
        ),
    ]


def _error(predicted: int, measured: int) -> str:
    return f"{predicted / measured - 1:+.1%}" if measured else "-"


def _gib(size: float, width: int = 8) -> str:
    return f"{size / GIB:>{width}.2f}"
