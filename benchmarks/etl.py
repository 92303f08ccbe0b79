"""Rows/s and peak memory of the ETL under a memory limit, against a road that holds everything in memory.

``python benchmarks/etl.py --out results.json [--rows 200000,1000000,4000000] [--memory 2GB] [--quick]``

Cases, each in a fresh process (peak = its VmHWM), on review-like JSON lines made here:

* ``ingest``: parse, quarantine, cast, join with metadata, drop repeats: to the canonical table.
* ``silver``: all up to the plan: ingest, split, statistics, sort by key, cut into buckets.
* ``gold``: silver to shards, text and tabular, one process.
* ``photos``: 500 px JPEGs to 224 px, decoded, resized, written as shards.

Comparator ``in_memory``: Polars eager reads and joins whole tables; its gold turns them into a list of dicts, tokenises,
and writes with webdataset. It checks nothing and quarantines nothing. Rates are rows per CPU second of the process,
all threads counted: what one core does, whatever else runs on the machine.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from etl.__main__ import _bytes as parse_bytes
from etl.recipe import Recipe

AIMS = {"ingest": 50_000, "gold": 2_000, "photos": 300}  # rows or samples per second and core
PHOTOS = 1_500
CHUNK = 10_000


def write_reviews(folder: Path, rows: int) -> None:
    """Reviews (about 45 words) of rows / 10 products by rows / 5 reviewers, every thousandth line broken, and metadata."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnoprstuvwy"), rng.integers(2, 9))) for _ in range(5000)])
    products, reviewers = max(1, rows // 10), max(1, rows // 5)
    with open(folder / "reviews.json", "w", encoding="utf-8") as file:
        for start in range(0, rows, CHUNK):
            n = min(CHUNK, rows - start)
            lengths = np.clip(rng.lognormal(np.log(38), 0.6, n), 3, 300).astype(int)
            texts = np.split(words[(5000 * rng.random(lengths.sum()) ** 2).astype(int)], np.cumsum(lengths)[:-1])
            product, reviewer = rng.integers(0, products, n), rng.integers(0, reviewers, n)
            stars, day = rng.integers(1, 6, n), rng.integers(0, 6000, n)
            for i in range(n):
                line = json.dumps(
                    {
                        "overall": float(stars[i]),
                        "verified": bool(i % 3),
                        "reviewerID": f"R{reviewer[i]:09d}",
                        "asin": f"B{product[i]:09d}",
                        "reviewText": " ".join(texts[i]),
                        "summary": " ".join(texts[i][:3]),
                        "unixReviewTime": 1_000_000_000 + 86_400 * int(day[i]),
                    }
                )
                file.write((line[:-20] if i % 1000 == 999 else line) + "\n")
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        for i in range(products):
            file.write(json.dumps({"asin": f"B{i:09d}", "title": words[i % 5000], "brand": f"brand {i % 700}"}) + "\n")


def write_tokenizer(folder: Path) -> None:
    from etl import wordpiece

    with open(folder / "reviews.json", encoding="utf-8") as file:
        texts = [line.split('"reviewText": "')[1].split('"')[0] for line, _ in zip(file, range(500), strict=False)]
    (folder / "tokenizer.json").write_text(wordpiece.train(texts, 4000).to_str())


def write_photos(folder: Path) -> None:
    from PIL import Image

    (folder / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(PHOTOS):
        small = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        small.resize((500, 500), Image.Resampling.BICUBIC).save(folder / "photos" / f"{i}.jpg", quality=85)
    (folder / "items.csv").write_text("id,x\n" + "".join(f"{i},{i % 7}\n" for i in range(PHOTOS)))


def reviews_recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "reviews",
            "source": {"kind": "amazon2018", "reviews": "reviews.json", "metadata": "meta.json", "brand": True},
            "text": {"tokenizer": {"path": "tokenizer.json"}, "max_tokens": 128},
            "tabular": {},
        }
    )


def photos_recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "photos",
            "source": {"kind": "table", "main": "items.csv", "id": "id", "image": "photos/{id}.jpg"},
            "image": {"size": 224},
        }
    )


def ingest(raw: Path, lake: Path, memory: int, threads: int) -> int:
    from etl.ingest import connect
    from etl.quarantine import Quarantine
    from etl.raw import register
    from etl.sources.registry import SOURCES

    recipe, source = reviews_recipe(), SOURCES["amazon2018"]
    lake.mkdir()
    files = {name: register(raw, name) for name in source.raw_files(recipe.source)}
    con = connect(lake, memory=memory, threads=threads)
    quarantine = Quarantine(con)
    source.read(con, quarantine, files, recipe, raw)
    return con.execute("select count(*) from samples").fetchall()[0][0]


def silver(raw: Path, lake: Path, memory: int, threads: int) -> int:
    from etl.prepare import Limits, prepare

    lake.mkdir()
    plan = prepare(reviews_recipe(), raw, lake, limits=Limits(memory, threads))
    return sum(task.n for task in plan.tasks)


def gold(raw: Path, lake: Path, memory: int, threads: int) -> int:
    """After `silver` in the same lake: the plan is found, the tasks are run."""
    return _built(reviews_recipe(), raw, lake)


def photos(raw: Path, lake: Path, memory: int, threads: int) -> int:
    return _built(photos_recipe(), raw, lake)


def _built(recipe: Recipe, raw: Path, lake: Path) -> int:
    from etl.build import build
    from lanistr.manifest import SPLITS, Manifest

    manifest = Manifest.load(build(recipe, raw, lake))
    return sum(manifest.n(split) for split in SPLITS)


def eager_ingest(raw: Path, lake: Path, memory: int, threads: int) -> int:
    frame = _eager(raw)
    lake.mkdir()
    frame.write_parquet(lake / "samples.parquet")
    return len(frame)


def eager_gold(raw: Path, lake: Path, memory: int, threads: int) -> int:
    from webdataset.writer import ShardWriter

    from lanistr.transforms import encode_text, load_tokenizer, npy_bytes, text_spec

    tokenizer = load_tokenizer(raw / "tokenizer.json")
    spec = text_spec(tokenizer, 128)
    lake.mkdir()
    rows = _eager(raw).to_dicts()
    with ShardWriter(str(lake / "%05d.tar"), maxcount=10_000, verbose=0) as writer:
        for i, row in enumerate(rows):
            members = encode_text(row["text"] or "", tokenizer, spec)
            members["tab.npy"] = npy_bytes(np.array([row["unixReviewTime"], bool(row["verified"])], dtype=np.float32))
            writer.write({"__key__": f"{i:09d}", "json": {"label": row["overall"]}, **members})
    return len(rows)


def _eager(raw: Path) -> Any:
    import polars as pl

    lines = (raw / "reviews.json").read_text(encoding="utf-8").splitlines()
    good = "\n".join(line for line in lines if line.endswith("}"))  # Polars stops at a malformed line
    reviews = pl.read_ndjson(good.encode()).unique(["reviewerID", "asin", "reviewText"], maintain_order=True)
    joined = reviews.join(pl.read_ndjson(raw / "meta.json"), on="asin", how="left")
    return joined.with_columns(text=pl.concat_str("summary", "reviewText", separator=" ").str.slice(0, 512))


CASES: dict[str, Callable[[Path, Path, int, int], int]] = {
    "ingest": ingest,
    "silver": silver,
    "gold": gold,
    "photos": photos,
    "eager_ingest": eager_ingest,
    "eager_gold": eager_gold,
}


def child(case: str, raw: Path, lake: Path, memory: int, threads: int) -> None:
    """Run one case and print what it took."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    rows = CASES[case](raw, lake, memory, threads)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(json.dumps({"rows": rows, "wall_s": seconds, "cpu_s": cpu, "peak_bytes": 1024 * int(peak.split()[1])}))


def measure(case: str, raw: Path, lake: Path, memory: int, threads: int) -> dict[str, Any]:
    from benchmarks import _harness

    arguments = ["--child", case, "--raw", str(raw), "--lake", str(lake), "--memory", f"{memory / 1e6:g}MB"]
    found = _harness.in_fresh_process(__file__, [*arguments, "--threads", str(threads)])
    found["rows_per_cpu_s"] = found["rows"] / found["cpu_s"]
    print(
        f"{case:<13}{found['rows']:>10,} rows{found['rows_per_cpu_s']:>10,.0f} rows/CPU s{found['wall_s']:>8.1f} s wall"
        f"{found['peak_bytes'] / 2**20:>8,.0f} MiB peak  (load {os.getloadavg()[0]:.1f})",
        file=sys.stderr,
        flush=True,
    )
    return found


def compare(size: int, folder: Path, arguments: argparse.Namespace, gold_too: bool) -> list[dict[str, Any]]:
    """Ours and theirs at one size, in turns, for as many rounds as asked."""
    raw = folder / "raw"
    raw.mkdir()
    write_reviews(raw, size)
    write_tokenizer(raw)
    pairs = {"ingest": "eager_ingest", "silver": None, **({"gold": "eager_gold"} if gold_too else {})}
    runs: dict[str, list[dict[str, Any]]] = {}
    for round_ in range(arguments.rounds):
        for ours, theirs in pairs.items():
            lake = folder / f"lake-{round_}-{'silver' if ours == 'gold' else ours}"
            runs.setdefault(ours, []).append(measure(ours, raw, lake, arguments.memory, arguments.threads))
            if theirs and size <= (arguments.eager_rows if ours == "ingest" else arguments.eager_gold_rows):
                lake = folder / f"lake-{round_}-{theirs}"
                runs.setdefault(theirs, []).append(measure(theirs, raw, lake, arguments.memory, arguments.threads))
    return [_row(f"{ours}/{size}", runs[ours], runs.get(theirs or "")) for ours, theirs in pairs.items()]


def _row(case: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]] | None) -> dict[str, Any]:
    rates = sorted(run["rows_per_cpu_s"] for run in ours)
    row: dict[str, Any] = {
        "case": case,
        "ours": _typical(ours) | {"rows_per_cpu_s_min": rates[0], "rows_per_cpu_s_max": rates[-1]},
    }
    aim = AIMS.get(case.split("/")[0])
    row |= {"aim_rows_per_core_s": aim} if aim else {}
    if theirs:
        ratios = [b["cpu_s"] / a["cpu_s"] for a, b in zip(ours, theirs, strict=True)]
        row["comparator"] = "in_memory"
        row["ratio"] = {
            "median": float(np.median(ratios)),
            "min": min(ratios),
            "max": max(ratios),
            "rounds": len(ratios),
        }
        row["parity"] = {"rows": [ours[0]["rows"], theirs[0]["rows"]]}
        row["theirs"] = _typical(theirs)
    return row


def _typical(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: float(np.median([run[key] for run in runs])) for key in runs[0]}


def scaling(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case, from the smallest to the largest size: CPU time per row (1 = linear) and peak memory (1 = flat)."""
    found = []
    for case in ("ingest", "silver", "gold"):
        sizes = [row["ours"] for row in rows if row["case"].startswith(f"{case}/")]
        for name, first, last in (("all", sizes[0], sizes[-1]), ("last two", sizes[-2:][0], sizes[-1])):
            time_ratio = (last["cpu_s"] / last["rows"]) / (first["cpu_s"] / first["rows"])
            peak_ratio = last["peak_bytes"] / first["peak_bytes"]
            span = [int(first["rows"]), int(last["rows"])]
            found.append(
                {
                    "case": f"{case}/scaling/{name}",
                    "rows": span,
                    "cpu_per_row_ratio": time_ratio,
                    "peak_ratio": peak_ratio,
                }
            )
            print(f"{case}: {span[0]:,} -> {span[1]:,} rows: CPU per row x {time_ratio:.2f}, peak x {peak_ratio:.2f}")
    return found


def photo_row(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    raw = folder / "raw"
    raw.mkdir()
    write_photos(raw)
    runs = [
        measure("photos", raw, folder / f"lake-{i}", arguments.memory, arguments.threads)
        for i in range(max(3, arguments.rounds))
    ]
    return _row(f"photos/{PHOTOS}", runs, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", default="200000,1000000,4000000")
    parser.add_argument("--gold-rows", type=int, default=4_000_000, help="largest size at which gold is measured")
    parser.add_argument("--eager-rows", type=int, default=1_000_000, help="largest size of the in-memory ingest")
    parser.add_argument("--eager-gold-rows", type=int, default=200_000, help="the same for its gold (slow)")
    parser.add_argument("--memory", type=parse_bytes, default=parse_bytes("2GB"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tmp", type=Path, help="where raw files and lakes are made")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--child", choices=CASES)
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--lake", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.raw, arguments.lake, arguments.memory, arguments.threads)
        return
    sizes = [5_000, 20_000] if arguments.quick else [int(size) for size in arguments.rows.split(",")]
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=arguments.tmp) as folder:
            rows += compare(size, Path(folder), arguments, gold_too=size <= arguments.gold_rows)
    with tempfile.TemporaryDirectory(dir=arguments.tmp) as folder:
        rows.append(photo_row(Path(folder), arguments))
    rows += scaling(rows)
    if arguments.out:
        from benchmarks import _harness

        _harness.write_result(arguments.out, "etl", rows)


if __name__ == "__main__":
    main()
