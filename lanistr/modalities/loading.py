"""Weights from elsewhere: what was loaded, what is new, what was left out; matching by name where a schema changed."""

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What a load did, by tensor name.

    Attributes:
        loaded: taken from the source.
        new: the model has it, the source does not: freshly initialised.
        left_out: the source has it, the model does not.
        notes: what was matched within a tensor, one line each.
    """

    loaded: list[str]
    new: list[str]
    left_out: list[str]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line, and one per note."""
        head = f"{len(self.loaded)} tensors loaded, {len(self.new)} new, {len(self.left_out)} left out"
        parts = [
            f"{title}: {', '.join(_roots(names))}"
            for title, names in (("new", self.new), ("left out", self.left_out))
            if names
        ]
        first = f"{head} ({'; '.join(parts)})" if parts else head
        return "\n  ".join([first, *self.notes])


def _roots(names: Sequence[str]) -> list[str]:
    """The modules that the tensors belong to, at most four levels deep, at most six of them."""
    roots = list(dict.fromkeys(".".join(name.split(".")[:-1][:4]) or name for name in names))
    return [*roots[:6], f"{len(roots) - 6} more"] if len(roots) > 6 else roots


def load_pretrained(cls: Any, source: str, where: str, **options: Any) -> Any:
    """``cls.from_pretrained`` with a logged `LoadReport`.

    Args:
        cls: a model class of transformers.
        source: hub name or path.
        where: the recipe's key, for messages.
        options: for ``from_pretrained``.

    Raises:
        ValueError: no such weights; a tensor of another shape; weights of another architecture.
    """
    try:
        model, info = cls.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} {source!r}: {str(error).splitlines()[0]}") from None
    if info["mismatched_keys"]:
        raise ValueError(f"{where} {source!r}: other shapes: {sorted(map(str, info['mismatched_keys']))[0]}")
    new = sorted(info["missing_keys"])
    loaded = [name for name in model.state_dict() if name not in new]
    if len(new) > len(loaded):
        raise ValueError(f"{where} {source!r}: not weights of a {cls.__name__}: {len(new)} tensors are missing there")
    report = LoadReport(loaded, new, sorted(info["unexpected_keys"]))
    logger.info("%s %s: %s", where, source, report)
    return model


def published_sizes(cls: Any, source: str, where: str, names: dict[str, str]) -> dict[str, Any]:
    """What a recipe's block must say to build the architecture of published weights without them.

    Args:
        cls: a configuration class of transformers.
        source: hub name or path.
        where: the recipe's key, for messages.
        names: the block's key -> the configuration's.

    Raises:
        ValueError: no such model.
    """
    try:
        config = cls.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} {source!r}: {str(error).splitlines()[0]}") from None
    return {key: getattr(config, theirs) for key, theirs in names.items()}


def match_rows(
    own: Tensor, stored: Tensor, dim: int, own_keys: Sequence[Hashable], old_keys: Sequence[Hashable]
) -> Tensor:
    """``own`` with every slice whose key the stored tensor also has replaced by that one.

    Raises:
        ValueError: shapes that differ elsewhere than along ``dim``.
    """
    rest = [[*t.shape[:dim], *t.shape[dim + 1 :]] for t in (own, stored)]
    if rest[0] != rest[1]:
        raise ValueError(f"shapes {tuple(stored.shape)} and {tuple(own.shape)}: same sizes in the recipe?")
    place = {key: i for i, key in enumerate(old_keys)}
    both = [(i, place[key]) for i, key in enumerate(own_keys) if key in place]
    if not both:
        return own.clone()
    to, source = torch.tensor(both).unbind(1)
    return own.clone().index_copy(dim, to, stored.index_select(dim, source).to(own.dtype))
