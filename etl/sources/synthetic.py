"""The demo shop: raw files of a small shop with four modalities and a label planted across them.

* ``products.parquet``: product_id, label (five customer segments), numeric weight_kg, price, rating, shelf_height_cm,
  warehouse_temperature (pure noise), categorical supplier, region, packaging, season; some cells are null.
* ``descriptions.jsonl.gz``: {"product_id", "description"}.
* ``photos/<product_id>.jpg``.
* ``sales.csv.gz``: product_id, week, variable, value; long format, irregular lengths, some weeks missing.
* ``truth.json``: what was planted, and the Bayes accuracy of every subset of modalities, by exact enumeration.

A missing modality has no line, no file, no rows. Given the label y, the factors are independent:

* text, image, tabular, series: each equals y with its share, else is uniform;
* an interaction of text and tabular: mood a (text) is uniform; bin b (tabular) is (y - a) mod 5 with its share, else
  uniform. Alone neither says anything about y.

Text shows (topic, a), the photo the image factor, the row (tabular factor, b) or nulls in their place, the series its.
"""

import gzip
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from etl.sources import synthetic_render as render

CLASSES = ("bargain", "family", "gift", "hobby", "trade")
K = len(CLASSES)
SHARES = {"text": 0.46, "image": 0.48, "tabular": 0.40, "series": 0.44}
INTERACTION = 0.65
NULL_SUPPLIER, NULL_WEIGHT = 0.05, 0.04  # these hide the tabular factor and the bin
MISSING = {"text": 0.02, "image": 0.5, "series": 0.4}
MODALITIES = ("text", "image", "tabular", "series")
SUPPLIERS = tuple(f"{stem}-{n}" for stem in ("Alder", "Birch", "Cedar", "Dahlia", "Elm") for n in range(1, 5))
REGIONS = ("north", "east", "south", "west")


def draw_factors(samples: int, seed: int) -> dict[str, np.ndarray]:
    """Label ``y`` and factors ``text image tabular series mood bin``, each (samples,) in [0, 5)."""
    rng = np.random.default_rng([seed, 1])
    y = rng.integers(0, K, samples)
    factors = {"y": y}
    for name, share in SHARES.items():
        factors[name] = np.where(rng.random(samples) < share, y, rng.integers(0, K, samples))
    factors["mood"] = rng.integers(0, K, samples)
    told = rng.random(samples) < INTERACTION
    factors["bin"] = np.where(told, (y - factors["mood"]) % K, rng.integers(0, K, samples))
    return factors


def _planted(share: float) -> np.ndarray:
    """P(factor | y), (y, factor)."""
    return share * np.eye(K) + (1 - share) / K


def bayes_accuracy(subset: tuple[str, ...]) -> float:
    """Accuracy of the best possible classifier that sees these modalities, all present: sum of max_y P(y, seen)."""
    seen: list[np.ndarray] = []  # each P(observation | y), (y, outcomes)
    for name in subset:
        table = _planted(SHARES[name])
        if name == "tabular":  # a null supplier is a sixth outcome
            table = np.hstack([table * (1 - NULL_SUPPLIER), np.full((K, 1), NULL_SUPPLIER)])
        seen.append(table)
    if {"text", "tabular"} <= set(subset):
        y, mood, bin_ = np.ogrid[:K, :K, :K]
        pair = (INTERACTION * ((mood + bin_) % K == y) + (1 - INTERACTION) / K) / K
        known = pair.reshape(K, -1) * (1 - NULL_WEIGHT)
        seen.append(np.hstack([known, np.full((K, 1), NULL_WEIGHT)]))  # a null weight: the mood alone says nothing
    joint = np.full((K, 1), 1 / K)
    for table in seen:
        joint = (joint[:, :, None] * table[:, None, :]).reshape(K, -1)
    return float(joint.max(axis=0).sum())


def bayes_with_missing(missing: Mapping[str, float]) -> float:
    """Expected Bayes accuracy over the presence patterns that these missing rates produce."""
    total = 0.0
    for present in itertools.product((False, True), repeat=len(MODALITIES)):
        chance = 1.0
        for name, here in zip(MODALITIES, present, strict=True):
            rate = missing.get(name, 0.0)
            chance *= 1 - rate if here else rate
        if chance:
            total += chance * bayes_accuracy(tuple(n for n, here in zip(MODALITIES, present, strict=True) if here))
    return total


def truth(samples: int, seed: int, missing: Mapping[str, float]) -> dict[str, object]:
    """The contents of ``truth.json``."""
    subsets = [s for size in range(1, 5) for s in itertools.combinations(MODALITIES, size)]
    bayes = {"+".join(s): bayes_accuracy(s) for s in subsets}
    return {
        "samples": samples,
        "seed": seed,
        "missing": dict(missing),
        "classes": list(CLASSES),
        "shares": SHARES,
        "interaction": {"modalities": ["text", "tabular"], "share": INTERACTION},
        "null_rates": {"supplier": NULL_SUPPLIER, "weight_kg": NULL_WEIGHT},
        "noise_columns": ["warehouse_temperature"],
        "bayes_accuracy": bayes,
        "bayes_accuracy_with_missing": bayes_with_missing(missing),
        "best_single": max(MODALITIES, key=lambda m: bayes[m]),
    }


def generate(out: Path, samples: int = 6000, seed: int = 0, missing: Mapping[str, float] | None = None) -> None:
    """Write the shop into ``out``; same arguments, same bytes. An ``out`` with the same shop is left as it is.

    Args:
        out: folder.
        samples: number of products, at least 50.
        seed: of everything.
        missing: share of products without ``text``, ``image``, ``series``; absent keys keep their default.

    Raises:
        ValueError: an argument out of range, or ``out`` holds something else.
    """
    rates = {**MISSING, **(missing or {})}
    unknown = sorted(set(rates) - set(MISSING))
    if unknown:
        raise ValueError(f"--missing {unknown[0]}: allowed are {', '.join(MISSING)} (tabular is always there)")
    wrong = [f"{name}={rate}" for name, rate in rates.items() if not 0 <= rate < 1]
    if wrong:
        raise ValueError(f"--missing {wrong[0]}: a rate is at least 0 and below 1")
    if samples < 50:
        raise ValueError(f"--samples {samples}: at least 50")
    planted = json.dumps(truth(samples, seed, rates), indent=1) + "\n"
    if out.exists() and any(out.iterdir()):
        there = out / "truth.json"
        if there.is_file() and there.read_text(encoding="utf-8") == planted:
            print(f"{out}: these {samples} products are there already")
            return
        raise ValueError(f"{out} is not empty and holds something else; remove it or give another --out")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "photos").mkdir(parents=True)
    _write_all(temporary, samples, seed, rates)
    (temporary / "truth.json").write_text(planted, encoding="utf-8")
    if out.exists():
        out.rmdir()
    os.replace(temporary, out)


def _write_all(out: Path, samples: int, seed: int, missing: Mapping[str, float]) -> None:
    factors = draw_factors(samples, seed)
    ids = [_product_id(seed, i) for i in range(samples)]
    rng = np.random.default_rng([seed, 2])
    present = {name: rng.random(samples) >= rate for name, rate in missing.items()}
    _write_products(out / "products.parquet", ids, factors, seed)
    with _gzip(out / "descriptions.jsonl.gz") as file:
        for i in np.flatnonzero(present["text"]):
            text = render.description(int(factors["text"][i]), int(factors["mood"][i]), _rng(seed, 3, i))
            file.write((json.dumps({"product_id": ids[i], "description": text}) + "\n").encode())
    with _gzip(out / "sales.csv.gz") as file:
        file.write(b"product_id,week,variable,value\n")
        for i in np.flatnonzero(present["series"]):
            file.writelines(_sales_lines(ids[i], int(factors["series"][i]), _rng(seed, 4, i)))
    photos = np.flatnonzero(present["image"])
    for done, i in enumerate(photos):
        (out / "photos" / f"{ids[i]}.jpg").write_bytes(render.photo(int(factors["image"][i]), _rng(seed, 5, i)))
        if done % 1000 == 999:
            print(f"photos: {done + 1} of {len(photos)}", flush=True)


def _product_id(seed: int, i: int) -> str:
    return "P" + hashlib.sha256(f"{seed}:{i}".encode()).hexdigest()[:10]


def _rng(*key: int | np.integer) -> np.random.Generator:
    return np.random.default_rng([int(k) for k in key])


def _gzip(path: Path) -> gzip.GzipFile:
    return gzip.GzipFile(filename="", mode="wb", fileobj=open(path, "wb"), mtime=0)


def _sales_lines(product: str, pattern: int, rng: np.random.Generator) -> Iterator[bytes]:
    series = render.sales(pattern, rng)
    kept = np.flatnonzero(rng.random(len(series["units_sold"])) >= 0.05)
    for week in kept:
        for variable in render.VARIABLES:
            yield f"{product},{week},{variable},{series[variable][week]}\n".encode()


def _write_products(path: Path, ids: list[str], factors: Mapping[str, np.ndarray], seed: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng([seed, 6])
    n = len(ids)
    # Bin b of the weight is [2 b, 2 b + 1.5): gaps keep it readable after rounding.
    weight = (2 * factors["bin"] + rng.uniform(0, 1.5, n)).round(3)
    no_weight = rng.random(n) < NULL_WEIGHT
    # The price follows the weight; of a null weight it must not tell the bin.
    priced = np.where(no_weight, rng.uniform(0, 2 * K, n), weight)
    supplier = factors["tabular"] * 4 + rng.integers(0, 4, n)
    region = np.where(rng.random(n) < 0.7, supplier % 4, rng.integers(0, 4, n))
    columns = {
        "product_id": pa.array(ids),
        "label": pa.array([CLASSES[y] for y in factors["y"]]),
        "weight_kg": _nullable(weight, no_weight),
        "price": _nullable((5 + 3 * priced + rng.gamma(2, 2, n)).round(2), rng.random(n) < 0.03),
        "rating": _nullable(np.clip(rng.normal(4, 0.7, n), 1, 5).round(1), rng.random(n) < 0.1),
        "shelf_height_cm": pa.array(rng.uniform(10, 200, n).round(1)),
        "warehouse_temperature": pa.array(rng.normal(18, 3, n).round(2)),
        "supplier": _nullable(np.array(SUPPLIERS)[supplier], rng.random(n) < NULL_SUPPLIER),
        "region": pa.array(np.array(REGIONS)[region].tolist()),
        "packaging": pa.array(rng.choice(["box", "bag", "tube"], n).tolist()),
        "season": _nullable(rng.choice(["spring", "summer", "autumn", "winter"], n), rng.random(n) < 0.05),
    }
    pq.write_table(pa.table(columns), path, compression="zstd")


def _nullable(values: np.ndarray, null: np.ndarray) -> object:
    import pyarrow as pa

    return pa.array(values.tolist(), mask=null)
