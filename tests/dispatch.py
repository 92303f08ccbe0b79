"""What the dispatcher sees: operator counts, and a guard against questions to the device."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result the host must wait for, or whose output shape depends on values.
QUESTIONS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "unique_consecutive",
    "equal",
    "is_nonzero",
    "bincount",
)


class CountOperators(TorchDispatchMode):
    """Counts every operator, forward and backward, that runs inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()


class NoQuestions(TorchDispatchMode):
    """Raises where an operator would make the host wait for the device (boolean indexing becomes ``nonzero``)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name in QUESTIONS or name.split(".")[0] in QUESTIONS:
            raise AssertionError(f"{func} asks the device a question")
        if name.startswith("repeat_interleave") and (kwargs or {}).get("output_size") is None:
            raise AssertionError("repeat_interleave without output_size asks the device a question")
        if name.startswith("index.") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("boolean indexing asks the device a question")
        return func(*args, **(kwargs or {}))
