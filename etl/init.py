"""``python -m etl init FILES...``: a recipe guessed from the files, with the reason for each guess, to be edited."""

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from etl.ingest import KINDS, connect
from etl.profile import IMAGE_SUFFIXES, Column, Table, overlap, profile, told_by
from etl.raw import COMPRESSED

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

LABELS = (
    r"^(label|class|target|outcome|y)$",
    r"label|class|target|outcome",
    r"categ|genre|species|diagnos",
    r"type|kind|status|rating",
)
GROUPS = r"patient|subject|customer|user|reviewer|owner|author|member|household|person|client"
MAX_IMAGES = 100_000
LEAK = 0.9  # a column from which so many labels follow is worth a warning


@dataclass
class Guess:
    """What the recipe will say, and why."""

    mains: list[Table]
    ids: list[str]
    label: str | None = None
    label_why: str = ""
    group: str | None = None
    texts: Table | None = None
    text_key: str = ""
    text: list[Column] = field(default_factory=list)
    image: str | None = None
    image_why: str = ""
    image_size: int = 224
    series: list[str] = field(default_factory=list)
    joins: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def init(paths: list[Path]) -> str:
    """The text of a recipe for these files.

    Raises:
        ValueError: a file that is not a table (says what to do), or no table with one row per sample.
    """
    raw = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    names = [os.path.relpath(path.resolve(), raw) for path in paths if not path.is_dir()]
    for name in names:
        _must_be_a_table(raw, name)
    if not names:
        raise ValueError("no tables among the files given")
    with tempfile.TemporaryDirectory() as work:
        con = connect(Path(work))
        tables = [profile(con, raw, name, i) for i, name in enumerate(names)]
        text = "".join(f"{line}\n" for line in _write(con, raw, _guess(con, raw, tables)))
        con.close()
    return text


def _must_be_a_table(raw: Path, name: str) -> None:
    path = raw / name
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    suffix = Path(path.stem if path.suffix in COMPRESSED else path.name).suffix.removeprefix(".").lower()
    if suffix in ("ts", "zip"):
        raise ValueError(f"{path}: not a table; `python -m etl convert {path} --out DIR` makes files that can be read")
    if suffix not in KINDS:
        raise ValueError(f"{path}: unknown kind of file; tables are {', '.join(KINDS)}, each also .gz and .zst")


def _guess(con: "DuckDBPyConnection", raw: Path, tables: list[Table]) -> Guess:
    series = {t.name: found for t in tables if (found := _series(con, t))}
    # Dated rows of several owners look like the owners' series; if nothing else is there, a key of its own makes samples.
    rest = [t for t in tables if t.name not in series] or [t for t in tables if any(c.unique for c in t.of("key"))]
    series = {name: found for name, found in series.items() if all(name != t.name for t in rest)}
    if not rest:
        raise ValueError(
            "every table looks like a series (several rows per id and time); which one has one row per sample?"
        )
    first = max(rest, key=lambda t: (_label(t) is not None, len(t.columns), t.rows))
    mains = [first, *(t for t in rest if t is not first and _same_layout(con, first, t))]
    guess = Guess(mains, list(dict.fromkeys(_identity(t) for t in mains)))
    guess.label = _label(first)
    guess.group = next(
        (c.name for c in first.of("key", "category", "number") if re.search(GROUPS, c.name.lower()) and _repeats(c)),
        None,
    )
    for table in rest:
        if table not in mains:
            _attach(con, guess, table)
    for name, spec in series.items():
        table = next(t for t in tables if t.name == name)
        if overlap(con, table, str(spec["id"]), first, guess.ids[0]) > 0.5:
            guess.series.append(
                yaml.safe_dump({"table": name, **spec}, default_flow_style=True, sort_keys=False, width=10**6).strip()
            )
        else:
            guess.unused.append(f"{name}: looks like a series of {spec['id']!r}, whose values are not in {first.name}")
    if not guess.text:
        guess.text = first.of("text")
    _find_images(con, raw, guess)
    return guess


def _repeats(c: Column) -> bool:
    return 1 < c.distinct < 0.9 * c.present


def _identity(table: Table) -> str:
    """The first column that names the row; where none does, the one with the most values."""
    unique = [
        c.name for c in table.columns.values() if c.unique and c.present == table.rows and c.kind in ("key", "category")
    ]
    unique += [c.name for c in table.columns.values() if c.unique and c.present == table.rows]
    return unique[0] if unique else max(table.columns.values(), key=lambda c: c.distinct).name


def _label(table: Table) -> str | None:
    candidates = [c for c in table.columns.values() if 2 <= c.distinct <= 100 and c.distinct < 0.5 * c.present]
    filled = [c for c in candidates if c.present >= 0.5 * table.rows]
    for group in (filled, candidates):
        for pattern in LABELS:
            for c in group:
                if re.search(pattern, c.name.lower()):
                    return c.name
    return None


def _same_layout(con: "DuckDBPyConnection", first: Table, other: Table) -> bool:
    """Another table of samples: most of its columns are the first's, and its rows are others."""
    shared = set(first.columns) & set(other.columns)
    return (
        len(shared) >= 0.6 * len(other.columns)
        and len(shared) > 2
        and overlap(
            con,
            other,
            _identity(other),
            first,
            _identity(other) if _identity(other) in first.columns else _identity(first),
        )
        < 0.5
    )


def _series(con: "DuckDBPyConnection", table: Table) -> dict[str, object] | None:
    """``id, time`` and ``variable, value`` or ``values``, if the table has several rows per id, told apart by a time."""
    times = [
        c
        for c in table.of("time", "number")
        if c.kind == "time" or re.search(r"time|date|week|day|hour|month|minute|second|step|^t$", c.name.lower())
    ]
    numbers = table.of("number")
    for time in times:
        values = [c.name for c in numbers if c is not time]
        for key in [c for c in table.columns.values() if c is not time and _repeats(c) and c.present > 2 * c.distinct]:
            if not _is_key(con, table, [key.name, time.name]):
                names = [c for c in table.of("category") if c is not key and c.distinct <= 200]
                found = next(
                    (c.name for c in names if values and _is_key(con, table, [key.name, time.name, c.name])), None
                )
                value = next((v for v in values if v != key.name), None)
                if found and value:
                    return {"id": key.name, "time": time.name, "variable": found, "value": value}
            elif len(wide := [v for v in values if v != key.name]) >= 1:
                return {"id": key.name, "time": time.name, "values": wide}
    return None


def _is_key(con: "DuckDBPyConnection", table: Table, names: list[str]) -> bool:
    """Whether the columns together tell the rows apart, but for one in a hundred."""
    columns = ", ".join('"' + name.replace('"', '""') + '"' for name in names)
    distinct = con.execute(f"select count(*) from (select distinct {columns} from {table.sql})").fetchall()[0][0]
    return distinct >= 0.99 * table.rows


def _attach(con: "DuckDBPyConnection", guess: Guess, table: Table) -> None:
    """A further table: the samples' texts, or facts about something that they share."""
    main, key = guess.mains[0], _identity(table)
    if overlap(con, table, key, main, guess.ids[0]) > 0.5 and table.of("text") and not guess.texts:
        guess.texts, guess.text_key, guess.text = table, key, table.of("text")
        return
    wanted = [c.name for c in table.of("number", "category", "text") if c.name != key and c.name not in main.columns]
    on = next(
        (c.name for c in main.columns.values() if c.name == key and overlap(con, main, c.name, table, key) > 0.5), None
    )
    on = on or next((c.name for c in main.of("key", "category") if overlap(con, main, c.name, table, key) > 0.5), None)
    if on and wanted and table.columns[key].unique:
        side = {"table": table.name, "on": on, "id": key, "columns": wanted}
        guess.joins.append(yaml.safe_dump(side, default_flow_style=True, sort_keys=False, width=10**6).strip())
        guess.text += [c for c in table.of("text") if c.name in wanted]
    else:
        guess.unused.append(f"{table.name}: no column of it names rows of {main.name}")


def _find_images(con: "DuckDBPyConnection", raw: Path, guess: Guess) -> None:
    """A column of paths, or a folder of images whose names are the values of a column."""
    main = guess.mains[0]
    for c in main.of("image"):
        values = [
            row[0]
            for row in con.execute(
                f'select distinct "{c.name}" from {main.sql} where "{c.name}" is not null limit 200'
            ).fetchall()
        ]
        there = [raw / v for v in values if (raw / v).is_file()]
        guess.image, guess.image_why = (
            f"{{{c.name}}}",
            f"its values are paths; {len(there)} of {len(values)} looked for are there",
        )
        guess.image_size = _size(there)
        return
    folders: dict[tuple[str, str], list[Path]] = {}
    for path in _images(raw):
        folders.setdefault((os.path.relpath(path.parent, raw), path.suffix), []).append(path)
    for (folder, suffix), paths in sorted(folders.items(), key=lambda item: -len(item[1])):
        for name in [guess.ids[0], *(c.name for c in main.of("key", "category") if c.name != guess.ids[0])]:
            values = {row[0] for row in con.execute(f'select distinct "{name}" from {main.sql}').fetchall()}
            share = sum(path.stem in values for path in paths) / len(paths)
            if share > 0.5:
                place = "" if folder == "." else f"{folder}/"
                guess.image = f"{place}{{{name}}}{suffix}"
                guess.image_why = (
                    f"{share:.0%} of the {len(paths):,} files are named after it; missing where there is none"
                )
                guess.image_size = _size(paths[:50])
                return


def _images(raw: Path) -> Iterator[Path]:
    seen = 0
    for folder, _, names in os.walk(raw):
        for name in sorted(names):
            if name.rsplit(".", 1)[-1].lower() in IMAGE_SUFFIXES and seen < MAX_IMAGES:
                seen += 1
                yield Path(folder) / name


def _size(paths: list[Path]) -> int:
    """224, or the shorter side that nine in ten of these images do not exceed, where that is less."""
    from PIL import Image

    sides = []
    for path in paths:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    return max(8, min(224, sorted(sides)[int(0.9 * len(sides))])) if sides else 224


def _write(con: "DuckDBPyConnection", raw: Path, guess: Guess) -> Iterator[str]:
    main = guess.mains[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", raw.name).strip("_") or "dataset"
    yield "# Written by `python -m etl init`. Every choice below is a guess: read the reasons, edit, then"
    yield f"#   python -m etl build THIS_FILE --raw {_quoted(str(raw))} --lake lake"
    yield from (f"# Not used: {line}" for line in guess.unused)
    yield f"name: {_quoted(name)}"
    yield "source:"
    yield "  kind: table"
    yield from (f"  # {t.name}: {t.rows:,} rows looked at{f', {t.bad:,} bad' if t.bad else ''}" for t in guess.mains)
    if len(guess.mains) > 1:
        yield "  # These tables have most columns in common and other rows: all are samples."
    yield f"  main: {_flow([t.name for t in guess.mains])}"
    yield from _write_id(guess)
    yield from _write_group(guess)
    yield from _write_label(con, guess)
    yield from _write_time(main)
    if guess.joins:
        yield "  # Tables with one row per value of a column of main."
        yield from ["  join:", *(f"  - {line}" for line in guess.joins)]
    if guess.text:
        yield from (f"  # {c.name}: text, {c.words:.0f} words on average, {c.present:,} values" for c in guess.text)
        table = {"table": guess.texts.name, "id": guess.text_key} if guess.texts else {}
        yield f"  text: {_flow({**table, 'columns': [c.name for c in guess.text]})}"
    if guess.image:
        yield f"  # {guess.image_why}"
        yield f"  image: {_quoted(guess.image)}"
    if guess.series:
        yield "  # Several rows per id, told apart by a time."
        yield from ["  series:", *(f"  - {line}" for line in guess.series)]
    yield from _write_blocks(con, guess, main)


def _write_id(guess: Guess) -> Iterator[str]:
    for table, name in zip(guess.mains, [_identity(t) for t in guess.mains], strict=True):
        c = table.columns[name]
        more = "" if c.distinct == table.rows else f" of {table.rows:,} rows: the repeats will be set aside"
        yield f"  # {name}: {c.distinct:,} different values in {table.name}{more}"
    yield f"  id: {_flow(guess.ids if len(guess.ids) > 1 else guess.ids[0])}"


def _write_group(guess: Guess) -> Iterator[str]:
    if guess.group:
        c = guess.mains[0].columns[guess.group]
        yield f"  # {c.name}: named like somebody who has several rows ({c.distinct:,} values): never in two splits"
        yield f"  group: {_quoted(c.name)}"
        return
    yield "  # Rows of one person, patient or product must not straddle splits: name the column that tells."
    yield f"  # group: {_quoted(guess.ids[0])}"


def _write_label(con: "DuckDBPyConnection", guess: Guess) -> Iterator[str]:
    if guess.label is None:
        yield "  # No column is named like a label and has few values."
        yield "  # label: "
        return
    main = guess.mains[0]
    c = main.columns[guess.label]
    yield f"  # {c.name}: named like a label, {c.distinct} classes, {main.rows - c.present:,} rows without one"
    yield f"  label: {_quoted(c.name)}"


def _write_time(main: Table) -> Iterator[str]:
    times = main.of("time")
    if times:
        names = ", ".join(c.name for c in times)
        yield f"  # {names}: timestamps. When was the label of a row known? Name that column here: `split: {{time: ...}}` can"
        yield "  # cut by it, and `verify --deep` then looks for series that go on after it."
        yield f"  # time: {_quoted(times[0].name)}"


def _write_blocks(con: "DuckDBPyConnection", guess: Guess, main: Table) -> Iterator[str]:
    if guess.text:
        total = sum(c.present for c in guess.text)
        tokens = min(512, max(16, -(-int(1.5 * sum(c.high_words for c in guess.text)) // 16) * 16))
        yield f"# A WordPiece vocabulary of the train split; {tokens} tokens hold 95 % of the texts, at 1.5 tokens a word."
        yield f"text: {{tokenizer: {{train: {8000 if total > 5000 else 2000}}}, max_tokens: {tokens}}}"
    if guess.image:
        yield f"image: {{size: {guess.image_size}}}"
    yield from _write_tabular(con, guess, main)
    if guess.series:
        yield "timeseries: {max_steps: 512}"


def _write_tabular(con: "DuckDBPyConnection", guess: Guess, main: Table) -> Iterator[str]:
    used = {*guess.ids, guess.label, *(c.name for c in guess.text)}
    chosen = {
        kind: [c for c in main.of(kind) if c.name not in used and c.distinct > 1] for kind in ("number", "category")
    }
    left = [c for c in main.columns.values() if c.name not in used and not any(c in cs for cs in chosen.values())]
    if any(chosen.values()):
        yield "tabular:"
    for key, kind in (("numeric", "number"), ("categorical", "category")):
        if chosen[kind]:
            yield f"  {key}:"
        for c in chosen[kind]:
            yield f"  - {_quoted(c.name)}  # {_why(con, guess, main, c)}"
    for c in left:
        if f"{{{c.name}}}" not in (guess.image or ""):
            yield f"# Left out: {c.name}: {_reason(c)}"


def _why(con: "DuckDBPyConnection", guess: Guess, main: Table, c: Column) -> str:
    said = f"{c.distinct:,} values, {main.rows - c.present:,} missing"
    if guess.label and c.distinct < 0.2 * main.rows and (told := told_by(con, main, c.name, guess.label)) >= LEAK:
        said += f"; ALONE IT TELLS {told:.0%} OF THE LABELS: a leak?"
    return said


def _reason(c: Column) -> str:
    reasons = {
        "empty": "no value",
        "key": f"{c.distinct:,} different values of {c.present:,}: a name, not a category",
        "time": "a time; make it a number to use it",
        "image": "paths of images",
    }
    return reasons.get(c.kind, "one value only")


def _flow(value: object) -> str:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("...\n").strip()


def _quoted(text: str) -> str:
    return _flow(text)
