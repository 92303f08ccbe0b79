"""`etl images`: fetch the product images of an ``amazon2018`` recipe into the raw folder.

An image is ``<source.images>/<asin>.jpg``, byte for byte as served (a build decodes by content, not by name). Beside
them lies ``_status.parquet``: file, url, status (ok, failed), reason, bytes, sha256. A second run skips what is ok and
tries again what failed. Files appear whole or not at all.
"""

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from etl.fetch import Failed, Fetcher, Limits, check_image
from etl.ingest import connect
from etl.lake import say, whole_file
from etl.quarantine import Quarantine
from etl.raw import register
from etl.recipe import Recipe
from etl.sources import amazon2018
from etl.sources.models import AmazonSource

STATUS = "_status.parquet"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
SAVE_EVERY = 500
CANDIDATES = 4  # URLs tried per product


@dataclass(frozen=True)
class Status:
    """A row of the status table; ``reason`` is "" where ``status`` is ok."""

    file: str
    url: str
    status: str
    reason: str = ""
    bytes: int = 0
    sha256: str = ""


def fetch_images(recipe: Recipe, raw: Path, limits: Limits) -> Counter[str]:
    """Fetch what is missing; returns the number of products per outcome (``ok``, ``ok before``, or the reason).

    Args:
        recipe: with an ``amazon2018`` source that has ``images``.
        raw: raw folder: the tables are read, the images written into ``source.images``.
        limits: of the fetching.

    Raises:
        ValueError: another source, no ``source.images``, or one that leaves the raw folder.
    """
    source = recipe.source
    if not isinstance(source, AmazonSource) or source.images is None:
        raise ValueError(f"recipe {recipe.name}: images are fetched for amazon2018 sources with source.images only")
    folder = raw / source.images
    if not folder.resolve().is_relative_to(raw.resolve()):
        raise ValueError(f"source.images {source.images!r}: leaves the raw folder")
    wanted = wanted_images(source, raw)
    say(f"images: {len(wanted):,} products have an image URL")
    folder.mkdir(parents=True, exist_ok=True)
    before = _load_status(folder)
    done = {name: row for name, row in before.items() if row.status == "ok" and _is_there(folder, row)}
    found = {name: _adopt(folder, name) for name in wanted if name not in done and NAME.fullmatch(name)}
    done |= {name: row for name, row in found.items() if row}
    left = {name: urls for name, urls in wanted.items() if name not in done}
    fetched = asyncio.run(_fetch_all(left, folder, limits, done))
    outcomes = Counter(row.reason or "ok" for row in fetched.values())
    outcomes["ok before"] = sum(name in done for name in wanted)
    return outcomes


def wanted_images(source: AmazonSource, raw: Path) -> dict[str, list[str]]:
    """Product -> its image URLs, the seller's first (high resolution where there is one), then those of the reviews."""
    files = {name: register(raw, name) for name in amazon2018.raw_files(source)}
    with TemporaryDirectory(prefix="images-") as work:
        con = connect(Path(work))
        amazon2018.load_tables(con, Quarantine(con), files, source)
        rows = con.execute(
            """with found as (
                select asin, 0 as source, 0 as review, generate_subscripts(l, 1) as nth, unnest(l) as url
                from (select asin, from_json(urls, '["VARCHAR"]') as l from products where asin in (select asin from reviews))
                union all
                select asin, 1, _row, generate_subscripts(l, 1), unnest(l)
                from (select asin, _row, from_json(image, '["VARCHAR"]') as l from reviews where image is not null)
            ) select asin, list(url order by source, review, nth) from found where url is not null group by asin order by asin"""
        ).fetchall()
        con.close()
    return {asin: list(dict.fromkeys(urls))[:CANDIDATES] for asin, urls in rows}


async def _fetch_all(
    wanted: Mapping[str, Sequence[str]], folder: Path, limits: Limits, done: Mapping[str, Status]
) -> dict[str, Status]:
    made: dict[str, Status] = {}
    queue = iter(sorted(wanted.items()))

    async def work(fetcher: Fetcher) -> None:
        for name, urls in queue:
            made[name] = await _fetch_one(fetcher, folder, name, urls)
            if len(made) % SAVE_EVERY == 0:
                _save_status(folder, [*done.values(), *made.values()])
                say(
                    f"images: {len(made):,} of {len(wanted):,}, {sum(row.status == 'ok' for row in made.values()):,} ok"
                )

    try:
        async with Fetcher(limits) as fetcher:
            await asyncio.gather(*(work(fetcher) for _ in range(limits.concurrency)))
    finally:
        _save_status(folder, [*done.values(), *made.values()])
    return made


async def _fetch_one(fetcher: Fetcher, folder: Path, name: str, urls: Sequence[str]) -> Status:
    """Try the URLs in turn; the status is that of the first that works, or of the last."""
    row = Status(f"{name}.jpg"[:80], urls[0], "failed", "odd product id")
    if not NAME.fullmatch(name):
        return row
    for url in urls:
        try:
            data = await fetcher.image(url)
        except Failed as failure:
            row = Status(f"{name}.jpg", url[:2000], "failed", failure.reason)
            continue
        with whole_file(folder / f"{name}.jpg") as temporary:
            temporary.write_bytes(data)
        return Status(f"{name}.jpg", url, "ok", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return row


def _is_there(folder: Path, row: Status) -> bool:
    path = folder / row.file
    return path.is_file() and not path.is_symlink() and path.stat().st_size == row.bytes


def _adopt(folder: Path, name: str) -> Status | None:
    """An image that lies there without a status: a run was killed before it wrote its own, or a person put it there."""
    path = folder / f"{name}.jpg"
    if path.is_symlink() or not path.is_file():
        return None
    data = path.read_bytes()
    try:
        check_image(data, 1)
    except Failed:
        return None
    return Status(path.name, "", "ok", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _load_status(folder: Path) -> dict[str, Status]:
    import pyarrow.parquet as pq

    if not (folder / STATUS).is_file():
        return {}
    rows = [Status(**row) for row in pq.read_table(folder / STATUS).to_pylist()]
    return {row.file.removesuffix(".jpg"): row for row in rows}


def _save_status(folder: Path, rows: Iterable[Status]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"file": "string", "url": "string", "status": "string", "reason": "string"}
    schema = pa.schema([*types.items(), ("bytes", pa.int64()), ("sha256", "string")])
    table = pa.Table.from_pylist([asdict(row) for row in sorted(rows, key=lambda row: row.file)], schema=schema)
    with whole_file(folder / STATUS) as temporary:
        pq.write_table(table, temporary, compression="zstd")
