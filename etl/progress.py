"""Progress of a long phase: what is done, how fast, how long it will take."""

import time

from etl.lake import say

INTERVAL = 2.0  # seconds between lines


class Progress:
    """Prints a line now and then.

    Args:
        what: first word of the line.
        total: samples in all.
        tasks: tasks in all.
    """

    def __init__(self, what: str, total: int, tasks: int):
        self.what, self.total, self.tasks = what, total, tasks
        self.done = self.reused = self.finished = 0
        self.start = self.last = time.monotonic()

    def add(self, n: int, reused: bool) -> None:
        """A task is finished; ``reused``: it had been finished before."""
        self.done += n
        self.reused += n if reused else 0
        self.finished += 1
        now = time.monotonic()
        if now - self.last >= INTERVAL or self.finished == self.tasks:
            self.last = now
            say(self._line(now - self.start))

    def _line(self, seconds: float) -> str:
        made = self.done - self.reused
        rate = made / seconds if seconds > 0 else 0.0
        parts = [f"{self.what}: {self.finished:,} of {self.tasks:,} tasks", f"{self.done:,} of {self.total:,} samples"]
        if self.reused:
            parts.append(f"{self.reused:,} finished before")
        if made:
            parts.append(f"{rate:,.0f} samples/s")
        if made and self.done < self.total:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
