"""``python -m lanistr importance``: arguments; the work is done where heavy imports are."""

import argparse
import logging
import sys
from pathlib import Path


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
    prepare(arguments.out)
    from lanistr.evaluation.attribution import explain
    from lanistr.evaluation.attribution_report import write_attribution

    found = explain(arguments.source, arguments.data, arguments.split, arguments.metric, arguments.rows, arguments.seed)
    return write_attribution(found, arguments.out)


def prepare(out: Path) -> None:
    """Log progress to the terminal. Raises ValueError for a folder that is a file."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: a file; give a folder")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lanistr.evaluation").setLevel(logging.INFO)
