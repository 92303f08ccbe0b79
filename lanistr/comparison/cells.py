"""Cells of a comparison on disk: answered once, never again.

Files of a comparison: ``identity.json`` (what was compared), ``cells/<method>-<labels>-<seed>.npz`` (the answers), locks.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout


@dataclass(frozen=True)
class Cell:
    """One model that is trained.

    Attributes:
        method: its name.
        labels: how many; None = all.
        seed: of the draw of labels and of the method.
    """

    method: str
    labels: int | None
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.method}-{label_name(self.labels)}-{self.seed}"


@dataclass(frozen=True)
class Answer:
    """What a method said of the test samples.

    Attributes:
        probabilities_NC: float32.
        seconds: of fitting and predicting, by the clock.
    """

    probabilities_NC: np.ndarray
    seconds: float


class CellStore:
    """The answers of one comparison.

    Args:
        folder: of the comparison.
        identity: what a finished cell depends on, as JSON.

    Raises:
        ValueError: the folder holds cells of another comparison.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.cells = folder / "cells"
        self.cells.mkdir(parents=True, exist_ok=True)
        path = folder / "identity.json"
        with FileLock(folder / ".identity.lock"):
            if not path.is_file():
                temporary = path.with_name(".identity.json.tmp")
                temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")
                os.replace(temporary, path)
        stored, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(identity))
        for key, then, here in _differences(stored, now):
            raise ValueError(f"{folder} holds another comparison: {key} was {then!r}, is {here!r}; give another --out")

    def load(self, cell: Cell) -> Answer | None:
        """A finished cell; None = not yet."""
        path = self.cells / f"{cell.name}.npz"
        if not path.is_file():
            return None
        with np.load(path) as stored:
            return Answer(stored["probabilities"], float(stored["seconds"]))

    def save(self, cell: Cell, answer: Answer) -> None:
        """Atomically."""
        path = self.cells / f"{cell.name}.npz"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        probabilities_NC = answer.probabilities_NC.astype(np.float32)
        with open(temporary, "wb") as file:
            np.savez_compressed(file, probabilities=probabilities_NC, seconds=np.float64(answer.seconds))
        os.replace(temporary, path)

    @contextmanager
    def claim(self, cell: Cell) -> Iterator[bool]:
        """Whether this process may answer the cell: not if it is finished or another process is at it."""
        lock = FileLock(self.cells / f".{cell.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield self.load(cell) is None
        finally:
            lock.release()


def label_name(labels: int | None) -> str:
    """As on the command line."""
    return "all" if labels is None else str(labels)


def _differences(then: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two trees differ: dotted key and both values."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        if then != now:
            yield prefix, then, now
        return
    for key in [*then, *(k for k in now if k not in then)]:
        yield from _differences(then.get(key), now.get(key), f"{prefix}.{key}" if prefix else key)
