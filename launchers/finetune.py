"""Fine-tune: ``deepspeed launchers/finetune.py --deepspeed ds_configs/zero2.json --from RUN --data GOLD --run RUN2``."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launchers import common


def run(arguments: argparse.Namespace) -> None:
    """Call the library."""
    from lanistr.config import load_recipe

    source = None if arguments.source == "none" else Path(arguments.source)
    name, overrides = arguments.recipe, list(arguments.overrides)
    if source is not None and (source / "recipe.yaml").is_file() and not arguments.recipe_given:
        name = str(source / "recipe.yaml")  # the same model as in pretraining
    if source is None:
        overrides.insert(0, "finetune.freeze=none")
    if arguments.seed is not None:
        overrides.append(f"finetune.seed={arguments.seed}")
    if arguments.freeze:
        one = arguments.freeze in ("encoders", "none")
        overrides.append(f"finetune.freeze={arguments.freeze if one else f'[{arguments.freeze}]'}")
    recipe = load_recipe(name, overrides)
    data = common.dataset(arguments.data, recipe.name)

    from lanistr.training.finetune import finetune

    finetune(
        recipe,
        data,
        arguments.run,
        arguments.deepspeed,
        source=source,
        labels=arguments.labels,
        resume=arguments.resume,
    )


def parse() -> argparse.Namespace:
    """The command line."""
    made = common.parser("Fine-tune LANISTR for what the dataset's target is.")
    made.add_argument("--from", dest="source", required=True, help="pretraining run, or none = from scratch")
    made.add_argument(
        "--labels", type=common.label_count, default=None, help="labelled samples: a number or all (default)"
    )
    made.add_argument("--seed", type=int, help="of the draw of labels, the new parameters and the order")
    made.add_argument(
        "--freeze", metavar="PARTS", help="encoders, none, or for example text,fusion (default: the recipe's)"
    )
    arguments = made.parse_intermixed_args()
    arguments.recipe_given = any(a.startswith("--recipe") for a in sys.argv)
    if arguments.run is None:
        made.error("--run RUN is needed")
    return arguments


if __name__ == "__main__":
    parsed = parse()
    common.main_of_ranks(lambda: run(parsed))
