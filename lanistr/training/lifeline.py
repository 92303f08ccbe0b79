"""Ranks never outlive their launcher, however it ends, and end themselves as they should.

DeepSpeed's runner does not forward SIGTERM, and nobody forwards a kill -9: so each rank watches. Only launchers are
watched (a shell may end while its training goes on). Light: imported before torch.
"""

import atexit
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import psutil

LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed")
GRACE = 120.0  # seconds for a last checkpoint
PR_SET_PDEATHSIG = 1


def follow_launcher() -> None:
    """From now on the end of a launcher is a SIGTERM (which saves, while training), and the end after `GRACE`.

    On Linux the kernel sends it when the parent ends; everywhere a thread looks once a second, at the parent's parents
    too: ``deepspeed`` starts one launcher per node, which starts the ranks.
    """
    watched = _launchers()
    if not watched:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    threading.Thread(target=_watch, args=(watched,), name="lifeline", daemon=True).start()


def end_process(code: int) -> NoReturn:
    """End a process that has joined a process group, without the interpreter's teardown.

    A thread of gloo still drops the tensors of the last collective when the interpreter is already being taken down, and
    then aborts the process ("terminate called without an active exception"; 1 in 8 to 1 in 50 on a busy machine): after
    everything is done and on disk, and a scheduler would take it for a failure. What was registered for the exit runs.

    Args:
        code: exit code.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _launchers() -> "list[psutil.Process]":
    """The launchers above this process, nearest first."""
    import psutil

    found = []
    for process in psutil.Process().parents():
        try:
            if not any(name in word for word in process.cmdline()[:4] for name in LAUNCHERS):
                break
        except psutil.Error:
            break
        found.append(process)
    return found


def _alive(process: "psutil.Process") -> bool:
    """Whether it has not ended, and no other has its number.

    `is_running` knows a process by its start in ticks since boot; `create_time` is on the wall clock, and moves with it.
    """
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _watch(watched: "list[psutil.Process]") -> None:
    while all(_alive(launcher) for launcher in watched):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    rank = os.environ.get("RANK", "0")
    print(
        f"error: rank {rank} is still at it {GRACE:.0f} s after its launcher ended: ended too",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
