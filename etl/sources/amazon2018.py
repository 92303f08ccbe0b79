"""Source ``amazon2018``: Amazon Review Data (2018), reviews joined with product metadata (Ni, Li and McAuley 2019).

The quirks of the real files, and what becomes of them:

* A review is repeated for each variant of a product: one per (reviewer, product, text) is kept, the others are counted.
* ``vote`` is a text such as "1,341", absent where nobody voted: then it is 0.
* ``style`` is an object with keys such as "Color:" and values such as " Black": `source.style` names those wanted. A
  review file that went through pandas holds it as a Python literal; that is read as well.
* ``price`` and ``title`` of the metadata sometimes hold a piece of the page's source: set aside, the cell is missing.
"""

import ast
import json
from pathlib import Path
from typing import TYPE_CHECKING

from etl.ingest import cast_number, load
from etl.quarantine import Quarantine, column, literal
from etl.raw import RawTable
from etl.recipe import Recipe
from etl.sources.models import AmazonSource
from etl.sources.samples import Samples

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

NEEDED = ["overall", "reviewerID", "asin", "unixReviewTime"]
OPTIONAL = ("verified", "reviewText", "summary", "vote", "style", "image")
NUMERIC = ["votes", "timestamp"]
CATEGORICAL = ["product", "reviewer", "verified", "year"]
YEAR_1, YEAR_9999 = -62135596800, 253402300799  # seconds since 1970 that a calendar knows
MAX_LITERAL = 1 << 16


def raw_files(source: AmazonSource) -> list[str]:
    """Raw files that the source reads."""
    return [source.reviews, *([source.metadata] if source.metadata else [])]


def read(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], recipe: Recipe, raw: Path
) -> Samples:
    """Make the canonical tables.

    Raises:
        ValueError: a missing column, or tabular columns that this source does not have.
    """
    source = recipe.source
    assert isinstance(source, AmazonSource)
    numeric = [*NUMERIC, *(["price"] if source.price else [])]
    categorical = [*CATEGORICAL, *(["brand"] if source.brand else []), *(f"style.{name}" for name in source.style)]
    if recipe.tabular:
        numeric = _choose(recipe.tabular.numeric, numeric)
        categorical = _choose(recipe.tabular.categorical, categorical)
    counts = load_tables(con, quarantine, files, source)
    counts["duplicates"] = _drop_duplicates(con)
    _select(con, quarantine, source)
    con.execute("create table series (row_id varchar, time double, variable varchar, value double)")
    return Samples(numeric, categorical, ["1", "2", "3", "4", "5"], source.group, counts)


def load_tables(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawTable], source: AmazonSource
) -> dict[str, int]:
    """Tables ``reviews`` and ``products`` (one row per product; empty without metadata) as the raw files say it.

    Returns:
        Rows read and joined.
    """
    con.create_function("literal_to_json", literal_to_json, ["VARCHAR"], "VARCHAR", null_handling="special")  # type: ignore[arg-type]
    n = load(con, quarantine, files[source.reviews], "reviews", NEEDED, OPTIONAL)
    for name in ("asin", "reviewerID"):
        _set_aside(con, quarantine, source.reviews, "reviews", f"{column(name)} is null", f"no {name}")
    for name in ("style", "image"):
        _as_json(con, quarantine, source.reviews, "reviews", name)
    counts = {"reviews": n}
    if source.metadata is None:
        con.execute(
            "create table products (asin varchar, title varchar, brand varchar, price varchar, urls varchar,"
            " _file varchar, _row bigint)"
        )
        return counts
    optional = ("title", "brand", "price", "imageURL", "imageURLHighRes")
    counts["metadata rows"] = load(con, quarantine, files[source.metadata], "metadata", ["asin"], optional)
    _set_aside(con, quarantine, source.metadata, "metadata", "asin is null", "no asin")
    con.execute(
        "create table products as select asin, title, brand, price, "
        'coalesce(nullif("imageURLHighRes", \'[]\'), "imageURL") as urls, _file, _row '
        "from metadata qualify row_number() over (partition by asin order by _file, _row) = 1"
    )
    _as_json(con, quarantine, source.metadata, "products", "urls")
    counts["reviews joined with metadata"] = _count(con, "reviews where asin in (select asin from products)")
    return counts


def literal_to_json(text: str | None) -> str | None:
    """A Python literal (``{'Color:': " 5'"}``), as pandas writes nested values into a CSV, as JSON; None = neither."""
    if text is None or len(text) > MAX_LITERAL or text[:1] not in "{[":
        return None
    try:
        return json.dumps(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _count(con: "DuckDBPyConnection", what: str) -> int:
    return con.execute(f"select count(*) from {what}").fetchall()[0][0]


def _set_aside(
    con: "DuckDBPyConnection", quarantine: Quarantine, part: str, table: str, condition: str, reason: str
) -> None:
    """Rows that say too little to be a sample."""
    quarantine.add(
        part,
        f"select _file as file, _row as line, {literal(reason)} as reason, null as raw from {table} where {condition}",
    )
    con.execute(f"delete from {table} where {condition}")


def _as_json(con: "DuckDBPyConnection", quarantine: Quarantine, part: str, table: str, name: str) -> None:
    """Turn a nested column into JSON text; what is neither JSON nor a Python literal becomes a missing cell."""
    there = f"{name} is not null and not json_valid({name})"
    quarantine.add(
        part,
        f"select _file as file, _row as line, {literal(f'not readable: {name}')} as reason, {name} as raw from {table} "
        f"where {there} and literal_to_json({name}) is null",
    )
    con.execute(f"update {table} set {name} = literal_to_json({name}) where {there}")


def _choose(wanted: list[str] | None, there: list[str]) -> list[str]:
    if wanted is None:
        return there
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise ValueError(f"tabular column {unknown[0]!r}: amazon2018 has {', '.join(there)}")
    return wanted


def _drop_duplicates(con: "DuckDBPyConnection") -> int:
    """Repeats of (reviewer, product, text) beyond the first. Few rows have a twin: only those are compared in full."""
    key = '"reviewerID", asin, "reviewText"'
    return con.execute(
        f"""delete from reviews where rowid in (
            select rowid from reviews
            where hash({key}) in (select hash({key}) from reviews group by 1 having count(*) > 1)
            qualify row_number() over (partition by {key} order by _file, _row) > 1)"""
    ).fetchall()[0][0]


def _select(con: "DuckDBPyConnection", quarantine: Quarantine, source: AmazonSource) -> None:
    part = source.reviews
    number = {
        name: cast_number(con, quarantine, part, "reviews", name, expression)
        for name, expression in (("overall", None), ("unixReviewTime", None), ("vote", "replace(vote, ',', '')"))
    }
    stars = _checked(con, quarantine, part, number["overall"], "in (1, 2, 3, 4, 5)", "not a rating from 1 to 5")
    seconds = _checked(
        con, quarantine, part, number["unixReviewTime"], f"between {YEAR_1} and {YEAR_9999}", "not a time"
    )
    price, title = _product_columns(con, quarantine, source)
    words = [*(["summary"] if source.summary else []), '"reviewText"']
    review = f"left(trim(concat_ws(' ', {', '.join(words)})), {source.text_chars})"
    text = f"concat_ws(' ', {title}, nullif({review}, ''))" if source.title else review
    group = column("reviewerID") if source.group == "reviewer" else "reviews.asin"
    image = (
        f"{literal(source.images.rstrip('/') + '/')} || reviews.asin || '.jpg'" if source.images else "null::varchar"
    )
    # The text is part of the id: a reviewer may review a product twice. A place in the file is not: lines may move.
    con.execute(
        f"""create table samples as select
            "reviewerID" || '|' || reviews.asin || '|' || md5(coalesce("reviewText", '')) as row_id,
            {group} as grp,
            cast(cast({stars} as integer) as varchar) as label,
            nullif({text}, '') as text,
            {image} as image,
            case when vote is null then 0 else {number["vote"]} end as "n:votes",
            {seconds} as time,
            {seconds} as "n:timestamp",
            {price} as "n:price",
            reviews.asin as "c:product",
            "reviewerID" as "c:reviewer",
            lower(verified) as "c:verified",
            cast(year(to_timestamp({seconds}) at time zone 'UTC') as varchar) as "c:year",
            brand as "c:brand",
            {"".join(f"{_style(name)} as {column(f'c:style.{name}')}, " for name in source.style)}
            reviews._file, reviews._row
        from reviews left join products on reviews.asin = products.asin"""
    )


def _checked(
    con: "DuckDBPyConnection", quarantine: Quarantine, part: str, number: str, allowed: str, reason: str
) -> str:
    """SQL for a number that is null, and was set aside, unless it is allowed."""
    quarantine.add(
        part,
        f"select _file as file, _row as line, {literal(reason)} as reason, ({number})::varchar as raw from reviews "
        f"where {number} is not null and not ({number} {allowed})",
    )
    return f"case when {number} {allowed} then {number} end"


def _product_columns(con: "DuckDBPyConnection", quarantine: Quarantine, source: AmazonSource) -> tuple[str, str]:
    """SQL for price and title, null where they are not asked for."""
    price, title = "null::double", "null::varchar"
    if source.price:
        plain = "replace(ltrim(price, '$'), ',', '')"
        price = cast_number(con, quarantine, str(source.metadata), "products", "price", plain)
    if source.title:
        junk = "(contains(title, 'getTime(') or starts_with(title, '.a-box'))"
        quarantine.add(
            str(source.metadata),
            "select _file as file, _row as line, 'not a title: page source' as reason, title as raw from products "
            f"where {junk}",
        )
        title = f"case when not {junk} then nullif(trim(regexp_replace(title, '<[^>]*>', ' ', 'g')), '') end"
    return price, title


def _style(name: str) -> str:
    """SQL for one key of the style, which the published files write with a colon."""
    keys = [f"style ->> {literal('$.' + json.dumps(key))}" for key in (f"{name}:", name)]
    return f"nullif(trim(coalesce({', '.join(keys)})), '')"
