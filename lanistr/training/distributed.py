"""The only importer of torch.distributed: what the toolkit needs of it, in terms of plain Python values."""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from lanistr.ops.ghost_norm import GhostBatchNorm


def world_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as a launcher left them; a lone process is rank 0 of 1."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world, local = (int(os.environ.get(n, d)) for n, d in zip(names, ("0", "1", "0"), strict=True))
    return rank, world, local


def complete_environment() -> None:
    """Fill what a process that no launcher started lacks, so that it forms a world of one."""
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def rendezvous_deadline(seconds: float = 300.0) -> Iterator[None]:
    """End this process with one line where the other ranks do not come: one may have ended before it could say so."""

    def end() -> None:
        own, world, _ = world_from_environment()
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        line = f"error: rank {own} waited {seconds:.0f} s at {where} for all {world} ranks to join: one is missing"
        print(line, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_joined() -> bool:
    """Whether this process is in a group.

    A caller that trains more than once joins first, and leaves when it is done: DeepSpeed keeps groups of its own, which
    a second group in one process would not fit.
    """
    return dist.is_initialized()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sum over ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def all_reduce_max(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise maximum over ranks, in float64."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set on any rank: the same answer on all of them."""
    return all_reduce_sum([float(flag)], device)[0] > 0


def open_store() -> Any:
    """A key-value store of all ranks beside the collectives, served by rank 0. Every rank must call it."""
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=10)
    if rank() == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        gather_objects(store.port)
        return store
    port = gather_objects(None)[0]
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def first_disagreement(tensors: Mapping[str, Tensor]) -> tuple[str, list[int]] | None:
    """The first tensor whose bits differ between ranks, and the ranks that differ from the majority; None = all agree.

    Compares a sum over the bits of each tensor: two all-reduces of one number per tensor.

    Args:
        tensors: on one device; the same names on every rank.
    """
    if world_size() == 1 or not tensors:
        return None
    sums = torch.stack([_bit_sum(tensor) for tensor in tensors.values()])
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    differ = (low != high).nonzero()
    if not len(differ):
        return None
    index = int(differ[0])
    found = gather_objects(int(sums[index]))
    common = max(found, key=found.count)
    return list(tensors)[index], [rank for rank, value in enumerate(found) if value != common]


def _bit_sum(tensor: Tensor) -> Tensor:
    """An exact int64 checksum (it wraps), whatever the order of the sum."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(bits).sum(dtype=torch.int64)


def merge_batch_norm(module: nn.Module) -> None:
    """Average running statistics over ranks, weighted by the rows each rank has seen since the last merge.

    DeepSpeed alone would keep rank 0's. A norm that no rank has updated stays as it is.
    """
    for norm in module.modules():
        if not isinstance(norm, GhostBatchNorm):
            continue
        rows = norm.rows_seen.double()
        features = norm.running_mean.numel()
        mine = torch.cat([norm.running_mean.double() * rows, norm.running_var.double() * rows, rows[None]])
        if dist.is_initialized():
            dist.all_reduce(mine)
        if mine[-1] > 0:
            norm.running_mean.copy_(mine[:features] / mine[-1])
            norm.running_var.copy_(mine[features:-1] / mine[-1])
        norm.rows_seen.zero_()
