"""How DeepSpeed's own checkpoint files reach the disk, and come back."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class Shards:
    """DeepSpeed's way to the disk. It waits for all ranks after writing: so no rank may fail before that."""

    def __init__(self) -> None:
        self.written: list[Path] = []
        self.error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """As DeepSpeed's checkpoint engine has it."""
        try:
            torch.save(state_dict, path)
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:  # torch's zip writer turns one into the other
            self.error = error

    def finish(self) -> list[Path]:
        """The files of this rank. Raises what `save` has met."""
        if self.error:
            raise self.error
        return list(self.written)


def load_shard(path: str, allowed: Sequence[type], map_location: Any = None) -> Any:
    """In place of DeepSpeed's own, which is ``torch.load(weights_only=False)`` and runs whatever a pickle says.

    Args:
        path: of a file that `Shards` wrote.
        allowed: classes besides tensors and plain containers.
        map_location: as of `torch.load`.

    Raises:
        ValueError: a pickle that wants anything else.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused: {str(error).splitlines()[0]}") from None
