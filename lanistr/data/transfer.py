"""A batch as one buffer: one hand-over between processes, one pinned allocation, one copy to the device.

A batch has some fifty small tensors; shared one by one, each costs a file descriptor and a copy of its own.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from lanistr.batch import map_leaves

T = TypeVar("T")
ALIGNMENT = 64


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the buffer."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Parcel(Generic[T]):
    """A tree whose tensors lie in one buffer.

    Attributes:
        buffer: uint8.
        tree: the packed tree with a `Slot` for each tensor.
    """

    buffer: Tensor
    tree: Any

    def pin_memory(self) -> "Parcel[T]":
        """With the buffer in page-locked memory (called by torch's loader)."""
        return Parcel(self.buffer.pin_memory(), self.tree)

    def unpack(self, device: torch.device | str = "cpu") -> T:
        """The tree; its tensors are views of one copy of the buffer on the device."""
        buffer = self.buffer.to(device, non_blocking=True)

        def view(slot: Slot) -> Tensor:
            size = slot.dtype.itemsize
            for length in slot.shape:
                size *= length
            return buffer[slot.offset : slot.offset + size].view(slot.dtype).view(slot.shape)

        return cast(T, map_leaves(self.tree, Slot, view))


def pack(tree: T) -> Parcel[T]:
    """Copy every tensor of the tree (on the CPU) into one buffer."""
    tensors: list[tuple[int, Tensor]] = []
    end = 0

    def place(tensor: Tensor) -> Slot:
        nonlocal end
        slot = Slot(end, tuple(tensor.shape), tensor.dtype)
        tensors.append((end, tensor))
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return slot

    packed = map_leaves(tree, Tensor, place)
    buffer = torch.empty(end, dtype=torch.uint8)
    for offset, tensor in tensors:
        buffer[offset : offset + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    return Parcel(buffer, packed)
