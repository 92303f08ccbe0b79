"""Never stuck: a rank that dies or hangs ends all ranks within a stated time, with one line that says which and where.

Each rank tells a key-value store once a second how far it is, and reads how far the others are. The first that sees
something wrong writes the verdict and prints it; the others read it; all end with exit code 1.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from lanistr.training import distributed

Doing = Literal["waiting for data", "training", "validating", "saving"]
ORDER = ("waiting for data", "training", "validating", "saving")


@dataclass
class Beat:
    """How far a rank is.

    Attributes:
        count: of beats: a rank whose count stands still is dead (or its host is unreachable).
        step: steps done.
        doing: what it is at.
        idle: seconds since either changed: a rank whose count rises and whose work does not hangs.
        failed: the exception that ended it.
    """

    count: int = 0
    step: int = 0
    doing: Doing = "waiting for data"
    idle: float = 0.0
    failed: str | None = None

    @property
    def progress(self) -> tuple[int, int]:
        """Grows as the rank gets on."""
        return self.step, ORDER.index(self.doing)


class Observer:
    """Judges what the ranks say. Its clock is this process's: clocks of hosts are never compared.

    Args:
        ranks: number of them.
        dead_after, hang_after: seconds.
        now: when all ranks were there.
    """

    def __init__(self, ranks: int, dead_after: float, hang_after: float, now: float):
        self.dead_after, self.hang_after = dead_after, hang_after
        self.last = {rank: (Beat(), now) for rank in range(ranks)}
        self.failing: set[int] = set()

    def judge(self, beats: dict[int, Beat], now: float) -> str | None:
        """What is wrong, or None.

        Args:
            beats: of the ranks that could be read.
            now: seconds.
        """
        for rank, beat in beats.items():
            if self.last[rank][0].count != beat.count:
                self.last[rank] = beat, now
        for rank, (beat, seen) in sorted(self.last.items()):
            if beat.failed and rank in self.failing:
                return f"rank {rank} failed after step {beat.step}, {beat.doing}: {beat.failed}"
            if now - seen > self.dead_after:
                return f"rank {rank} is dead: not heard of for {now - seen:.0f} s, last after step {beat.step}, {beat.doing}"
        # All ranks may be about to fail for the same reason, and then say it themselves: one more beat.
        self.failing = {rank for rank, (beat, _) in self.last.items() if beat.failed}
        if all(beat.idle > self.hang_after for beat, _ in self.last.values()):
            return self._hanging()
        return None

    def _hanging(self) -> str:
        least = min(beat.progress for beat, _ in self.last.values())
        behind = [rank for rank, (beat, _) in sorted(self.last.items()) if beat.progress == least]
        beat = self.last[behind[0]][0]
        who = f"rank {', '.join(map(str, behind))}" if len(behind) < len(self.last) or behind == [0] else "every rank"
        return f"{who} hangs after step {beat.step}, {beat.doing}: no progress for {beat.idle:.0f} s"


class Watchdog:
    """Watches while it is entered. Every rank must enter and leave it.

    Args:
        run: run folder; the stacks of hanging threads go to ``incidents/stacks-rank-<r>.txt``.
        hang_after: seconds without progress.
    """

    BEAT = 1.0
    DEAD_AFTER = 20.0
    SUSPECT_AFTER = 5.0  # where this rank has already lost a connection

    def __init__(self, run: Path, hang_after: float):
        self.run = run
        self.own = Beat()
        self.hang_after = hang_after
        self.stop = threading.Event()

    def note(self, step: int, doing: Doing) -> None:
        """Say that this rank gets on."""
        self.own.step, self.own.doing, self.changed = step, doing, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.store = distributed.open_store() if distributed.world_size() > 1 else None
        self.changed = time.monotonic()
        self.beats: dict[int, Beat] = {}
        self.verdict: str | None = None
        dead_after = min(self.DEAD_AFTER, self.hang_after)
        self.observer = Observer(distributed.world_size(), dead_after, self.hang_after, self.changed)
        # Two threads: the one that talks is stuck itself where rank 0, which serves the store, hangs.
        for work in (self._talk, self._judge):
            threading.Thread(target=work, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            distributed.barrier()  # nobody misses those who have left
        elif distributed.is_connection_error(error):
            self.observer.dead_after = self.SUSPECT_AFTER  # a peer is gone: a thread will say which, and end us
            self.stop.wait(self.SUSPECT_AFTER + 5 * self.BEAT)
        self.stop.set()
        if error is not None:
            self.own.failed = f"{type(error).__name__}: {error}".splitlines()[0]
            self._briefly(self._tell)
            time.sleep(4 * self.BEAT if self._serves() else 0)

    def _serves(self) -> bool:
        """Rank 0 takes the store along: so the others get a moment to read it."""
        return self.store is not None and distributed.rank() == 0

    def _talk(self) -> None:
        while not self.stop.wait(self.BEAT):
            self.own.count += 1
            self.own.idle = time.monotonic() - self.changed
            try:
                self._tell()
                self._listen()
            except RuntimeError:  # rank 0 is gone; from now on nobody is heard of
                return

    def _tell(self) -> None:
        if self.store is not None:
            self.store.set(f"beat/{distributed.rank()}", json.dumps(asdict(self.own)))

    def _listen(self) -> None:
        found = {distributed.rank(): Beat(**asdict(self.own))}
        if self.store is not None:
            if self.store.check(["verdict"]):
                self.verdict = self.store.get("verdict").decode().partition(" ")[2]
            ranks = [rank for rank in range(distributed.world_size()) if self.store.check([f"beat/{rank}"])]
            found |= {rank: Beat(**json.loads(self.store.get(f"beat/{rank}"))) for rank in ranks}
        self.beats = found

    def _judge(self) -> None:
        own = distributed.rank()
        while not self.stop.wait(self.BEAT):
            now = time.monotonic()
            alive = {own: Beat(self.observer.last[own][0].count + 1, self.own.step, self.own.doing, now - self.changed)}
            found = self.verdict or self.observer.judge({**self.beats, **alive}, now)
            if found and not self.stop.is_set():
                self._end(found)

    def _end(self, verdict: str) -> None:
        first, store = self.verdict is None, self.store
        if first and store is not None:
            answers: list[str] = []
            signed = f"{distributed.rank()} {verdict}"  # another rank may have come to the same words
            self._briefly(lambda: answers.append(store.compare_set("verdict", "", signed).decode()))
            first = answers in ([], [signed])
        if first:
            line = f"error: {verdict}; all ranks end here; --resume auto goes on from the last checkpoint"
            print(line, file=sys.stderr, flush=True)
        self._dump_stacks()
        time.sleep(3 * self.BEAT if self._serves() else 0)
        os._exit(1)

    def _briefly(self, work: Callable[[], None]) -> None:
        """Do something with the store, which may never answer."""

        def attempt() -> None:
            with contextlib.suppress(RuntimeError):
                work()

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(2 * self.BEAT)

    def _dump_stacks(self) -> None:
        folder = self.run / "incidents"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"stacks-rank-{distributed.rank()}.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
