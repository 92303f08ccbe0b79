"""``python -m etl convert``: what is not a table becomes tables or images, exactly as it says.

* A UEA ``.ts`` file: ``cases.csv`` (case, part, label) and ``series.csv`` (case, step and one column per dimension).
* A ``.zip`` of files: unpacked; a name that would leave the folder is an error.
"""

import csv
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any


def convert(paths: list[Path], out: Path) -> list[str]:
    """Convert files into a folder; returns a line per file.

    Raises:
        ValueError: a file of another kind, damaged, or already converted to ``out``.
    """
    kinds = {path.suffix.lower() for path in paths}
    if kinds - {".ts", ".zip"}:
        raise ValueError(f"{', '.join(map(str, paths))}: can convert .ts (UEA) and .zip")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    out.mkdir(parents=True, exist_ok=True)
    said = [f"{path}: {_unzip(path, out):,} files" for path in paths if path.suffix.lower() == ".zip"]
    series = [path for path in paths if path.suffix.lower() == ".ts"]
    return said + (_series(series, out) if series else [])


def _unzip(path: Path, out: Path) -> int:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            for member in members:
                name = PurePosixPath(member.filename.replace("\\", "/"))
                if name.is_absolute() or ".." in name.parts or "\0" in member.filename:
                    raise ValueError(f"{path}: {member.filename!r} would be written outside of {out}")
            for member in members:
                target = out / member.filename.replace("\\", "/")
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.resolve().is_relative_to(out.resolve()):  # through a link that lies there
                    raise ValueError(f"{path}: {member.filename!r} would be written outside of {out}")
                with archive.open(member) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be unpacked: {error}") from None
    return len(members)


def _series(paths: list[Path], out: Path) -> list[str]:
    targets = [out / "cases.csv", out / "series.csv"]
    for target in targets:
        if target.exists():
            raise ValueError(f"{target}: is there already")
    said = []
    temporary = [target.with_suffix(".tmp") for target in targets]
    try:
        with (
            open(temporary[0], "w", newline="", encoding="utf-8") as c,
            open(temporary[1], "w", newline="", encoding="utf-8") as s,
        ):
            cases, steps = csv.writer(c, lineterminator="\n"), csv.writer(s, lineterminator="\n")
            cases.writerow(["case", "part", "label"])
            width = 0
            for path in paths:
                n = 0
                for n, (label, dimensions) in enumerate(read_ts(path), start=1):
                    if not width:
                        width = len(dimensions)
                        steps.writerow(["case", "step", *(f"dim_{i}" for i in range(width))])
                    if len(dimensions) != width:
                        raise ValueError(f"{path}: case {n} has {len(dimensions)} dimensions, the first one {width}")
                    case = f"{path.stem}-{n}"
                    cases.writerow([case, path.stem, label])
                    for t in range(max(map(len, dimensions))):
                        steps.writerow([case, t, *(d[t] if t < len(d) else "" for d in dimensions)])
                said.append(f"{path}: {n:,} cases of {width} dimensions")
        for made, target in zip(temporary, targets, strict=True):
            os.replace(made, target)
    finally:
        for made in temporary:
            made.unlink(missing_ok=True)
    return said


def read_ts(path: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """Label and values per dimension of each case of a UEA file; ``?`` (missing) becomes "".

    Raises:
        ValueError: time stamps (not supported), or no data.
    """
    header: dict[str, str] = {}
    with open(path, encoding="utf-8", errors="strict") as file:
        lines: Iterator[Any] = (line.strip() for line in file)
        for line in lines:
            if line.lower() == "@data":
                break
            if line.startswith("@"):
                key, _, value = line[1:].partition(" ")
                header[key.lower()] = value.strip().lower()
        else:
            raise ValueError(f"{path}: no @data: not a UEA .ts file")
        if header.get("timestamps", "false") != "false":
            raise ValueError(f"{path}: has time stamps; only evenly spaced series can be converted")
        labelled = header.get("classlabel", "false").startswith("true")
        for line in lines:
            if line and not line.startswith("#"):
                parts = line.split(":")
                label = parts.pop() if labelled else ""
                yield (
                    label,
                    [["" if value.strip() == "?" else value.strip() for value in part.split(",")] for part in parts],
                )
