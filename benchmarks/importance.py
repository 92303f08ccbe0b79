"""Does importance find what was planted, and do its intervals hold? On shops that the demo's generator makes anew.

``python benchmarks/importance.py --from RUN --data GOLD --sets 20 --labels 200 500 --out results.json``. RUN is a pretraining
run on GOLD (the demo). Each set is another shop, built with GOLD's tokenizer and fit, and measured with each number of labels
as `lanistr.evaluation.importance` measures it, and with the least of them once more with the planted factors in the place of
all that is read from texts, images and series: what that has and the first has not is a matter of reading, what neither has
is a matter of the probe and the labels. The result file grows set by set.

An interval of a Shapley value is right where it holds the value expected of other samples of that number: the mean over the
sets.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._harness import write_result
from etl import recipe as recipes
from etl.build import build
from etl.sources import synthetic
from lanistr.config import load_recipe
from lanistr.data.reader import open_split
from lanistr.evaluation.importance import measure
from lanistr.evaluation.material import Material, gather
from lanistr.evaluation.shapley import interactions, shapley_values
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities

K = synthetic.K
OF = {"text": "text", "image": "image", "tabular": "tabular", "timeseries": "series"}  # modality -> planted factor
NULL_COLUMNS = ("rating", "shelf_height_cm", "warehouse_temperature", "packaging", "season")  # independent of the label


def brier_skill(subset: frozenset[str]) -> float:
    """Share of the variance of the one-hot label that the best possible classifier explains, all modalities present."""
    tables = []
    for name in subset:
        share = synthetic.SHARES[OF[name]]
        table = share * np.eye(K) + (1 - share) / K
        if name == "tabular":
            null = np.full((K, 1), synthetic.NULL_SUPPLIER)
            table = np.hstack([table * (1 - synthetic.NULL_SUPPLIER), null])
        tables.append(table)
    if {"text", "tabular"} <= subset:
        y, mood, bin_ = np.ogrid[:K, :K, :K]
        share = synthetic.INTERACTION
        pair = ((share * ((mood + bin_) % K == y) + (1 - share) / K) / K).reshape(K, -1)
        tables.append(np.hstack([pair * (1 - synthetic.NULL_WEIGHT), np.full((K, 1), synthetic.NULL_WEIGHT)]))
    joint = np.full((K, 1), 1 / K)
    for table in tables:
        joint = (joint[:, :, None] * table[:, None, :]).reshape(K, -1)
    chance = joint.sum(0)
    return float(1 - (chance * (1 - ((joint / chance) ** 2).sum(0))).sum() / (1 - 1 / K))


def planted_game() -> dict[frozenset[str], float]:
    """Value of every subset with the shop's missing modalities, for the best possible classifier."""
    values = {}
    for size in range(len(OF) + 1):
        for subset in map(frozenset, itertools.combinations(OF, size)):
            total = 0.0
            for there in itertools.product((False, True), repeat=len(OF)):
                present = {name for name, here in zip(OF, there, strict=True) if here}
                rates = [synthetic.MISSING.get(OF[name], 0.0) for name in OF]
                chance = np.prod([1 - rate if here else rate for rate, here in zip(rates, there, strict=True)])
                total += float(chance) * (brier_skill(subset & present) if subset & present else 0.0)
            values[subset] = total
    return values


def make_set(folder: Path, like: Path, samples: int, seed: int) -> Path:
    """Another shop as a gold dataset, with the tokenizer and the fit of the one that the run was trained on."""
    synthetic.generate(folder / "raw", samples=samples, seed=seed)
    recipe = recipes.load("demo").model_copy(update={"fit_from": str(like)})
    return build(recipe, folder / "raw", folder / "lake")


def materials(run: Path, gold: Path, samples: int, labels: list[int], seed: int) -> Iterator[tuple[str, int, Material]]:
    """What the probe sees of one set: as it is with each number of labels, and with the planted factors with the least."""
    recipe = load_recipe(str(run / "recipe.yaml"))
    modalities = make_modalities(Manifest.load(gold), recipe.model.modalities)
    dataset = open_split(gold, "train", modalities, recipe.data)
    labelled = dataset.labelled(max(labels), seed)
    embedded = gather(run, recipe, dataset, labelled, seed)
    others = np.setdiff1d(np.arange(dataset.n), labelled)
    rng = np.random.default_rng([seed, 2])  # the same samples as `gather`
    positions = np.concatenate([labelled, np.sort(rng.permutation(others))])[: len(embedded.fused)]
    row_N = np.concatenate([dataset.index.column(shard, "source_row") for shard in range(len(dataset.shards))])
    factors = synthetic.draw_factors(samples, seed)
    hot = {name: np.eye(K)[values[row_N[positions] - 1]] for name, values in factors.items()}
    assert (hot["y"][: len(labelled)].argmax(1) == dataset.label[labelled]).all(), "factors of other samples"
    features = {name: hot[factor] for name, factor in OF.items()}
    features["text"] = np.concatenate([hot["text"], hot["mood"]], axis=1)
    features["tabular"] = np.zeros((len(positions), 1))  # the columns say it all
    planted = replace(embedded, features=features, plain={})
    for count in labels:  # the samples whose labels go stay among those that shape the features
        truth = embedded.truth.take(np.arange(count))
        yield "as it is", count, replace(embedded, truth=truth)
        if count == min(labels):
            yield "planted factors", count, replace(planted, truth=truth)


def summarise(arm: str, labels: int, found: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """One row of the result."""
    game = planted_game()
    planted, planted_pairs = shapley_values(game, list(OF)), interactions(game, list(OF))
    shapley = {m: _collect(found, "shapley", "modality", m) for m in OF}
    columns = {row["column"]: _collect(found, "columns", "column", row["column"]) for row in found[0]["columns"]}
    orders = [[row["modality"] for row in one["shapley"]] for one in found]
    column_orders = [[row["column"] for row in one["columns"]] for one in found]
    finds = [[row["pair"] for row in one["column_pairs"] if row["found"]] for one in found]
    pair = [next(row for row in one["pairs"] if set(row["pair"]) == {"text", "tabular"}) for one in found]
    return {
        "case": f"{arm}/labels={labels}",
        "comparator": "planted",
        "sets": len(found),
        "seconds": seconds,
        "shapley": {m: {**_spread(rows), "planted": float(planted[m])} for m, rows in shapley.items()},
        "coverage": float(np.mean([_coverage(rows) for rows in shapley.values()])),
        "planted_order": _order(planted),
        "mean_order": sorted(OF, key=lambda m: -np.mean([row["value"] for row in shapley[m]])),
        "text_then_tabular_then_the_others": float(np.mean([order[:2] == ["text", "tabular"] for order in orders])),
        "order_told": _told(found, planted),
        "columns": {c: _spread(rows) for c, rows in columns.items()},
        "mean_column_order": sorted(columns, key=lambda c: -np.mean([row["value"] for row in columns[c]])),
        "informative_columns_above_all_null_ones": float(np.mean([_informative_first(one) for one in column_orders])),
        "last_column_is_null": float(np.mean([order[-1] in NULL_COLUMNS for order in column_orders])),
        "noise_column_interval_holds_zero": float(
            np.mean([_holds(row, 0.0) for row in columns["warehouse_temperature"]])
        ),
        "text_tabular_index": {**_spread(pair), "planted": float(planted_pairs["text", "tabular"])},
        "text_tabular_strongest": float(
            np.mean([set(one["pairs"][0]["pair"]) == {"text", "tabular"} for one in found])
        ),
        "text_weight_found": float(np.mean([["text", "tabular/weight_kg"] in pairs for pairs in finds])),
        "other_pairs_found": [p for pairs in finds for p in pairs if p != ["text", "tabular/weight_kg"]],
    }


def _told(found: list[dict[str, Any]], planted: Mapping[str, Any]) -> dict[str, Any]:
    """How often the tool says which of two modalities is worth more, and how often that is so; not of the two equal ones."""
    rows = [row for one in found for row in one["order"] if not {"image", "timeseries"} >= set(row["pair"])]
    right = [float(planted[row["pair"][0]]) > float(planted[row["pair"][1]]) for row in rows]
    told = [ok for ok, row in zip(right, rows, strict=True) if row["told"]]
    return {"asked": len(rows), "told": len(told), "told_right": sum(told), "all_right": sum(right)}


def _informative_first(order: list[str]) -> bool:
    """Whether supplier and weight come before every column that is independent of the label."""
    return max(order.index(c) for c in ("supplier", "weight_kg")) < min(order.index(c) for c in NULL_COLUMNS)


def _collect(found: list[dict[str, Any]], table: str, key: str, name: str) -> list[dict[str, Any]]:
    return [next(row for row in one[table] if row[key] == name) for one in found]


def _order(values: Mapping[str, Any]) -> list[str]:
    return sorted(values, key=lambda name: -float(values[name]))


def _holds(row: Mapping[str, Any], value: float) -> bool:
    return row["ci95"][0] <= value <= row["ci95"][1]


def _coverage(rows: list[dict[str, Any]]) -> float:
    mean = float(np.mean([row["value"] for row in rows]))
    return float(np.mean([_holds(row, mean) for row in rows]))


def _spread(rows: list[dict[str, Any]]) -> dict[str, float]:
    values = [row["value"] for row in rows]
    half = [(row["ci95"][1] - row["ci95"][0]) / 2 for row in rows]
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)),
        "half_interval": float(np.mean(half)),
        "coverage": _coverage(rows),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Does importance find what was planted, and do its intervals hold?")
    parser.add_argument("--from", dest="source", type=Path, required=True, help="pretraining run on the demo shop")
    parser.add_argument("--data", type=Path, required=True, help="the demo's gold dataset")
    parser.add_argument("--sets", type=int, default=20, help="at least 2")
    parser.add_argument("--samples", type=int, default=1200, help="products per set")
    parser.add_argument("--labels", type=int, nargs="+", default=[200, 500])
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.sets < 2:
        parser.error("--sets: at least 2")
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    seconds: dict[tuple[str, int], float] = {}
    rows: list[dict[str, Any]] = []
    for number in range(arguments.sets):
        for key, one, spent in measure_set(arguments, 1000 + number):
            found.setdefault(key, []).append(one)
            seconds[key] = seconds.get(key, 0.0) + spent
            order = ", ".join(f"{row['modality']} {row['value']:.3f}" for row in one["shapley"])
            print(f"set {number}  {key[0]}, {key[1]} labels: {order}", flush=True)
        if number:
            rows = [summarise(*key, many, seconds[key] / len(many)) for key, many in found.items()]
            write_result(arguments.out, "importance", rows)
    for row in rows:
        right = row["text_then_tabular_then_the_others"]
        print(f"{row['case']}: coverage {row['coverage']:.2f}, order {row['mean_order']}, in {right:.0%} of the sets")


def measure_set(arguments: argparse.Namespace, seed: int) -> Iterator[tuple[tuple[str, int], dict[str, Any], float]]:
    """Arm and labels, what was measured, and CPU seconds, of one set."""
    with tempfile.TemporaryDirectory() as folder:
        gold = make_set(Path(folder), arguments.data.resolve(), arguments.samples, seed)
        for arm, labels, material in materials(arguments.source, gold, arguments.samples, arguments.labels, seed):
            start = time.process_time()
            one = measure(material, arguments.draws, seed)
            yield (arm, labels), one, time.process_time() - start


if __name__ == "__main__":
    main()
