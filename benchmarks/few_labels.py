"""Does pretraining pay with few labels? The same model, fine-tuned from a run and from scratch, on the same draws.

``python benchmarks/few_labels.py --from RUN --data GOLD --labels 50,200,800 --seeds 5 --work DIR --out results.json``.

Nothing is frozen in either arm; each is trained for about the same number of steps whatever the labels, keeps its best step
on validation, and reads the test split once per model. Everything else is the recipe of the run. Finished models' answers are
kept in ``--work``, and the result file grows seed by seed. With ``--truth truth.json`` of the demo's data the rows say
what is reachable.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._harness import ROOT, write_result
from lanistr.baselines.ours import LanistrMethod
from lanistr.comparison.cells import CellStore
from lanistr.comparison.command import label_counts, names, prepare
from lanistr.comparison.compare import identify
from lanistr.comparison.grid import Splits, run_grid
from lanistr.comparison.table import Truth, make_rows, markdown
from lanistr.config import Recipe, load_recipe
from lanistr.metrics import METRICS
from lanistr.training import distributed
from lanistr.training.engine import start
from lanistr.training.lifeline import end_process

METRIC = "accuracy"
ABOUT = {
    "pretrained": "fine-tuned from the run",
    "pretrained_parts": "fine-tuned from the parts of the run that --parts names, the others fresh",
    "scratch": "the same model without it",
}
ZERO = ROOT / "ds_configs" / "zero2.json"


def schedule(recipe: Recipe, labels: int, steps: int, looks: int) -> Recipe:
    """The recipe with about ``steps`` updates on ``labels`` samples, and ``looks`` validations, the last one at the end."""
    per_epoch = labels // recipe.finetune.global_batch
    if not per_epoch:
        raise ValueError(f"{labels} labels are less than a batch; give finetune.global_batch={labels} or fewer")
    eval_every = max(1, round(steps / looks / per_epoch))
    epochs = eval_every * max(1, round(steps / (eval_every * per_epoch)))
    changes = {"epochs": epochs, "max_steps": None, "eval_every": eval_every, "freeze": "none", "save_every": 1 << 30}
    return recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update=changes)})


def compare(arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """After each seed a row per label count and arm: accuracy, interval, paired test of pretraining against none."""
    recipe = load_recipe(str(arguments.source / "recipe.yaml"), arguments.overrides)
    splits = Splits.open(recipe, arguments.data)
    identity = identify(splits, recipe, arguments) | {"steps": arguments.steps, "from": str(arguments.source)}
    store = CellStore(arguments.work, identity | {"looks": arguments.looks})
    everything = len(splits.draw(None, 0))
    by_labels = {
        labels: arms(schedule(recipe, labels or everything, arguments.steps, arguments.looks), arguments)
        for labels in arguments.labels
    }
    start()  # once for all grids: a second process group in one process does not fit
    for seeds in range(1, arguments.seeds + 1):
        cells = [
            cell
            for labels, methods in by_labels.items()
            for cell in run_grid(methods, [labels], seeds, splits, store, METRICS["class"][METRIC])
        ]
        rows = make_rows(cells, store, Truth.of(splits.test), [METRIC], "pretrained", splits.train.manifest.name)
        print(markdown(rows, ABOUT, "pretrained"), flush=True)
        yield [row | _reachable(arguments.truth, row["mean"]) for row in rows]
    distributed.shutdown()


def arms(recipe: Recipe, arguments: argparse.Namespace) -> dict[str, LanistrMethod]:
    """The models to train."""
    found = {"pretrained": (recipe, arguments.source), "scratch": (recipe, None)}
    if arguments.parts:
        tuned = recipe.finetune.model_copy(update={"transfer": arguments.parts})
        found["pretrained_parts"] = (recipe.model_copy(update={"finetune": tuned}), arguments.source)
    return {
        arm: LanistrMethod(own, arguments.work / "runs" / arm, ZERO, source) for arm, (own, source) in found.items()
    }


def _reachable(truth: Path | None, accuracy: float) -> dict[str, float]:
    if truth is None:
        return {}
    bayes = json.loads(truth.read_text(encoding="utf-8"))["bayes_accuracy_with_missing"]
    return {"bayes_accuracy": bayes, "below_bayes": bayes - accuracy}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Does pretraining pay with few labels?")
    parser.add_argument("--from", dest="source", type=Path, required=True, help="pretraining run")
    parser.add_argument("--data", type=Path, required=True, help="gold dataset")
    parser.add_argument("--labels", type=label_counts, default=[50, 200, 800], help="for example 50,200,800,all")
    parser.add_argument(
        "--parts", type=names, help="a third arm that takes only these parts of the run (finetune.transfer)"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="updates of each model, whatever the labels")
    parser.add_argument("--looks", type=int, default=5, help="validations in these steps")
    parser.add_argument("--truth", type=Path, help="truth.json of the demo's data")
    parser.add_argument("--work", type=Path, required=True, help="finished models' answers go here")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for example finetune.lr=1e-3")
    arguments = parser.parse_args()
    arguments.pretrain_data, arguments.pretrain_seeds = None, 1
    prepare(verbose=False)
    logging.getLogger("lanistr.comparison").setLevel(logging.INFO)
    for rows in compare(arguments):
        write_result(arguments.out, "few_labels", rows)


if __name__ == "__main__":
    main()
    end_process(0)
