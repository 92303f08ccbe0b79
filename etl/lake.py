"""The lake's folders: locks, hidden work folders, and files that appear whole or not at all."""

import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOMS = ("bronze", "silver", "quarantine", "fit", "gold")
TEMPORARY = ".tmp"  # suffix of a file that is being written; a kill leaves it


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def work_folder(lake: Path, name: str) -> Path:
    """Where a build of ``name`` keeps what is not finished."""
    return lake / f".{name}.building"


@contextmanager
def lock(lake: Path, name: str, *, shared: bool = False) -> Iterator[None]:
    """Keep others from building the dataset ``name``; the members of an array job share the lock.

    Raises:
        ValueError: somebody else is building it.
    """
    lake.mkdir(parents=True, exist_ok=True)
    with open(lake / f".{name}.lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another build of {name} into {lake} is running; wait for it") from None
        yield


def publish(made: Path, target: Path) -> None:
    """Move a folder into place; what was there goes first aside, then away."""
    if not made.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which on success is synced to disk and takes its place.

    Two processes that write the same file do not meet: each has its own temporary one.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    os.fchmod(handle, 0o644)
    try:
        yield Path(name)
        os.fsync(handle)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that killed processes left in ``folder`` and below."""
    return sorted(folder.rglob(f".*{TEMPORARY}")) if folder.is_dir() else []
