"""Notes and chest X-rays, and which of them belong to which sample."""

from typing import TYPE_CHECKING

from etl.ingest import load
from etl.quarantine import Quarantine, literal
from etl.raw import RawTable
from etl.sources.mimic.tables import count, parse_times, set_aside
from etl.sources.models import MimicSource

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def read_notes(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], name: str | None
) -> dict[str, int]:
    """Make ``notes``: note_id, subject_id, taken (charttime), known (storetime where there is one), text."""
    if name is None:
        con.execute(
            "create table notes (note_id varchar, subject_id varchar, taken timestamp, known timestamp, text varchar, "
            "_file varchar, _row bigint)"
        )
        return {}
    n = load(con, quarantine, files[name], "raw_notes", ["note_id", "subject_id", "charttime", "storetime", "text"])
    parse_times(con, quarantine, name, "raw_notes", ["charttime", "storetime"])
    for key in ("note_id", "subject_id", "charttime", "text"):
        set_aside(con, quarantine, name, "raw_notes", f"no {key}", f"{key} is null", "note_id")
    later = "(select _row from raw_notes qualify row_number() over (partition by note_id order by _row) > 1)"
    set_aside(con, quarantine, name, "raw_notes", "duplicate note_id", f"_row in {later}", "note_id")
    con.execute(
        "create table notes as select note_id, subject_id, charttime as taken, "
        "greatest(charttime, storetime) as known, text, _file, _row from raw_notes"
    )
    con.execute("drop table raw_notes")
    return {f"notes: read ({name})": n}


def read_images(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], source: MimicSource
) -> dict[str, int]:
    """Make ``images``: image_id, subject_id, taken (StudyDate and StudyTime), path, of the views that the recipe names."""
    name = source.image_metadata
    if name is None:
        con.execute(
            "create table images (image_id varchar, subject_id varchar, taken timestamp, path varchar, _file varchar, "
            "_row bigint)"
        )
        return {}
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime"]
    n = load(con, quarantine, files[name], "raw_images", columns)
    for key in ("dicom_id", "subject_id", "study_id"):
        set_aside(con, quarantine, name, "raw_images", f"no {key}", f"{key} is null", "dicom_id")
    # StudyTime is hhmmss.fff as a number: it has lost the zeros at its front (80556.875 is 08:05:56).
    clock = "lpad(split_part(\"StudyTime\", '.', 1), 6, '0')"
    con.execute(
        f"""create table images as select dicom_id as image_id, subject_id, "ViewPosition" as view,
            try_strptime("StudyDate" || {clock}, '%Y%m%d%H%M%S') as taken,
            concat({literal(source.images.rstrip("/"))}, '/p', left(subject_id, 2), '/p', subject_id, '/s', study_id,
                '/', dicom_id, '.jpg') as path,
            _file, _row
        from raw_images"""
    )
    con.execute("drop table raw_images")
    set_aside(con, quarantine, name, "images", "StudyDate or StudyTime is not a time", "taken is null", "image_id")
    later = "(select _row from images qualify row_number() over (partition by image_id order by _row) > 1)"
    set_aside(con, quarantine, name, "images", "duplicate dicom_id", f"_row in {later}", "image_id")
    flow = {"images: read": n}
    if source.views:
        other = f"coalesce(view, '') not in ({', '.join(map(literal, source.views))})"
        flow[f"images: - view is not {' or '.join(source.views)}"] = count(
            con, f"select count(*) from images where {other}"
        )
        con.execute(f"delete from images where {other}")
    return flow


def join_cohort(con: "DuckDBPyConnection", source: MimicSource) -> dict[str, int]:
    """Make ``documents`` (row_id, subject_id, text, text_known, image, image_taken, _file, _row), a row per stay.

    Text: all notes of the hospital stay, written *and* stored by the prediction time, newest first. Image: the last one
    between admission to the ICU and the prediction time. With ``leaky_reference_notes``, the text is the patient's last
    discharge summary instead, whenever it was written (the published setting).
    """
    if source.leaky_reference_notes:
        text = """select subject_id, arg_max(text, _row) as text, arg_max(known, _row) as text_known
            from notes group by 1"""
        key = "subject_id"
    else:
        text = """select stay_id, string_agg(text, chr(10) order by taken desc, note_id) as text, max(known) as text_known
            from stays join notes using (subject_id) where taken >= admitted and known <= cutoff group by 1"""
        key = "stay_id"
    image = """select stay_id, arg_max(path, (taken, image_id)) as image, max(taken) as image_taken
        from stays join images using (subject_id) where taken between intime and cutoff group by 1"""
    con.execute(
        f"""create table documents as select stay_id as row_id, subject_id, text, text_known, image, image_taken, _file, _row
        from stays left join ({text}) using ({key}) left join ({image}) using (stay_id)"""
    )
    return {
        "stays with a note": count(con, "select count(text) from documents"),
        "stays with an image": count(con, "select count(image) from documents"),
    }


def join_pool(con: "DuckDBPyConnection", source: MimicSource) -> dict[str, int]:
    """Make ``documents``: every stay, note and image, each in exactly one row; nothing is multiplied.

    A stay takes the last note and the last image of its window. Of the others, a note and an image of a patient share a
    row when each is the other's nearest in time and at most ``align_hours`` lie between them. The rest stand alone.
    """
    for name, key in (("note", "note_id"), ("image", "image_id")):
        stored = "and known <= cutoff" if name == "note" else ""
        con.execute(
            f"""create table stay_{name} as select stay_id, {key} from stays s join {name}s d using (subject_id)
            where taken between intime and until {stored}
            qualify row_number() over (partition by stay_id order by taken desc, {key} desc) = 1
            and row_number() over (partition by {key} order by intime desc) = 1"""
        )
    con.execute(_PAIRS.format(hours=source.align_hours))
    con.execute(
        """create table documents as
        select stay_id as row_id, s.subject_id, text, known as text_known, path as image, images.taken as image_taken,
            s._file, s._row
        from stays s left join stay_note using (stay_id) left join stay_image using (stay_id)
            left join notes using (note_id) left join images using (image_id)
        union all
        select 'image:' || image_id, i.subject_id, text, known, path, i.taken, i._file, i._row
        from images i left join pairs using (image_id) left join notes using (note_id)
        where image_id not in (select image_id from stay_image)
        union all
        select 'note:' || note_id, subject_id, text, known, null, null, _file, _row from notes
        where note_id not in (select note_id from stay_note union all select note_id from pairs)"""
    )
    return {
        "samples: = stays, notes and images, aligned": count(con, "select count(*) from documents"),
        "samples: notes beside a stay": count(con, "select count(*) from stay_note"),
        "samples: images beside a stay": count(con, "select count(*) from stay_image"),
        "samples: notes beside an image only": count(con, "select count(*) from pairs"),
    }


_PAIRS = """create table pairs as
    with near as (
        select note_id, image_id, abs(epoch(n.taken) - epoch(i.taken)) as apart
        from notes n join images i using (subject_id)
        where apart <= 3600 * {hours}
            and note_id not in (select note_id from stay_note) and image_id not in (select image_id from stay_image)
    )
    select note_id, image_id from near
    qualify row_number() over (partition by note_id order by apart, image_id) = 1
        and row_number() over (partition by image_id order by apart, note_id) = 1"""
