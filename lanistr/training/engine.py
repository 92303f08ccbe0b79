"""The only importer of deepspeed: a task and a filled configuration become an engine."""

import logging
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lanistr.batch import Batch, to_device
from lanistr.training import distributed
from lanistr.training.parameters import parameter_groups
from lanistr.training.shards import Shards, load_shard

MOMENTS = ("exp_avg", "exp_avg_sq")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks.

    Attributes:
        terms: mean of each loss term; None where nothing was predicted.
        loss: their weighted sum (paper eq. 3).
        grad_norm: before clipping; infinite or NaN where the step was skipped.
        skipped: the loss or the gradient was not finite, so that no rank has changed its parameters.
    """

    terms: dict[str, float | None]
    loss: float
    grad_norm: float | None
    skipped: bool = False


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
    with distributed.rendezvous_deadline():
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

    deepspeed_log = logging.getLogger("DeepSpeed")
    deepspeed_log.setLevel(logging.WARNING)
    # Skipped steps are ours to report, with their samples.
    deepspeed_log.addFilter(lambda record: "OVERFLOW!" not in record.getMessage())
    # Serves inference only, and would be compiled at the first start; a kill meanwhile blocks every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _build_cpu_adam() -> None:
    """Compile DeepSpeed's AdamW for the CPU once per machine, by one rank; the others wait, and all are told.

    A build that was killed leaves a lock that makes every later one wait for ever: one that is older than any build
    takes is removed.
    """
    import deepspeed.ops.op_builder as builders
    from torch.utils import cpp_extension

    _, _, local_rank = distributed.world_from_environment()
    if local_rank == 0:
        folder = Path(cpp_extension._get_build_directory("cpu_adam", False))
        lock = folder / "lock"
        if lock.exists() and time.time() - lock.stat().st_mtime > 1200:
            logger.warning("%s is left over from a build that was killed: removed", lock)
            lock.unlink()
        if not list(folder.glob("*.so")):
            logger.warning("compiling DeepSpeed's cpu_adam into %s: once, a minute or two; do not kill it", folder)
        cast(Any, builders).CPUAdamBuilder().load(verbose=False)
    distributed.barrier()


class Task(Protocol):
    """What the engine needs of a task; see `lanistr.tasks`."""

    weights: dict[str, float]


class Engine:
    """A task under DeepSpeed.

    Args:
        task: `lanistr.tasks`; its ``weights`` are the lambdas.
        config: filled by `fill_config`.
        device: of this rank.
        weight_decay, lr_shares: see `parameter_groups`.
    """

    def __init__(
        self,
        task: "Task",
        config: dict[str, Any],
        device: torch.device,
        weight_decay: float,
        lr_shares: Mapping[str, float] | None = None,
    ):
        deepspeed = _import_deepspeed()
        self.task, self.config, self.device = task, config, device
        if self.layout["offload"]:
            _build_cpu_adam()
        groups = parameter_groups(cast(nn.Module, task), weight_decay, lr_shares)
        self._engine, *_ = deepspeed.initialize(model=task, model_parameters=groups, config=config)
        self.weights = task.weights
        self._norm: float | None = None
        self._engine._copy_recovery_script = lambda save_path: None  # our weights are whole without a script
        if self.stage == 0:
            self._engine._config.gradient_clipping = 0.0  # ours to do: DeepSpeed's fails where a step has no gradient
        self._engine.monitor.enabled = False  # DeepSpeed's own figures are of one rank, and its loss is a scaled one
        self._describe()

    def track(self, step: int, figures: Mapping[str, float]) -> None:
        """Send figures to the trackers that the configuration enables (rank 0)."""
        self._engine.monitor.write_events([(name, value, step) for name, value in figures.items()])

    def _describe(self) -> None:
        """One line in the log that says what runs where."""
        hosts = distributed.gather_objects(socket.gethostname())
        nodes = ", ".join(f"{hosts.count(host)} on {host}" for host in dict.fromkeys(hosts))
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        threads = f" (threads: {torch.get_num_threads()})" if self.device.type == "cpu" else ""
        adam = type(self.inner_optimizer).__name__ + ", fused" * bool(self.inner_optimizer.defaults.get("fused"))
        attention = {m.backend for m in self.module.modules() if hasattr(m, "backend")}
        batch, micro = (self.config[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu"))
        logger.info(
            "%d ranks (%s) on %s%s  ZeRO-%d%s  %s  %s  attention %s  batch %d = %d ranks x %d x %d  %.1f M parameters",
            len(hosts), nodes, device, threads, self.stage, " with CPU offload" if self.layout["offload"] else "",
            self.layout["precision"], adam, ", ".join(sorted(attention)),
            batch, len(hosts), micro, self.config["gradient_accumulation_steps"],
            sum(p.numel() for p in self.module.parameters()) / 1e6,
        )  # fmt: skip

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return self.config["zero_optimization"]["stage"]

    @property
    def module(self) -> Any:
        """The task."""
        return self._engine.module

    def train_step(
        self, micro_batches: Sequence[Batch], lr: float, before_update: Callable[[], None] | None = None
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches (contract 4).

        The counts of all micro-batches on all ranks are known before the first backward, so that ranks, micro-batches
        and accumulation only divide the work, never change the gradient.

        Args:
            micro_batches: of this rank.
            lr: of this update.
            before_update: called when the gradient is complete, before it is clipped and applied.
        """
        engine = self._engine
        for group in engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_share", 1.0)
        names = list(self.weights)
        skipped = False
        own = [sum(batch.counts.get(name, 0.0) for batch in micro_batches) for name in names]
        counts = dict(zip(names, distributed.all_reduce_sum(own, self.device), strict=True))
        scale = distributed.world_size() * engine.gradient_accumulation_steps()
        sums = dict.fromkeys(names, torch.zeros((), device=self.device))
        for batch in micro_batches:
            totals: dict[str, Tensor] = engine(to_device(batch, self.device))
            loss = torch.stack(
                [self.weights[name] * total / max(counts[name], 1) for name, total in totals.items()]
            ).sum()
            # Exactly 1, or NaN: a loss that is not finite has no finite gradient either, so that the step is skipped.
            loss = loss * (1 + 0 * loss.detach())
            engine.backward(scale * loss)
            if engine.is_gradient_accumulation_boundary():
                if before_update:
                    before_update()
                skipped = self.stage == 0 and self._guard_stage_0()
            engine.step()
            for name, total in totals.items():
                sums[name] = sums[name] + total.detach()
        return self._result(sums, counts, skipped or bool(getattr(engine.optimizer, "overflow", False)))

    def _guard_stage_0(self) -> bool:
        """What ZeRO does and stage 0 does not: note the norm, and drop a gradient that is not finite; and clip."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._norm = float(norm)
        if math.isfinite(self._norm):
            nn.utils.clip_grads_with_norm_(self.module.parameters(), self.config["gradient_clipping"], norm)
            return False
        for parameter in self.module.parameters():
            parameter.grad = None
        return True

    def _result(self, sums: dict[str, Tensor], counts: dict[str, float], skipped: bool) -> StepResult:
        stacked = torch.stack(list(sums.values())).tolist()
        reduced = distributed.all_reduce_sum(stacked, self.device)
        terms = {
            name: total / counts[name] if counts[name] else None for name, total in zip(sums, reduced, strict=True)
        }
        loss = sum(self.weights[name] * term for name, term in terms.items() if term is not None)
        norm = self._norm if self.stage == 0 else self._engine.get_global_grad_norm()
        return StepResult(terms, loss, None if norm is None else float(norm), skipped)

    @property
    def layout(self) -> dict[str, Any]:
        """What decides how DeepSpeed's own files are cut."""
        zero = self.config["zero_optimization"]
        return {
            "ranks": distributed.world_size(),
            "stage": self.stage,
            "offload": "offload_optimizer" in zero,
            "precision": "bfloat16" if self.config["bf16"]["enabled"] else "float32",
        }

    @property
    def updates(self) -> int:
        """Updates that AdamW has made: skipped steps do not count."""
        steps = [state["step"] for state in self.inner_optimizer.state.values() if "step" in state]
        return int(steps[0]) if steps else 0

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's (stage 0: AdamW)."""
        return self._engine.optimizer

    @property
    def inner_optimizer(self) -> Any:
        """AdamW."""
        return self.optimizer if self.stage == 0 else self.optimizer.optimizer

    def full_weights(self) -> dict[str, Tensor]:
        """float32 copies of all parameters and persistent buffers, on the CPU of rank 0; elsewhere empty.

        Every rank must call it.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        weights: dict[str, Tensor] = {}
        masters = self.config["bf16"]["enabled"]
        for name, parameter in self.module.named_parameters():
            full = safe_get_full_fp32_param(parameter) if masters and parameter.requires_grad else parameter
            if distributed.rank() == 0:
                weights[name] = (parameter if full is None else full).detach().float().cpu().clone()
        return {**weights, **self.buffers()} if distributed.rank() == 0 else {}

    def full_moments(self) -> dict[str, Tensor]:
        """AdamW's moments as ``<parameter>/exp_avg`` and ``/exp_avg_sq``, on the CPU of rank 0; elsewhere empty.

        Empty before the first update. Every rank must call it.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        moments: dict[str, Tensor] = {}
        if not self.updates:
            return moments
        self._link_moments()
        for name, parameter in self._trainable():
            for key in MOMENTS:
                if self.stage == 0:
                    full = self.optimizer.state[parameter][key]
                else:
                    full = cast(Tensor, safe_get_full_optimizer_state(parameter, key))
                if distributed.rank() == 0:
                    moments[f"{name}/{key}"] = full.detach().float().cpu().clone()
        return moments

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def buffers(self) -> dict[str, Tensor]:
        """CPU copies of this rank's persistent buffers."""
        return persistent_buffers(self.module)

    @torch.no_grad()
    def set_buffers(self, values: dict[str, Tensor]) -> None:
        """Put them back."""
        targets = dict(self.module.named_buffers())
        for name, value in values.items():
            targets[name].copy_(value)

    def save(self, folder: Path) -> Shards:
        """Write DeepSpeed's files into ``folder/engine``; a rank that cannot write goes on, and tells at the end."""
        shards = Shards()
        self._engine.checkpoint_engine.save = shards.save
        self._engine.save_checkpoint(str(folder), tag="engine", save_latest=False)
        return shards

    def load(self, folder: Path) -> None:
        """Read what `save` wrote. Raises ValueError where DeepSpeed refuses, or where a pickle wants to run something."""
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        allowed = (LossScaler, ZeroStageEnum, fragment_address)
        self._engine.checkpoint_engine.load = partial(load_shard, allowed=allowed)
        path, _ = self._engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed could not load this checkpoint")

    @torch.no_grad()
    def restore(self, weights: Path, moments: Path, updates: int) -> None:
        """Take whole states, however they were sharded when they were saved.

        Args:
            weights: of `full_weights`.
            moments: of `full_moments`.
            updates: of AdamW.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        with safe_open(weights, "pt") as stored:
            for name, parameter in self.module.named_parameters():
                value = stored.get_tensor(name)
                parameter.copy_(value)
                if self.stage > 0 and parameter.requires_grad:
                    safe_set_full_fp32_param(parameter, value)
            self.set_buffers({name: stored.get_tensor(name) for name in self.buffers()})
        if not updates:
            return
        self.make_moments()
        with safe_open(moments, "pt") as stored:
            for name, parameter in self._trainable():
                for key in MOMENTS:
                    value = stored.get_tensor(f"{name}/{key}")
                    if self.stage == 0:
                        self.optimizer.state[parameter][key].copy_(value)
                    else:
                        safe_set_full_optimizer_state(parameter, value, key)
        for state in self.inner_optimizer.state.values():
            state["step"] = torch.full_like(state["step"], updates) if torch.is_tensor(state["step"]) else updates

    def make_moments(self) -> None:
        """AdamW creates its state in its first update: make one, of gradient and rate zero."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        if self.stage == 0:
            for _, parameter in self._trainable():
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return
        for i, partition in enumerate(self.optimizer.single_partition_of_fp32_groups):
            partition.grad = torch.zeros_like(partition)
            self.optimizer._optimizer_step(i)
            if not self.optimizer.cpu_offload:
                partition.grad = None
        self._link_moments()

    def _link_moments(self) -> None:
        """DeepSpeed 0.19 links parameters to their moments after the update of the first group: the others miss theirs."""
        if self.stage > 0:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """CPU copies of the buffers that belong to a state dict."""
    kept = module.state_dict().keys()
    return {name: buffer.detach().cpu().clone() for name, buffer in module.named_buffers() if name in kept}
