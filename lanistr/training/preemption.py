"""Preemption: a signal asks for a checkpoint at the next step boundary, and for an orderly end."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

from lanistr.training import distributed

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Catches SIGTERM, SIGUSR1 and SIGINT while it is entered; a second SIGINT is a KeyboardInterrupt as ever.

    A scheduler may signal one rank only, or several at different steps: `agreed` is what ranks act upon.

    Attributes:
        received: the signal that this rank got.
        acted: some rank got one.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.acted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop: the same answer on all of them."""
        self.acted = distributed.any_rank(self.received is not None, device)
        return self.acted
