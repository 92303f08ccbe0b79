"""What a training step really holds on this CPU, beside what `lanistr.training.memory` counts.

One rank of DeepSpeed takes it in a process of its own, so that its memory is its own, too:
``python -m lanistr.training.measured`` reads what to measure from stdin and writes `Measured` to stdout.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lanistr.batch import Batch, map_leaves
from lanistr.config import Recipe
from lanistr.data.loader import Collator
from lanistr.data.reader import Sample
from lanistr.manifest import ModalitySchema
from lanistr.modalities.base import Modality
from lanistr.model.lanistr import build_model
from lanistr.tasks import Pretrain
from lanistr.training import distributed
from lanistr.training.ds_config import fill_tree
from lanistr.training.engine import Engine, start
from lanistr.training.flops import meta_pretrain
from lanistr.training.lifeline import end_process
from lanistr.training.memory import gradients_dropped, weighted_loss


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank.

    Attributes:
        parameters, gradients, optimizer, buffers: tensors that DeepSpeed holds; see `lanistr.training.memory.States`.
        held: what autograd saves between forward and backward.
        peak: by how much the process grows in a forward and backward pass whose gradients leave at once.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    held: int
    peak: int


def largest_batch(modalities: Mapping[str, Modality[Any, Any]], samples: int) -> Batch:
    """Complete samples of the largest size."""
    contents = {name: modality.example() for name, modality in modalities.items()}
    made = [Sample(key=f"{i:016x}", presence=0, label=-1, contents=contents) for i in range(samples)]
    return Collator(dict(modalities), views=2, seed=0)(made, [1.0] * samples, epoch=0)


def saved_bytes(task: nn.Module, batch: Batch) -> int:
    """Bytes that autograd saves for the backward pass of a micro-batch, by ``saved_tensors_hooks``; each storage once."""
    own = {tensor.untyped_storage()._cdata for tensor in [*task.parameters(), *task.buffers()]}
    map_leaves(batch, Tensor, lambda tensor: own.add(tensor.untyped_storage()._cdata))
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        task(batch)
    return bytes_of(saved.values())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Each storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Of the parameters that the model computes with."""
    return torch.bfloat16 if recipe.pretrain.precision == "bfloat16" else torch.float32


def make_task(recipe: Recipe, schemas: Mapping[str, ModalitySchema]) -> tuple[Pretrain, dict[str, Modality[Any, Any]]]:
    """A recipe's pretraining with fresh weights (nothing is downloaded), and its modalities."""
    modalities = meta_pretrain(recipe, schemas)[1]
    fusion = recipe.model.fusion.model_copy(update={"pretrained": None})
    config = recipe.model.model_copy(update={"fusion": fusion, "attention": "auto", "compile": False})
    model = build_model(config, modalities, seed=0)
    task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, seed=0)
    return task.to(dtype_of(recipe)).train(), modalities


def measure(recipe: Recipe, schemas: Mapping[str, ModalitySchema], zero: Mapping[str, Any], samples: int) -> Measured:
    """Take a step in this process.

    Args:
        recipe: its ``pretrain`` block counts.
        schemas: of the dataset.
        zero: of DeepSpeed's configuration.
        samples: of the micro-batch, complete and of the largest size.
    """
    device = start()
    task, modalities = make_task(recipe, schemas)
    batch = largest_batch(modalities, samples)
    held, peak = saved_bytes(task, batch), peak_bytes(task, batch)
    config = recipe.pretrain.model_copy(update={"global_batch": samples, "micro_batch": samples})
    filled = fill_tree({"zero_optimization": dict(zero)}, "--deepspeed", recipe.name, config, world=1)
    engine = Engine(task, filled, device, config.weight_decay)
    engine.make_moments()
    moving = {"gradients": 0, "buffers": 0}

    def note_buckets(_: Tensor) -> None:  # they live in the backward pass only
        moving["buffers"] = max(moving["buffers"], bytes_of(bucket_tensors(engine)))

    def note_gradients() -> None:
        moving["gradients"] = bytes_of(held_gradients(engine))

    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.register_hook(note_buckets)
    engine.train_step([batch], 0.0, note_gradients)
    parameters, optimizer = bytes_of(engine.module.parameters()), bytes_of(optimizer_tensors(engine))
    distributed.shutdown()
    return Measured(parameters, optimizer=optimizer, held=held, peak=peak, **moving)


def peak_bytes(task: Any, batch: Batch) -> int:
    """By how much the process grows in a forward and backward pass; its second, since some things are made once."""
    with gradients_dropped(task):
        weighted_loss(task, batch).backward()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        before = resident("VmRSS")
        weighted_loss(task, batch).backward()
        return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    return _read_bytes(Path("/proc/self/status"), name)


def free_memory() -> int:
    """Bytes that this machine could still give."""
    return _read_bytes(Path("/proc/meminfo"), "MemAvailable")


def _read_bytes(path: Path, name: str) -> int:
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def held_gradients(engine: Engine) -> list[Tensor]:
    """What this rank holds of the gradient before its update."""
    averaged = getattr(engine.optimizer, "averaged_gradients", {})
    parts = [tensor for group in averaged.values() for tensor in group or []]
    return [*parts, *(p.grad for p in engine.module.parameters() if p.grad is not None)]


def optimizer_tensors(engine: Engine) -> list[Tensor]:
    """AdamW's moments and, from stage 1 on, the masters."""
    moments = [t for state in engine.inner_optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    return [*moments, *getattr(engine.optimizer, "single_partition_of_fp32_groups", [])]


def bucket_tensors(engine: Engine) -> list[Tensor]:
    """The buckets that gradients travel in."""
    buckets = getattr(engine.optimizer, "ipg_buckets", {})
    return [tensor for bucket in buckets.values() for tensor in bucket.buffer]


def measure_apart(
    recipe: Recipe, schemas: Mapping[str, ModalitySchema], zero: Mapping[str, Any], samples: int
) -> Measured:
    """As `measure`, in another process.

    Raises:
        ValueError: it has failed, or was killed (for its memory, say).
    """
    spec = {"recipe": recipe.model_dump(mode="json"), "zero": dict(zero), "samples": samples}
    spec["schemas"] = {name: schema.model_dump() for name, schema in schemas.items()}
    command = [sys.executable, "-m", "lanistr.training.measured"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run(command, input=json.dumps(spec), capture_output=True, text=True, env=environment)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"killed by signal {-done.returncode}"]
        raise ValueError(f"the measured step failed: {said[0]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """One measurement."""
    spec = json.load(sys.stdin)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    schemas = {name: ModalitySchema.model_validate(schema) for name, schema in spec["schemas"].items()}
    found = measure(Recipe.model_validate(spec["recipe"]), schemas, spec["zero"], spec["samples"])
    print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main()
    end_process(0)
