"""``python -m lanistr robustness`` and ``importance``: arguments; the work is done where heavy imports are."""

import argparse
import logging
import sys
from pathlib import Path


def add_robustness(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command ``robustness``."""
    parser = commands.add_parser(
        "robustness", help="a metric of fine-tuned runs when modalities are missing at test time"
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="finished fine-tuning runs")
    parser.add_argument("--data", type=Path, required=True, help="gold dataset with labels")
    parser.add_argument("--out", type=Path, required=True, help="folder of robustness.json, .md and .png")
    parser.add_argument("--split", choices=["train", "val", "test"], default="test")
    parser.add_argument("--metric", help="default: that of the target")
    parser.add_argument("--hide", help="modalities, for example image,text (default: each in use)")
    parser.add_argument("--rates", default="0,0.25,0.5,0.75,1", help="default 0,0.25,0.5,0.75,1")
    parser.add_argument("--seeds", type=int, default=2, help="draws of what is hidden (default 2)")
    parser.set_defaults(run=run_robustness)


def run_robustness(arguments: argparse.Namespace) -> str:
    """Run; returns the card."""
    _prepare(arguments.out)
    from lanistr.evaluation.robustness import measure_robustness
    from lanistr.evaluation.robustness_report import write_robustness

    found = measure_robustness(
        arguments.runs,
        arguments.data,
        arguments.split,
        arguments.metric,
        [name.strip() for name in arguments.hide.split(",")] if arguments.hide else None,
        _numbers(arguments.rates),
        arguments.seeds,
    )
    return write_robustness(found, arguments.out)


def _numbers(text: str) -> list[float]:
    """Separated by commas. Raises ValueError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--rates {text}: give numbers separated by commas, for example 0,0.5,1") from None


def add_importance(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command ``importance``."""
    parser = commands.add_parser(
        "importance",
        help="what a fine-tuned run rests on: modalities hidden and alone, attention, columns (before fine-tuning: "
        "launchers/importance.py)",
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="finished fine-tuning run")
    parser.add_argument("--data", type=Path, required=True, help="gold dataset with labels")
    parser.add_argument("--out", type=Path, required=True, help="folder of importance.json, .md and .png")
    parser.add_argument("--split", choices=["train", "val", "test"], default="test")
    parser.add_argument("--metric", help="default: that of the target")
    parser.add_argument("--rows", type=int, default=512, help="samples whose attention is looked at (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="of their draw")
    parser.set_defaults(run=run_importance)


def run_importance(arguments: argparse.Namespace) -> str:
    """Run; returns the report."""
    _prepare(arguments.out)
    from lanistr.evaluation.attribution import explain
    from lanistr.evaluation.attribution_report import write_attribution

    found = explain(arguments.source, arguments.data, arguments.split, arguments.metric, arguments.rows, arguments.seed)
    return write_attribution(found, arguments.out)


def _prepare(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file; give a folder")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lanistr.evaluation").setLevel(logging.INFO)
