"""``python -m lanistr compare``: the paper's Tables 1 and 2 for any dataset."""

import argparse
from typing import Any

from lanistr.baselines.autogluon import AutoGluon
from lanistr.baselines.ours import Pretraining
from lanistr.baselines.registry import METHODS, Setting, make_methods, unfit
from lanistr.comparison.cells import CellStore
from lanistr.comparison.grid import Splits, run_grid
from lanistr.comparison.table import Truth, make_rows, markdown, write_results
from lanistr.config import Recipe, load_recipe
from lanistr.data.reader import load_manifest
from lanistr.metrics import METRICS, find_metric


def compare_methods(arguments: argparse.Namespace) -> str:
    """Run what is missing of the grid, write ``table.md`` and ``result.json``, and return the table.

    Raises:
        ValueError: anything that a user can put right.
    """
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    metrics = [find_metric("class", name) for name in arguments.metric]
    splits = Splits.open(recipe, arguments.data)
    unlabelled, seeds = arguments.pretrain_data or arguments.data, arguments.pretrain_seeds
    pretraining = Pretraining(recipe, unlabelled, arguments.out, seeds, arguments.deepspeed)
    setting = Setting(
        recipe,
        arguments.out / "runs",
        arguments.deepspeed,
        arguments.source or pretraining,
        unlabelled,
        seeds,
        arguments.text_encoder,
        AutoGluon(arguments.autogluon_python, arguments.autogluon_config) if arguments.autogluon_python else None,
    )
    kinds = {modality.kind for modality in splits.train.modalities.values()}
    methods = make_methods(arguments.methods, kinds, setting)
    identity = identify(splits, recipe, arguments)
    identity |= {"from": str(arguments.source), "text_encoder": str(arguments.text_encoder)}
    store = CellStore(arguments.out, identity)
    metric = METRICS["class"][metrics[0]]
    cells = run_grid(methods, arguments.labels, arguments.seeds, splits, store, metric, arguments.table_only)
    rows = make_rows(cells, store, Truth.of(splits.test), metrics, arguments.ours, splits.train.manifest.name)
    text = markdown(rows, {name: entry.about for name, entry in METHODS.items()}, arguments.ours, unfit(kinds))
    write_results(arguments.out, "compare", rows, text, {"labelled": sizes(splits), "identity": identity})
    return text


def identify(splits: Splits, recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Any]:
    """What finished cells depend on."""
    return {
        "content_id": splits.train.content_id,
        "pretrain_content_id": load_manifest(arguments.pretrain_data or arguments.data, recipe.data).content_id,
        "pretrain_seeds": arguments.pretrain_seeds,
        "recipe": recipe.model_dump(mode="json"),
    }


def sizes(splits: Splits) -> dict[str, int]:
    """Labelled samples per split."""
    return {"train": len(splits.draw(None, 0)), "val": len(splits.val), "test": len(splits.test)}
