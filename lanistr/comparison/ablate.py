"""``python -m lanistr ablate``: the paper's Tables 3 and 4 for any dataset: what each part of LANISTR is worth."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lanistr.baselines import Method
from lanistr.baselines.frozen import FrozenLanistr
from lanistr.baselines.ours import LanistrMethod, Pretraining
from lanistr.comparison.cells import CellStore
from lanistr.comparison.compare import identify, sizes
from lanistr.comparison.grid import Splits, run_grid
from lanistr.comparison.table import Truth, make_rows, markdown, write_results
from lanistr.config import Recipe, load_recipe
from lanistr.metrics import METRICS, find_metric

FULL, SCRATCH = "full", "unlabelled_0"
PERCENTS = (25, 50, 75)


def ablate(arguments: argparse.Namespace) -> str:
    """Run what is missing of the grid, write ``table.md`` and ``result.json``, and return the table.

    Raises:
        ValueError: anything that a user can put right.
    """
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    metrics = [find_metric("class", name) for name in arguments.metric]
    splits = Splits.open(recipe, arguments.data)
    terms = {name: modality.term for name, modality in splits.train.modalities.items()}
    arms = make_arms(recipe, terms)
    recipes, about = choose(arms, arguments.arms), {name: text for name, (text, _) in arms.items()}
    data = arguments.pretrain_data or arguments.data
    methods = {
        name: make_method(
            name, changed, data, arguments.out, arguments.pretrain_seeds, arguments.deepspeed, arguments.frozen
        )
        for name, changed in recipes.items()
    }
    identity = identify(splits, recipe, arguments) | {"frozen": arguments.frozen}
    store = CellStore(arguments.out, identity)
    metric = METRICS["class"][metrics[0]]
    cells = run_grid(methods, arguments.labels, arguments.seeds, splits, store, metric, arguments.table_only)
    rows = make_rows(cells, store, Truth.of(splits.test), metrics, FULL, splits.train.manifest.name)
    text = markdown(rows, about, FULL)
    write_results(arguments.out, "ablate", rows, text, {"labelled": sizes(splits), "identity": identity})
    return text


def make_arms(recipe: Recipe, terms: Mapping[str, str]) -> dict[str, tuple[str, Recipe]]:
    """What is left out, in words, and the recipe without it, by name.

    Args:
        recipe: the whole.
        terms: of its reconstruction loss, by modality of the dataset.
    """
    arms = {FULL: ("LANISTR", recipe)}
    if len(terms) > 1:
        for name in terms:
            arms[f"without_{name}"] = (f"without the modality {name}", _without_modality(recipe, name))
    learnt = [term for name, term in terms.items() if name not in recipe.pretrain.freeze]  # what is frozen has no loss
    for term in dict.fromkeys([*learnt, "mmm"]):
        if recipe.objective.weights.get(term):
            weights = {**recipe.objective.weights, term: 0.0}
            arms[f"without_{term}"] = (f"pretrained without the loss {term}", _aiming(recipe, {"weights": weights}))
    for extension, off in (("cross", []), ("decorrelation", 0.0)):
        if getattr(recipe.objective, extension):
            arms[f"without_{extension}"] = (f"pretrained without {extension}", _aiming(recipe, {extension: off}))
    only_complete = {"complete_only": True}
    arms["without_nonparallel"] = (
        "pretrained on samples that have every modality", _pretrained(recipe, only_complete),
    )  # fmt: skip
    arms[SCRATCH] = ("not pretrained: 0 % of the unlabelled data", recipe)
    for percent in PERCENTS:
        share = {"share": percent / 100}
        arms[f"unlabelled_{percent}"] = (f"pretrained on {percent} % of train", _pretrained(recipe, share))
    return arms


def choose(arms: Mapping[str, tuple[str, Recipe]], names: Sequence[str] | None) -> dict[str, Recipe]:
    """The recipes of the arms asked for; None = of all. Raises ValueError for an unknown one."""
    for name in names or []:
        if name not in arms:
            raise ValueError(f"arm {name!r}: there are {', '.join(arms)}")
    return {name: arms[name][1] for name in names or arms}


def make_method(
    name: str, recipe: Recipe, data: Path, out: Path, seeds: int, ds_config: Path, frozen: bool = False
) -> Method:
    """An arm, with pretraining runs of its own; fine-tuned, or frozen under a logistic regression."""
    folder = out / "runs" / name
    source = None if name == SCRATCH else Pretraining(recipe, data, folder, seeds, ds_config)
    return FrozenLanistr(recipe, source) if frozen else LanistrMethod(recipe, folder, ds_config, source)


def _without_modality(recipe: Recipe, name: str) -> Recipe:
    kept = {n: block for n, block in recipe.model.modalities.items() if n != name}
    crossing = [other for other in recipe.objective.cross if other != name]
    objective = recipe.objective.model_copy(update={"cross": crossing if len(crossing) > 1 else []})
    model = recipe.model.model_copy(update={"modalities": kept})
    changed = recipe.model_copy(update={"model": model, "objective": objective})
    if name not in recipe.pretrain.freeze:
        return changed
    frozen = [other for other in recipe.pretrain.freeze if other != name]
    return _pretrained(changed, {"freeze": frozen, "cache": recipe.pretrain.cache if frozen else False})


def _aiming(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    return recipe.model_copy(update={"objective": recipe.objective.model_copy(update=changes)})


def _pretrained(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    return recipe.model_copy(update={"pretrain": recipe.pretrain.model_copy(update=changes)})
