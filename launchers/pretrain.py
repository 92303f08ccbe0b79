"""Pretrain: ``deepspeed launchers/pretrain.py --deepspeed ds_configs/zero2.json``."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launchers import common


def run(arguments: argparse.Namespace) -> None:
    """Call the library."""
    from lanistr.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    given = arguments.data or (Path(recipe.data.path) if recipe.data.path else None)
    data = common.dataset(given, recipe.name)

    from lanistr.training.pretrain import pretrain

    folder = arguments.run or Path("runs") / recipe.name
    pretrain(recipe, data, folder, arguments.deepspeed, resume=arguments.resume)


if __name__ == "__main__":
    parsed = common.parser("Pretrain LANISTR.").parse_intermixed_args()
    common.main_of_ranks(lambda: run(parsed))
