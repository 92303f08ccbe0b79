"""Source ``amazon2018`` on the real files, against plain Python that shares no code with it, and on hostile ones."""

import csv
import datetime
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from etl import recipe as recipes
from etl.build import build
from etl.leaks import probe
from etl.sources.amazon2018 import literal_to_json
from etl.summary import read_indices
from etl.verify import verify
from lanistr.manifest import Manifest
from lanistr.transforms import FIRST_KNOWN_ID, TabularSpec

DATA = Path(os.environ.get("LANISTR_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
AMAZON, VOCABULARY = DATA / "amazon_reviews_2018", DATA / "bert_vocab_minilm" / "tokenizer.json"
real = pytest.mark.skipif(not AMAZON.is_dir(), reason="the real Amazon reviews are not here (set LANISTR_DATA)")
CHANGES = {
    "amazon_giftcards": ["source.title=true", "source.brand=true", "source.price=true"],
    "amazon_fashion": ["source.metadata=null", "source.style=[Color, Size]"],
    "amazon_beauty": ["source.metadata=null", "source.group=product"],
    "amazon_office": [
        "source.metadata=null",
        "source.reviews=Office_Products_5_balanced9000.csv.gz",
        "source.style=[Color]",
    ],
}
Build = Callable[[str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    lake = tmp_path_factory.mktemp("amazon")

    def of(name: str) -> Path:
        if not (lake / "gold" / name).is_dir():
            changes = [*CHANGES[name], f"text.tokenizer={{path: {VOCABULARY.resolve()}}}"]
            build(recipes.load(name, changes), AMAZON, lake)
        return lake / "gold" / name

    return of


def silver(gold: Path) -> pl.DataFrame:
    return pl.read_parquet(gold.parents[1] / "silver" / gold.name / "samples" / "*.parquet")


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(AMAZON / name, "rt", encoding="utf-8")]


def distinct(reviews: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for review in reviews:
        first.setdefault((review["reviewerID"], review["asin"], review.get("reviewText") or None), review)
    return list(first.values())


@real
def test_every_gift_card_review_joins_its_metadata(built: Build) -> None:
    manifest = Manifest.load(built("amazon_giftcards"))
    assert manifest.counts == {
        "reviews": 2972,
        "metadata rows": 1547,
        "reviews joined with metadata": 2972,
        "duplicates": 1,
    }
    products = {row["asin"]: row for row in lines("meta_Gift_Cards.json.gz")}
    rows = {(r["_row"]): r for r in silver(built("amazon_giftcards")).to_dicts()}
    reviews = lines("Gift_Cards_5.json.gz")
    assert len(rows) == 2971 == len(distinct(reviews))
    prices = 0
    for number, row in rows.items():
        product = products[reviews[number - 1]["asin"]]
        assert row["c:brand"] == (product["brand"] or None)
        assert row["text"].startswith(product["title"].strip()[:20])
        if product["price"].startswith("$"):
            prices += 1
            assert row["n:price"] == float(product["price"].replace("$", "").replace(",", ""))
        else:
            assert row["n:price"] is None
    assert prices > 2000
    junk = sum(bool(p["price"]) and not p["price"].startswith("$") for p in products.values())
    assert manifest.quarantine == {"not a number: price": junk}


@real
def test_all_repeats_of_beauty_and_fashion_are_found(built: Build) -> None:
    beauty, fashion = (Manifest.load(built(name)) for name in ("amazon_beauty", "amazon_fashion"))
    assert beauty.counts == {"reviews": 5269, "duplicates": 1053}
    assert fashion.counts == {"reviews": 3176, "duplicates": 89}
    assert sum(s.n for s in beauty.shards) == 4216
    assert sum(s.n for s in fashion.shards) == 3087
    assert beauty.quarantine == fashion.quarantine == {}


@real
def test_votes_labels_and_times_are_those_of_the_file(built: Build) -> None:
    rows = silver(built("amazon_beauty"))
    kept = distinct(lines("All_Beauty_5.json.gz"))
    assert rows["n:votes"].max() == 1341
    assert rows["n:votes"].sum() == sum(int(str(r.get("vote", "0")).replace(",", "")) for r in kept)
    assert Counter(rows["label"]) == Counter(str(int(r["overall"])) for r in kept)
    years = [datetime.datetime.fromtimestamp(r["unixReviewTime"], datetime.UTC).year for r in kept]
    assert Counter(rows["c:year"]) == Counter(map(str, years))


@real
def test_style_keys_lose_their_colon(built: Build) -> None:
    rows = silver(built("amazon_fashion"))
    kept = distinct(lines("AMAZON_FASHION_5.json.gz"))
    for key in ("Color", "Size"):
        expected = Counter((r.get("style") or {}).get(f"{key}:", "").strip() or None for r in kept)
        assert Counter(rows[f"c:style.{key}"]) == expected
    manifest = Manifest.load(built("amazon_fashion"))
    spec = TabularSpec.model_validate(manifest.modalities["tabular"].spec)
    assert [c.name for c in spec.categorical][-2:] == ["style.Color", "style.Size"]


@real
def test_office_reads_from_a_csv_with_python_literals(built: Build) -> None:
    gold = built("amazon_office")
    assert Manifest.load(gold).counts == {"reviews": 9000, "duplicates": 35}
    name = "Office_Products_5_balanced9000.csv.gz"
    with gzip.open(AMAZON / name, "rt", encoding="utf-8", newline="") as file:
        kept = distinct(list(csv.DictReader(file)))
    rows = silver(gold)
    assert rows.height == len(kept) == 8965
    assert Counter(rows["label"]) == Counter(r["overall"][0] for r in kept)
    color = Counter((json.loads(literal_to_json(r["style"]) or "{}").get("Color:") or "").strip() or None for r in kept)
    assert Counter(rows["c:style.Color"]) == color
    assert color["Black"] > 190
    assert verify(gold, deep=True)[-1].startswith("ok")


@real
@pytest.mark.parametrize("name", ["amazon_giftcards", "amazon_fashion"])
def test_the_leak_probe_finds_five_stars(name: str, built: Build) -> None:
    manifest = Manifest.load(built(name))
    leaks = probe(built(name), manifest, read_indices(built(name), manifest))
    assert ("phrase 'five stars'", "5") in {(leak.what, leak.label) for leak in leaks}
    assert all("five" in leak.what or "star" in leak.what for leak in leaks)


@real
def test_another_order_of_the_lines_gives_the_same_samples(tmp_path: Path) -> None:
    text = gzip.decompress((AMAZON / "Gift_Cards_5.json.gz").read_bytes()).splitlines(keepends=True)[:200]
    keys = []
    for order in (text, text[::-1]):
        raw = tmp_path / f"raw{len(keys)}"
        raw.mkdir()
        (raw / "Gift_Cards_5.json.gz").write_bytes(gzip.compress(b"".join(order)))
        changes = ["source.metadata=null", f"text.tokenizer={{path: {VOCABULARY.resolve()}}}"]
        gold = build(recipes.load("amazon_giftcards", changes), raw, raw / "lake")
        keys.append(pl.concat([pl.read_parquet(p) for p in sorted(gold.rglob("*.parquet"))])["key"].to_list())
    assert keys[0] == keys[1]


def test_nothing_odd_is_silently_coerced(tmp_path: Path) -> None:
    good = {"overall": 5.0, "reviewerID": "r", "asin": "a", "unixReviewTime": 1529193600, "reviewText": "fine"}
    odd: list[dict[str, Any]] = [
        {"overall": 0.0},
        {"overall": 4.5},
        {"overall": "five"},
        {"unixReviewTime": 1e300},
        {"unixReviewTime": -9214560000},  # 1678
        {"unixReviewTime": 10413792000},  # 2300
        {"vote": "many"},
        {"vote": "1,234"},
        {"style": "{'Color:': \" it's\"}"},
        {"style": "{'Color:'"},
        {"style": "[" * 5000},
        {"asin": None},
        {"reviewerID": ""},
    ]
    reviews = [good | {"reviewText": f"fine {i}"} | change for i, change in enumerate(odd)]
    reviews += [good | {"reviewerID": f"r{i}"} for i in range(40)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, reviews)))
    tree = {
        "name": "odd",
        "source": {"kind": "amazon2018", "reviews": "r.jsonl", "style": ["Color"]},
        "text": {"tokenizer": {"train": 100}},
        "tabular": {},
    }
    gold = build(recipes.Recipe.model_validate(tree), tmp_path, tmp_path / "lake")
    assert Manifest.load(gold).quarantine == {
        "not a number: overall": 1,
        "not a number: vote": 1,
        "not a rating from 1 to 5": 2,
        "not a finite float32: unixReviewTime": 1,
        "not readable: style": 2,
        "no asin": 1,
        "no reviewerID": 1,
    }
    rows = {r["_row"] - 1: r for r in silver(gold).to_dicts()}
    assert len(rows) == len(reviews) - 2
    assert [rows[i]["label"] for i in range(4)] == [None, None, None, "5"]
    assert [rows[i]["c:year"] for i in range(3, 6)] == [None, "1678", "2300"]
    assert [rows[i]["n:votes"] for i in range(6, 9)] == [None, 1234, 0]
    assert [rows[i]["c:style.Color"] for i in range(8, 11)] == ["it's", None, None]


def test_an_unseen_category_keeps_its_reserved_id_in_a_later_build(tmp_path: Path) -> None:
    review = {"overall": 5.0, "asin": "a", "unixReviewTime": 1529193600, "reviewText": "fine", "verified": True}
    for name, asin in (("first", "a"), ("later", "never seen")):
        reviews = [review | {"reviewerID": f"{name}{i}", "asin": asin} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, reviews)))
    tree: dict[str, Any] = {
        "name": "first",
        "source": {"kind": "amazon2018", "reviews": "first.jsonl"},
        "tabular": {"categorical": ["product", "verified"]},
    }
    first = build(recipes.Recipe.model_validate(tree), tmp_path, tmp_path / "lake")
    tree |= {"name": "later", "fit_from": str(first), "source": tree["source"] | {"reviews": "later.jsonl"}}
    later = build(recipes.Recipe.model_validate(tree), tmp_path, tmp_path / "lake")
    tab = pl.concat([pl.read_parquet(p)["tab"].explode() for p in later.rglob("*.parquet")]).to_numpy().reshape(-1, 4)
    assert set(tab[:, 2]) == {1.0}
    assert set(tab[:, 3]) == {float(FIRST_KNOWN_ID)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("source.metdata=null", "unknown key 'source.metdata'; did you mean 'metadata'?"),
        ("split.train", "write key=value"),
        ("=3", "write key=value"),
        ("text={", "write key=value"),
        ("source.style=3", "source.style"),
    ],
)
def test_a_wrong_override_is_one_clear_error(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        recipes.load("amazon_giftcards", [override])
