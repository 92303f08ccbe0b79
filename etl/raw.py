"""Raw files: found, registered and proven whole. They stay where they are and are only read.

A name is relative to the raw folder, a glob (``reviews-*.json.gz`` is one table of many files) or an fsspec URL
(``s3://``, ``gs://``, ``memory://``). Nothing outside of the raw folder is opened, whatever
a name says or a pattern finds.
"""

import codecs
import glob
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CHUNK = 1 << 20
GZIP_CHUNK = 1 << 16
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
OUTSIDE = "outside of the raw folder"
# DuckDB's readers cut a line at the first, and take the second for the separator that we tell them never occurs.
ODD_BYTES = (b"\0", b"\1")


class Damaged(Exception):
    """A compressed stream ends or breaks before its end."""


@dataclass(frozen=True)
class RawFile:
    """A registered raw file.

    Attributes:
        name: as the quarantine and the shards name it: relative to the raw folder, or a URL.
        path: local path, or a URL.
        bytes, mtime, sha256: of the file as it lies there (mtime in seconds, 0 where unknown).
        broken: why it cannot be read, or not to its end.
        odd: holds something that DuckDB would misread (not UTF-8, NUL bytes, very long lines).
    """

    name: str
    path: str
    bytes: int
    mtime: int
    sha256: str
    broken: str | None = None
    odd: bool = False

    @property
    def packing(self) -> str:
        """``.gz``, ``.zst`` or nothing."""
        suffix = os.path.splitext(self.path)[1].lower()
        return suffix if suffix in COMPRESSED else ""

    @property
    def kind(self) -> str:
        """``csv``, ``parquet``, ...: the suffix below the compression's."""
        return os.path.splitext(self.path[: len(self.path) - len(self.packing)])[1].removeprefix(".").lower()


@dataclass(frozen=True)
class RawTable:
    """One logical table: the files that a name or a glob stands for, by name.

    Attributes:
        salvage: read the readable part of a broken file.
    """

    name: str
    files: tuple[RawFile, ...]
    salvage: bool = False


def is_url(name: str) -> bool:
    """Whether a name is an fsspec URL."""
    return "://" in name


def register(raw: Path, name: str, *, salvage: bool = False) -> RawTable:
    """Find the files of a name, hash them, and prove that they are whole.

    Raises:
        ValueError: no such file, or every file is broken and nothing is to be salvaged.
    """
    found = _find_remote(name) if is_url(name) else _find(raw, name)
    if not found:
        raise ValueError(f"{name if is_url(name) else raw / name}: no such raw file")
    files = tuple(_outside(shown) if path is None else _inspect(shown, path) for shown, path in found)
    if all(file.broken for file in files) and not (salvage and any(file.path for file in files)):
        raise ValueError(f"{_full(raw, files[0])}: {files[0].broken}")
    return RawTable(name, files, salvage)


def _full(raw: Path, file: RawFile) -> str:
    return file.name if is_url(file.name) else str(raw / file.name)


def _find(raw: Path, name: str) -> list[tuple[str, str | None]]:
    """Names and paths; no path where it lies outside.

    A link that the recipe itself names may lead out of the raw folder: somebody put it there to be read. One that a
    pattern finds may not.
    """
    if os.path.lexists(raw / name):
        return [
            (name, str(raw / name) if Path(os.path.abspath(raw / name)).is_relative_to(os.path.abspath(raw)) else None)
        ]
    found = sorted(glob.glob(name, root_dir=raw, recursive=True)) if glob.has_magic(name) else []
    return [
        (_printable(n), str(raw / n) if _resolved(raw / n).is_relative_to(raw.resolve()) else None)
        for n in found
        if not os.path.isdir(raw / n)
    ]


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return Path("/")


def _printable(name: str) -> str:
    """A file name may hold any bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _find_remote(name: str) -> list[tuple[str, str | None]]:
    remote = filesystem(name)
    try:
        urls = sorted(remote.glob(name)) if glob.has_magic(name) else [name] if remote.exists(name) else []
    except OSError as error:
        raise ValueError(f"{name}: {error}") from None
    return [(remote.unstrip_protocol(url), remote.unstrip_protocol(url)) for url in urls]


def filesystem(url: str) -> Any:
    """The fsspec file system of a URL. Raises ValueError for an unknown protocol, or one whose package is missing."""
    import fsspec

    try:
        return fsspec.filesystem(url.split("://")[0])
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from None


def _outside(name: str) -> RawFile:
    return RawFile(name, "", 0, 0, "", OUTSIDE)


class _Hashing:
    """A binary stream that hashes what is read. It outlives pyarrow's reader, which closes its source."""

    closed = False

    def __init__(self, stream: IO[bytes]):
        self.stream = stream
        self.digest = hashlib.sha256()
        self.size = 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data

    def close(self) -> None:
        """The owner of the stream closes it."""


def _inspect(name: str, path: str) -> RawFile:
    """Read a file once: hash, wholeness, oddities."""
    file = RawFile(name, path, 0, _mtime(path), "")
    broken, odd = None, False
    try:
        with open_bytes(path) as stream:
            hashing = _Hashing(stream)
            try:
                odd = _is_odd(unpack(hashing, file.packing)) if file.kind != "parquet" else _drain(hashing, file)
            except Damaged as error:
                kind = COMPRESSED[file.packing]
                broken = f"truncated or corrupt {kind} ({error}); fetch it again, or read what is there with --salvage"
            while hashing.read(CHUNK):
                pass
    except OSError as error:
        return RawFile(name, path, 0, file.mtime, "", f"not readable: {error.strerror or error}")
    return RawFile(name, path, hashing.size, file.mtime, hashing.digest.hexdigest(), broken, odd)


def _drain(stream: Any, file: RawFile) -> bool:
    """Parquet checks itself; only its packing is to be proven."""
    for _ in unpack(stream, file.packing):
        pass
    return False


def _mtime(path: str) -> int:
    return 0 if is_url(path) or not os.path.exists(path) else int(os.stat(path).st_mtime)


def open_bytes(path: str) -> Any:
    """Open a local path or a URL as a binary stream. Raises OSError."""
    if is_url(path):
        return filesystem(path).open(path, "rb")
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise OSError("not a regular file")
    return open(path, "rb")


def unpack(stream: Any, packing: str) -> Iterator[bytes]:
    """Decompressed chunks of a stream. Raises Damaged after the last chunk that could be read."""
    if packing == ".gz":
        yield from _gunzip(stream)
    elif packing == ".zst":
        yield from _unzstd(stream)
    else:
        while data := stream.read(CHUNK):
            yield data


def _gunzip(stream: Any) -> Iterator[bytes]:
    """Like `gzip`, but all that lies before a break is yielded first."""
    member = zlib.decompressobj(wbits=31)
    fresh = True  # at the start of a member
    while data := stream.read(GZIP_CHUNK):
        while data:
            if fresh and not data.strip(b"\0"):  # zero padding between or after members is allowed
                break
            fresh = False
            before = member.copy()
            try:
                out = member.decompress(data)
            except zlib.error as error:
                yield _readable_part(before, data)
                raise Damaged(str(error)) from None
            if out:
                yield out
            data = b""
            if member.eof:
                data, member, fresh = member.unused_data, zlib.decompressobj(wbits=31), True
    if not fresh:
        raise Damaged("it ends before its end-of-stream marker")


def _readable_part(member: Any, data: bytes) -> bytes:
    """What comes out of the bytes before a break."""
    out = bytearray()
    for i in range(len(data)):
        try:
            out += member.decompress(data[i : i + 1])
        except zlib.error:
            break
    return bytes(out)


def _unzstd(stream: Any) -> Iterator[bytes]:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd") as unpacked:
        try:
            while data := unpacked.read(GZIP_CHUNK):
                yield data
        except OSError as error:
            raise Damaged(str(error)) from None


def _is_odd(chunks: Iterator[bytes]) -> bool:
    """Whether a text holds what DuckDB's readers do not read, or read wrongly. Reads to the end in any case."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    odd = first = False
    size_without_newline = 0
    for chunk in chunks:
        if odd:
            continue
        if not first:
            first, odd = True, not chunk.split(b"\n", 1)[0].strip()  # a blank first line would be the header
        size_without_newline = 0 if b"\n" in chunk else size_without_newline + len(chunk)
        odd = (
            odd
            or any(byte in chunk for byte in ODD_BYTES)
            or size_without_newline > CHUNK
            or not _decodes(decoder, chunk)
        )
    return odd or not _decodes(decoder, b"", final=True)


def _decodes(decoder: codecs.IncrementalDecoder, data: bytes, final: bool = False) -> bool:
    try:
        decoder.decode(data, final)
    except UnicodeDecodeError:
        return False
    return True
