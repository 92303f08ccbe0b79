"""The only importer of deepspeed: the recipe and a ZeRO configuration become an engine.

DeepSpeed drops ``"auto"`` silently and clips at 1.0 by default: every such key is filled here from the recipe, and one
that contradicts the recipe is an error.
"""

import json
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lanistr.batch import Batch, to_device
from lanistr.config import OptimizerConfig
from lanistr.training import distributed


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks.

    Attributes:
        terms: mean of each loss term; None where nothing was predicted.
        loss: their weighted sum (paper eq. 3).
        grad_norm: before clipping; None where DeepSpeed does not report it (stage 0, float32).
    """

    terms: dict[str, float | None]
    loss: float
    grad_norm: float | None


def start(threads: int | None = None) -> torch.device:
    """Join the process group; returns this rank's device.

    Args:
        threads: of torch on a CPU; None = ``OMP_NUM_THREADS``, else an equal share of the cores.
    """
    distributed.complete_environment()
    _, _, local_rank = distributed.world_from_environment()
    deepspeed = _import_deepspeed()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        if threads or "OMP_NUM_THREADS" not in os.environ:
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
            torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_world))
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return device


def _import_deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")
    warnings.filterwarnings("ignore", message=r".*(_all_gather_base|_reduce_scatter_base).*")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Serves inference only, and would be compiled at the first start; a kill meanwhile blocks every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def fill_config(path: Path, recipe: str, config: OptimizerConfig, world: int, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration: the JSON, with every absent or ``"auto"`` key filled from the recipe.

    Args:
        path: the JSON.
        recipe: its name, for messages.
        config: batch, clipping, precision, optimizer.
        world: number of ranks.
        on_gpu: decides between fused kernels and torch's AdamW.

    Raises:
        ValueError: unreadable JSON; a value that contradicts the recipe; bfloat16 at stage 0.
    """
    try:
        merged: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; ds_configs/ has zero1.json, zero2.json, zero2_offload.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    per_rank = config.global_batch // world
    micro = config.micro_batch or per_rank
    offload = "offload_optimizer" in merged.get("zero_optimization", {})
    adam = {
        "lr": config.lr,
        "betas": list(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if not on_gpu and not offload:
        adam["torch_adam"] = True  # the fused CPU kernel would be compiled at the first start
    wanted = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": max(1, per_rank // micro),
        "gradient_clipping": config.clip,
        "bf16.enabled": config.precision == "bfloat16",
        "optimizer.type": "AdamW",
        "steps_per_print": 1 << 30,
        **{f"optimizer.params.{key}": value for key, value in adam.items()},
    }
    for key, value in wanted.items():
        _fill(merged, key, value, path, recipe)
    stage = merged.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if stage == 0 and config.precision == "bfloat16":
        raise ValueError(f"{path}: stage 0 with precision bfloat16 (recipe {recipe}) trains wrong; use stage 1 or 2")
    if stage not in (0, 1, 2):
        raise ValueError(f"{path}: ZeRO stage {stage}; allowed are 0, 1, 2")
    return merged


def _fill(tree: dict[str, Any], key: str, value: Any, path: Path, recipe: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    if tree.get(last, "auto") == "auto":
        tree[last] = value
    elif tree[last] != value:
        raise ValueError(f'{path}: {key} = {tree[last]!r} contradicts recipe {recipe} ({value!r}); write "auto"')


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; biases, norms, embeddings and tokens do not."""
    no_decay = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    trainable = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    plain = [
        p
        for n, p in trainable
        if p.ndim < 2 or id(p) in no_decay or n.endswith(("positions", "cls", "embeddings", "cls_token"))
    ]
    plain_ids = {id(p) for p in plain}
    decayed = [p for _, p in trainable if id(p) not in plain_ids]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Task(Protocol):
    """What the engine needs of a task; see `lanistr.tasks`."""

    weights: dict[str, float]


class Engine:
    """A task under DeepSpeed.

    Args:
        task: `lanistr.tasks`; its ``weights`` are the lambdas.
        config: filled by `fill_config`.
        device: of this rank.
        weight_decay: of the decayed parameters.
    """

    def __init__(self, task: "Task", config: dict[str, Any], device: torch.device, weight_decay: float):
        deepspeed = _import_deepspeed()
        self.task, self.config, self.device = task, config, device
        self._engine, *_ = deepspeed.initialize(
            model=task, model_parameters=parameter_groups(cast(nn.Module, task), weight_decay), config=config
        )
        self.weights = task.weights

    @property
    def module(self) -> Any:
        """The task."""
        return self._engine.module

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step over this rank's micro-batches (contract 4).

        The counts of all micro-batches on all ranks are known before the first backward, so that ranks, micro-batches
        and accumulation only divide the work, never change the gradient.
        """
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        names = list(self.weights)
        own = [sum(batch.counts.get(name, 0.0) for batch in micro_batches) for name in names]
        counts = dict(zip(names, distributed.all_reduce_sum(own, self.device), strict=True))
        scale = distributed.world_size() * engine.gradient_accumulation_steps()
        sums = dict.fromkeys(names, torch.zeros((), device=self.device))
        for batch in micro_batches:
            totals: dict[str, Tensor] = engine(to_device(batch, self.device))
            loss = torch.stack(
                [self.weights[name] * total / max(counts[name], 1) for name, total in totals.items()]
            ).sum()
            engine.backward(scale * loss)
            engine.step()
            for name, total in totals.items():
                sums[name] = sums[name] + total.detach()
        return self._result(sums, counts)

    def _result(self, sums: dict[str, Tensor], counts: dict[str, float]) -> StepResult:
        stacked = torch.stack(list(sums.values())).tolist()
        reduced = distributed.all_reduce_sum(stacked, self.device)
        terms = {
            name: total / counts[name] if counts[name] else None for name, total in zip(sums, reduced, strict=True)
        }
        loss = sum(self.weights[name] * term for name, term in terms.items() if term is not None)
        norm = self._engine.get_global_grad_norm()
        return StepResult(terms, loss, None if norm is None else float(norm))

    def full_weights(self) -> dict[str, Tensor]:
        """float32 copies of all parameters and persistent buffers, on the CPU. Every rank must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights: dict[str, Tensor] = {}
        masters = self.config["bf16"]["enabled"]
        for name, parameter in self.module.named_parameters():
            full = safe_get_full_fp32_param(parameter) if masters and parameter.requires_grad else parameter
            weights[name] = (parameter if full is None else full).detach().float().cpu().clone()
        return {**weights, **persistent_buffers(self.module)}

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's files of all ranks into ``folder``."""
        self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises ValueError where DeepSpeed refuses."""
        path, _ = self._engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed could not load this checkpoint")


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """CPU copies of the buffers that belong to a state dict."""
    kept = module.state_dict().keys()
    return {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers() if name in kept}
