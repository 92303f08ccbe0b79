"""A small grid of fine-tuning settings, judged on the validation split; goes on where it stopped."""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lanistr.config import Recipe, load_recipe
from lanistr.metrics import goodness

KEYS = {"lr": "lr", "batch": "global_batch", "decay": "weight_decay", "freeze": "freeze"}  # option -> finetune.<key>
Cell = dict[str, Any]
Run = Callable[[Recipe, Path, bool], None]


def grid(options: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Every combination, in the order given; an option without values stays as the recipe has it."""
    given = {name: values for name, values in options.items() if values}
    return [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())] if given else []


def tune(recipe: Recipe, cells: Sequence[Cell], out: Path, run: Run) -> dict[str, Any]:
    """Fine-tune each cell that is not done, and write ``tune.json`` and ``best.yaml``, the recipe of the best one.

    A cell's folder is named by its settings, so that another grid into the same ``out`` takes over what is there. No cell
    sees the test split.

    Args:
        recipe: what the cells change.
        cells: from `grid`.
        out: folder.
        run: fine-tunes a recipe into a folder; True = go on from its newest checkpoint.

    Returns:
        The contents of ``tune.json``.

    Raises:
        ValueError: no cells; a cell that another recipe made.
    """
    if not cells:
        raise ValueError("nothing to tune: give values for at least one of " + ", ".join(f"--{name}" for name in KEYS))
    from lanistr.training.checkpoint import find_latest

    rows = []
    for i, cell in enumerate(cells):
        folder = out / "cells" / cell_name(cell)
        own = _apply(recipe, cell)
        _check_recipe(folder, own)
        done = (folder / "summary.json").is_file()
        print(f"cell {i + 1}/{len(cells)}: {cell_name(cell)}{' (done)' if done else ''}", file=sys.stderr, flush=True)
        if not done:
            run(own, folder, find_latest(folder) is not None)
            if not (folder / "summary.json").is_file():
                raise ValueError(f"{folder}: stopped by a signal, saved; the same command goes on")
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        metric = summary["metric"]
        rows.append({"cell": cell, "metric": metric, "value": summary["best"][metric], "step": summary["best"]["step"]})
        _write(out / "tune.json", json.dumps({"split": "val", "cells": rows}, indent=1) + "\n")
    best = max(rows, key=lambda row: goodness(row["metric"], row["value"]))
    found = {"split": "val", "best": best, "cells": rows}
    tree = _apply(recipe, best["cell"]).model_dump(mode="json")
    _write(out / "best.yaml", yaml.safe_dump(tree, sort_keys=False))
    _write(out / "tune.json", json.dumps(found, indent=1) + "\n")
    return found


def cell_name(cell: Cell) -> str:
    """For example ``lr=0.001,freeze=text+fusion``."""
    parts = {name: "+".join(value) if isinstance(value, list) else str(value) for name, value in cell.items()}
    return ",".join(f"{name}={value}" for name, value in parts.items())


def table(found: dict[str, Any]) -> str:
    """The cells, best first, for people."""
    rows = sorted(found["cells"], key=lambda row: -goodness(row["metric"], row["value"]))
    metric = rows[0]["metric"]
    lines = [f"{metric} on {found['split']}   step   settings"]
    return "\n".join(
        [*lines, *(f"{r['value']:<{len(metric) + 7}.4f}   {r['step']:<4}   {cell_name(r['cell'])}" for r in rows)]
    )


def in_a_process(data: Path, ds_config: Path, source: Path | None, labels: int | None) -> Run:
    """Runs a cell with `lanistr.training.finetune.finetune` in a fresh process, on one rank."""

    def run(recipe: Recipe, folder: Path, resuming: bool) -> None:
        context = multiprocessing.get_context("spawn")
        said = context.SimpleQueue()
        arguments = (recipe.model_dump(mode="json"), data, folder, ds_config, source, labels, resuming, said)
        process = context.Process(target=_finetune, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            reason = f"code {process.exitcode}" if said.empty() else said.get()
            raise ValueError(f"{folder.name}: {reason}; a rerun goes on here")

    return run


def _finetune(
    tree: dict[str, Any],
    data: Path,
    folder: Path,
    ds_config: Path,
    source: Path | None,
    labels: int | None,
    resuming: bool,
    said: Any,
) -> None:
    from lanistr.training.finetune import finetune

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        os.environ.pop(name, None)
    try:
        recipe = Recipe.model_validate(tree)
        resume = "auto" if resuming else None
        finetune(recipe, data, folder, ds_config, source=source, labels=labels, resume=resume)
    except ValueError as error:
        said.put(str(error))
        sys.exit(2)


def _apply(recipe: Recipe, cell: Cell) -> Recipe:
    changes = {KEYS[name]: value for name, value in cell.items()}
    tree = recipe.model_dump(mode="json")
    tree["finetune"] |= changes
    return Recipe.model_validate(tree)


def _check_recipe(folder: Path, recipe: Recipe) -> None:
    """A cell of the same name must be of the same recipe; one that never got to a checkpoint starts anew."""
    from lanistr.training.checkpoint import find_latest

    path = folder / "recipe.yaml"
    if not path.is_file():
        return
    if yaml.safe_load(path.read_text(encoding="utf-8")) != recipe.model_dump(mode="json"):
        raise ValueError(f"{folder} is of another recipe; give another --out")
    if find_latest(folder) is None and not (folder / "summary.json").is_file():
        shutil.rmtree(folder)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def add_tune(commands: Any) -> None:
    """The command ``tune``."""
    made = commands.add_parser("tune", help="a small grid of fine-tuning settings, judged on the validation split")
    made.add_argument("--recipe", default="demo", help="name or path")
    made.add_argument("--from", dest="source", required=True, help="pretraining run, or none = from scratch")
    made.add_argument("--data", type=Path, required=True, help="gold dataset")
    made.add_argument("--labels", type=int, help="labelled samples (default: all)")
    made.add_argument("--out", type=Path, required=True, help="folder of the cells; a rerun goes on there")
    made.add_argument("--deepspeed", type=Path, default=Path("ds_configs/zero2.json"), help="ZeRO configuration")
    made.add_argument("--lr", nargs="+", type=float, default=[])
    made.add_argument("--batch", nargs="+", type=int, default=[])
    made.add_argument("--decay", nargs="+", type=float, default=[])
    made.add_argument("--freeze", nargs="+", type=_parts, default=[], help="encoders, none, or parts: text,fusion")
    made.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="key=value", help="of the recipe")
    made.set_defaults(run=_command)


def _parts(text: str) -> str | list[str]:
    return text if text in ("encoders", "none") else text.split(",")


def _command(arguments: argparse.Namespace) -> str:
    source = None if arguments.source == "none" else Path(arguments.source)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    cells = grid({name: getattr(arguments, name) for name in KEYS})
    run = in_a_process(arguments.data, arguments.deepspeed, source, arguments.labels)
    found = tune(recipe, cells, arguments.out, run)
    return f"{table(found)}\nbest: {arguments.out / 'best.yaml'}"
