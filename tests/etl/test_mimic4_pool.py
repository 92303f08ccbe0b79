"""The pretraining pool of MIMIC-IV against a naive matching, on small tables of every shape."""

from datetime import datetime, timedelta

import duckdb
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from etl.sources.mimic.documents import join_pool
from etl.sources.models import MimicSource

START = datetime(2150, 1, 1)
ALIGN_MINUTES = 180
Row = tuple[str, str | None, str | None]  # sample, note, image
Event = tuple[str, int, int]  # patient, minute, minutes until it is known
EVENTS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 6 * 1440), st.integers(0, 600)), max_size=12)


def naive_pool(stays: dict[str, tuple[int, int]], notes: dict[str, Event], images: dict[str, Event]) -> list[Row]:
    """Patient a's stays, from minute to minute; a note must be known an hour after the stay at the latest."""
    rows: list[Row] = []
    for stay, (start, end) in stays.items():
        films = [(at, i) for i, (who, at, _) in images.items() if who == "a" and start <= at <= end]
        texts = [
            (at, n)
            for n, (who, at, delay) in notes.items()
            if who == "a" and start <= at <= end and at + delay <= end + 60
        ]
        rows.append((stay, max(texts)[1] if texts else None, max(films)[1] if films else None))
    free_notes = [n for n in notes if n not in {note for _, note, _ in rows}]
    free_images = [i for i in images if i not in {image for _, _, image in rows}]

    def apart(n: str, i: str) -> int:
        return abs(notes[n][1] - images[i][1]) if notes[n][0] == images[i][0] else ALIGN_MINUTES + 1

    alone = set(free_notes)
    for i in free_images:
        n = min(free_notes, key=lambda n: (apart(n, i), n), default=None)
        paired = (
            n is not None and apart(n, i) <= ALIGN_MINUTES and i == min(free_images, key=lambda j: (apart(n, j), j))
        )
        rows.append((f"image:{i}", n if paired else None, i))
        alone -= {n} if paired else set()
    return [*rows, *((f"note:{n}", n, None) for n in alone)]


def table(columns: list[str], rows: list[tuple]) -> pa.Table:
    """Texts and times (given in minutes); ``_file`` and ``_row`` are constants."""
    kinds = {name: pa.timestamp("us") for name in ("intime", "until", "cutoff", "taken", "known")}
    cells = [[START + timedelta(minutes=v) if isinstance(v, int) else v for v in row] for row in rows]
    fields = [pa.field(name, kinds.get(name, pa.string())) for name in [*columns, "_file", "_row"]]
    return pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in cells], schema=pa.schema(fields))


@settings(max_examples=30)
@given(EVENTS, EVENTS, st.lists(st.sampled_from([0, 2, 3, 5]), unique=True))
def test_the_pool_equals_a_naive_matching(some_notes: list[Event], some_images: list[Event], days: list[int]) -> None:
    stays = {f"s{day}": (day * 1440 + 720, day * 1440 + 1920) for day in days}
    notes = {f"n{i:02}": event for i, event in enumerate(some_notes)}
    images = {f"i{i:02}": event for i, event in enumerate(some_images)}
    tables = {
        "stays": table(
            ["stay_id", "subject_id", "intime", "until", "cutoff"],
            [(stay, "a", start, end, end + 60) for stay, (start, end) in stays.items()],
        ),
        "notes": table(
            ["note_id", "subject_id", "taken", "known", "text"],
            [(n, who, at, at + delay, n) for n, (who, at, delay) in notes.items()],
        ),
        "images": table(
            ["image_id", "subject_id", "taken", "path"], [(i, who, at, i) for i, (who, at, _) in images.items()]
        ),
    }
    with duckdb.connect() as con:
        for name, rows in tables.items():
            con.register(f"{name}_arrow", rows)
            con.execute(f"create table {name} as from {name}_arrow")
        counts = join_pool(con, MimicSource(kind="mimic4", samples="pool", align_hours=ALIGN_MINUTES // 60))
        found = con.execute("select row_id, text, image from documents").fetchall()
    assert sorted(found, key=str) == sorted(naive_pool(stays, notes, images), key=str)
    assert sorted(n for _, n, _ in found if n) == sorted(notes)
    assert sorted(i for _, _, i in found if i) == sorted(images)
    assert counts["samples: = stays, notes and images, aligned"] == len(found)
