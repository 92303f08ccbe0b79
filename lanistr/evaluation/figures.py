"""Files of what was measured: figures as JSON, the same in words as Markdown, and a drawing."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_figures(
    found: Mapping[str, Any],
    lines: Sequence[str],
    draw: Callable[[Mapping[str, Any], Path], None],
    out: Path,
    name: str,
) -> str:
    """Write ``<name>.json``, ``<name>.md`` and ``<name>.png`` into a folder.

    Args:
        found: the figures.
        lines: of the Markdown.
        draw: draws the figures into a file.
        out: folder, made if need be.
        name: of the files.

    Returns:
        The Markdown.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write(out / f"{name}.json", json.dumps(found, indent=1) + "\n")
    draw(found, out / f"{name}.png")
    text = "\n".join(lines) + "\n"
    _write(out / f"{name}.md", text)
    return text


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
