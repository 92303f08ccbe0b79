"""Source ``amazon2018``: Amazon Review Data (2018), reviews joined with product metadata (Ni, Li and McAuley 2019)."""

from pathlib import Path
from typing import TYPE_CHECKING

from etl.ingest import RawFile, cast_number, load
from etl.quarantine import Quarantine, column, literal
from etl.recipe import AmazonSource, Recipe
from etl.sources.samples import Samples

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

NEEDED = ["overall", "reviewerID", "asin", "unixReviewTime"]
OPTIONAL = ("verified", "reviewText", "summary", "vote")
NUMERIC = ["votes", "timestamp"]
CATEGORICAL = ["product", "reviewer", "verified", "year"]


def raw_files(source: AmazonSource) -> list[str]:
    """Raw files that the source reads."""
    return [source.reviews, *([source.metadata] if source.metadata else [])]


def read(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawFile], recipe: Recipe, raw: Path
) -> Samples:
    """Make the canonical tables.

    Raises:
        ValueError: a missing column, or tabular columns that this source does not have.
    """
    source = recipe.source
    assert isinstance(source, AmazonSource)
    counts = {"reviews": load(con, quarantine, files[source.reviews], "reviews", NEEDED, OPTIONAL)}
    counts |= _join_metadata(con, quarantine, files, source)
    counts["duplicates"] = _drop_duplicates(con)
    _select(con, quarantine, source, raw)
    con.execute("create table series (row_id varchar, time double, variable varchar, value double)")
    numeric = [*NUMERIC, *(["price"] if source.price else [])]
    categorical = [*CATEGORICAL, *(["brand"] if source.brand else [])]
    if recipe.tabular:
        numeric = _choose(recipe.tabular.numeric, numeric)
        categorical = _choose(recipe.tabular.categorical, categorical)
    return Samples(numeric, categorical, ["1", "2", "3", "4", "5"], source.group, counts)


def _choose(wanted: list[str] | None, there: list[str]) -> list[str]:
    if wanted is None:
        return there
    unknown = [name for name in wanted if name not in there]
    if unknown:
        raise ValueError(f"tabular column {unknown[0]!r}: amazon2018 has {', '.join(there)}")
    return wanted


def _drop_duplicates(con: "DuckDBPyConnection") -> int:
    """Repeats of (reviewer, product, text) beyond the first."""
    before = con.execute("select count(*) from reviews").fetchall()[0][0]
    con.execute(
        "delete from reviews where _row in (select _row from reviews qualify row_number() over "
        '(partition by "reviewerID", asin, "reviewText" order by _row) > 1)'
    )
    return before - con.execute("select count(*) from reviews").fetchall()[0][0]


def _join_metadata(
    con: "DuckDBPyConnection", quarantine: Quarantine, files: dict[str, RawFile], source: AmazonSource
) -> dict[str, int]:
    if source.metadata is None:
        con.execute("create table products (asin varchar, title varchar, brand varchar, price varchar)")
        return {}
    n = load(con, quarantine, files[source.metadata], "metadata", ["asin"], ("title", "brand", "price"))
    con.execute(
        "create table products as select asin, title, brand, price from metadata where asin is not null "
        "qualify row_number() over (partition by asin order by _row) = 1"
    )
    joined = con.execute("select count(*) from reviews where asin in (select asin from products)").fetchall()[0][0]
    return {"metadata rows": n, "reviews joined with metadata": joined}


def _select(con: "DuckDBPyConnection", quarantine: Quarantine, source: AmazonSource, raw: Path) -> None:
    part = source.reviews
    number = {
        name: cast_number(con, quarantine, part, "reviews", name, expression)
        for name, expression in (
            ("overall", None),
            ("unixReviewTime", None),
            ("vote", "replace(vote, ',', '')"),
        )
    }
    review = f"left(trim(concat_ws(' ', summary, \"reviewText\")), {source.text_chars})"
    text = f"concat_ws(' ', title, {review})" if source.title else review
    group = column("reviewerID") if source.group == "reviewer" else "reviews.asin"
    image = (
        f"{literal(source.images.rstrip('/') + '/')} || reviews.asin || '.jpg'" if source.images else "null::varchar"
    )
    price = "try_cast(replace(replace(price, '$', ''), ',', '') as double)"
    # A product's repeated reviews by one reviewer differ in text only: the row number keeps ids apart.
    con.execute(
        f"""create table samples as select
            concat_ws('|', "reviewerID", reviews.asin, "unixReviewTime", _row) as row_id,
            coalesce({group}, _row::varchar) as grp,
            case when {number["overall"]} in (1, 2, 3, 4, 5) then cast(cast({number["overall"]} as integer) as varchar) end as label,
            nullif({text}, '') as text,
            {image} as image,
            coalesce({number["vote"]}, 0) as "n:votes",
            {number["unixReviewTime"]} as "n:timestamp",
            {price} as "n:price",
            reviews.asin as "c:product",
            "reviewerID" as "c:reviewer",
            lower(verified) as "c:verified",
            cast(year(to_timestamp({number["unixReviewTime"]}) at time zone 'UTC') as varchar) as "c:year",
            brand as "c:brand",
            _file, _row
        from reviews left join products on reviews.asin = products.asin"""
    )
