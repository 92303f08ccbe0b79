"""How long one record takes to answer: from raw values to probabilities, with the demo shop's model and raw files.

``python benchmarks/predict.py --out results.json``. The weights are random: they do not change the time. p50 and p95 of
one record at a time, a row per subset of modalities; images are read from disk and decoded.
"""

import argparse
import csv
import gzip
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._harness import write_result
from etl import recipe as recipes
from etl.build import build
from etl.sources import synthetic
from lanistr.config import load_recipe
from lanistr.data.reader import load_tokenizer_bytes
from lanistr.export import export_run
from lanistr.manifest import Manifest
from lanistr.predict import Predictor
from lanistr.predict_file import latency
from lanistr.training.checkpoint import WEIGHTS, named_tensors, save_weights
from lanistr.training.finetune import make_task
from lanistr.training.run import describe_run

TABLE = ["weight_kg", "price", "rating", "supplier", "region"]
SUBSETS = {
    "text": ["text"],
    "tabular": TABLE,
    "image": ["image"],
    "timeseries": ["timeseries"],
    "all": ["text", "image", "timeseries", *TABLE],
}


def make_predictor(folder: Path) -> tuple[Predictor, list[dict[str, Any]]]:
    """The demo recipe's model for a small demo shop, and the raw records that have everything."""
    synthetic.generate(folder / "raw", samples=400)
    gold = build(recipes.load("demo"), folder / "raw", folder / "lake")
    recipe, manifest = load_recipe("demo"), Manifest.load(gold)
    task = make_task(recipe, manifest, "cpu")
    extra = {"task": "finetune", "from": None, "n_labels": 0}
    describe_run(folder / "run", recipe, manifest, {}, extra, load_tokenizer_bytes(gold, recipe.data, manifest))
    save_weights(folder / "run" / "best" / WEIGHTS, {n: t.detach().clone() for n, t in named_tensors(task).items()})
    (folder / "run" / "best" / "best.json").write_text('{"step": 0}', encoding="utf-8")
    return Predictor.from_pretrained(export_run(folder / "run", folder / "model")), read_shop(folder / "raw")


def read_shop(raw: Path) -> list[dict[str, Any]]:
    """The products of which everything is there."""
    texts: dict[str, str] = {}
    points: dict[str, list[tuple[float, str, float]]] = defaultdict(list)
    with gzip.open(raw / "descriptions.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = {row["product_id"]: row["description"] for row in map(json.loads, file)}
    with gzip.open(raw / "sales.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            points[row["product_id"]].append((float(row["week"]), row["variable"], float(row["value"])))
    records = []
    for product in pq.read_table(raw / "products.parquet").to_pylist():
        name = product["product_id"]
        photo = raw / "photos" / f"{name}.jpg"
        if name in texts and name in points and photo.is_file():
            records.append({**product, "text": texts[name], "timeseries": points[name], "image": str(photo)})
    return records


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="How long one record takes to answer.")
    parser.add_argument("--records", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        predictor, records = make_predictor(Path(folder))
        for case, keys in SUBSETS.items():
            chosen = [{key: record[key] for key in keys} for record in records[: arguments.records]]
            rows.append({"case": f"demo/one record/{case}", "ours": latency(predictor, chosen, arguments.rounds)})
            print(rows[-1], flush=True)
    write_result(arguments.out, "predict", rows)


if __name__ == "__main__":
    main()
