"""Where the files of a dataset are: a local folder, or any fsspec address behind a cache on disk.

A remote file is downloaded whole, once per machine: under a file lock that all ranks and workers share, with retries,
checked against the manifest's sha256, renamed into place atomically. The least recently used files go first. Where the
disk is full of something else, the samples are read from the remote piece by piece: slower, never wrong.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from filelock import FileLock

logger = logging.getLogger(__name__)
CHUNK = 1 << 20
PIECE = 1 << 15  # bytes asked for at least, where a remote file is not cached
T = TypeVar("T")


class Blob(Protocol):
    """An open file that can be read at any position."""

    @property
    def size(self) -> int: ...  # noqa: D102

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes: fewer only at the end of the file. Raises OSError."""
        ...

    def close(self) -> None: ...  # noqa: D102


class Store(Protocol):
    """The files of one dataset, by their name in the manifest."""

    def folder(self) -> Path:
        """A local folder with ``manifest.json``. Raises ValueError where it cannot be had."""
        ...

    def exists(self, name: str) -> bool:
        """Whether the file is known to be there; True for remote files, which are not asked for in advance."""
        ...

    def open(self, name: str, size: int | None, sha256: str) -> Blob:
        """Open a file. Raises OSError where it cannot be had."""
        ...

    def fetch_ahead(self, files: Sequence[tuple[str, int, str]]) -> None:
        """Begin to fetch files (name, size, sha256) that will be opened, and return at once."""
        ...


class LocalBlob:
    """A file, read with ``pread``: no page of it ever counts as our memory, and a file that is cut short while it is
    open gives short reads (a map of it would kill the process).
    """  # noqa: D205

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """As `Blob.read`."""
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


@dataclass(frozen=True)
class LocalStore:
    """A folder."""

    root: Path

    def folder(self) -> Path:
        """The folder."""
        return self.root

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return (self.root / name).is_file()

    def open(self, name: str, size: int | None, sha256: str) -> Blob:
        """Open a file; its checksum is not verified (each sample has its own)."""
        return LocalBlob(self.root / name)

    def fetch_ahead(self, files: Sequence[tuple[str, int, str]]) -> None:
        """They are here."""


@dataclass
class RemoteBlob:
    """A remote file, read piece by piece: the members of a sample are neighbours and mostly come in one."""

    store: "CachedStore"
    name: str
    _piece: tuple[int, bytes] = (0, b"")

    @property
    def size(self) -> int:
        """Bytes."""
        return self.store.retry(self.name, lambda: int(self.store.fs.size(self.store.address(self.name))))

    def read(self, offset: int, size: int) -> bytes:
        """As `Blob.read`."""
        begin, data = self._piece
        if not begin <= offset <= offset + size <= begin + len(data):
            address, end = self.store.address(self.name), offset + max(size, PIECE)
            data = self.store.retry(self.name, lambda: self.store.fs.cat_file(address, start=offset, end=end))
            self._piece = begin, data = offset, data
        return data[offset - begin : offset - begin + size]

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class CachedStore:
    """Files of an fsspec address, cached on disk.

    Attributes:
        url: folder of the dataset, for example ``s3://bucket/gold/shop``.
        cache: folder of the cache; several datasets and processes may share it.
        limit: bytes that the cache may hold.
        attempts, wait: tries per file, and seconds before the second one (twice as long before each further one).
    """

    url: str
    cache: Path
    limit: int
    attempts: int = 4
    wait: float = 0.5
    _warned: list[str] = field(default_factory=list, compare=False)

    @cached_property
    def fs(self) -> Any:
        """The fsspec file system."""
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)[0]
        except (ImportError, ValueError) as error:
            raise ValueError(f"{self.url}: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "fs"}

    def address(self, name: str) -> str:
        """Of a file."""
        return f"{self.url.rstrip('/')}/{name}"

    def folder(self) -> Path:
        """Fetch the manifest, always afresh."""
        place = self.cache / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        place.mkdir(parents=True, exist_ok=True)
        address, fs = self.address("manifest.json"), self.fs
        try:
            data = self.retry("manifest.json", lambda: fs.cat_file(address))
        except OSError as error:
            raise ValueError(f"{address}: {error}; is this a finished gold dataset?") from None
        temporary = place / f".manifest.{os.getpid()}.tmp"
        temporary.write_bytes(data)
        os.replace(temporary, place / "manifest.json")
        return place

    def exists(self, name: str) -> bool:
        """Not asked in advance."""
        return True

    def open(self, name: str, size: int | None, sha256: str) -> Blob:
        """Open the cached file; fetch it first where it is not there."""
        for _ in range(3):
            try:
                return LocalBlob(self._fetch(name, size, sha256))
            except FileNotFoundError as error:
                if error.filename is None or not Path(error.filename).is_relative_to(self.cache):
                    raise  # not there remotely
                # another process has just made room for its own file
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                break
        if not self._warned:
            self._warned.append(name)
            logger.warning("%s: no space left; samples are read from %s piece by piece", self.cache, self.url)
        return RemoteBlob(self, name)

    def fetch_ahead(self, files: Sequence[tuple[str, int, str]]) -> None:
        """In a thread, as many as half of the cache holds: the other half is being read."""
        sizes = np.cumsum([size for _, size, _ in files])
        chosen = [file for file, size in zip(files, sizes, strict=True) if size <= self.limit / 2]

        def fetch() -> None:
            for name, size, sha256 in chosen:
                with contextlib.suppress(OSError):  # who opens it meets the error again, and knows what to do
                    self._fetch(name, size, sha256)

        threading.Thread(target=fetch, name="fetch-ahead", daemon=True).start()

    def _fetch(self, name: str, size: int | None, sha256: str) -> Path:
        self.cache.mkdir(parents=True, exist_ok=True)
        target = self.cache / f"{sha256}{Path(name).suffix}"
        with FileLock(f"{target}.lock"):
            if target.is_file():
                os.utime(target)
                return target
            self._make_room(size or 0)
            try:
                self.retry(name, lambda: self._download(name, target, sha256))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self._make_room(self.limit)  # everything else in the cache must go
                self.retry(name, lambda: self._download(name, target, sha256))
        return target

    def _download(self, name: str, target: Path, sha256: str) -> None:
        temporary = target.with_name(f".{target.name}.part")
        digest = hashlib.sha256()
        try:
            with self.fs.open(self.address(name), "rb") as source, open(temporary, "wb") as file:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            if digest.hexdigest() != sha256:
                raise OSError(errno.EIO, "sha256 differs from the manifest's", name)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files until ``size`` more bytes fit."""
        with FileLock(str(self.cache / ".room.lock")):
            files = [p for p in self.cache.iterdir() if p.suffix in (".tar", ".parquet") and not p.name.startswith(".")]
            stats = sorted((p.stat().st_mtime_ns, p.stat().st_size, p) for p in files)
            total = sum(bytes_ for _, bytes_, _ in stats)
            for _, bytes_, path in stats:
                if total + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                total -= bytes_

    def retry(self, name: str, action: Callable[[], T]) -> T:
        """Try a few times; a file that is not there and a full disk are not worth another try.

        Raises:
            OSError: what went wrong in the last try.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except FileNotFoundError:
                raise
            except Exception as error:  # fsspec's back ends raise what their clients raise
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if attempt == self.attempts:
                    raise OSError(errno.EIO, f"{attempt} tries failed: {error}", self.address(name)) from error
                logger.warning("%s: try %d of %d: %s", self.address(name), attempt, self.attempts, error)
                time.sleep(self.wait * 2 ** (attempt - 1))
        raise AssertionError("unreachable")


def open_store(location: str | Path, cache: str | Path, limit: int) -> Store:
    """The files at a path or fsspec address.

    Args:
        location: ``lake/gold/shop``, ``s3://bucket/shop``; a `Path` made of an address (``s3:/bucket``) is understood.
        cache: folder for remote files (``~`` is the home).
        limit: bytes it may hold.
    """
    scheme = re.match(r"^([a-z][a-z0-9+.-]+):/+(.*)$", str(location))
    if scheme is None:
        return LocalStore(Path(location))
    root = "/" if scheme[1] in ("file", "local") else ""  # the others begin with a bucket or host
    return CachedStore(f"{scheme[1]}://{root}{scheme[2]}", Path(cache).expanduser(), limit)
