"""``python -m lanistr compare | ablate``: arguments; the work is done where heavy imports are."""

import argparse
import logging
import os
import sys
from pathlib import Path

PROLOGUE = "Finished cells are kept in --out and never run again; several processes may share one --out."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What comparisons and ablations have in common."""
    parser.add_argument("recipe", help="name or path: model, objectives and schedules of what is trained")
    parser.add_argument("--data", type=Path, required=True, help="gold dataset with labels")
    parser.add_argument("--out", type=Path, required=True, help="cells, runs, table.md and result.json go here")
    parser.add_argument("--seeds", type=positive, default=5, help="draws of labels (default 5)")
    parser.add_argument("--labels", type=label_counts, default=[None], help="for example 128,512,all (default all)")
    parser.add_argument(
        "--metric", type=names, default=["accuracy"], help="for example accuracy,macro_f1 (default accuracy)"
    )
    parser.add_argument("--pretrain-data", type=Path, help="gold dataset to pretrain on (default: --data)")
    parser.add_argument(
        "--pretrain-seeds", type=positive, default=1, help="pretraining runs; seed s uses s modulo this"
    )
    parser.add_argument("--deepspeed", type=Path, default=Path("ds_configs/zero2.json"), help="ZeRO configuration")
    parser.add_argument("--table-only", action="store_true", help="train nothing: tabulate the cells that are there")
    parser.add_argument("--verbose", action="store_true", help="the log of every training, too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example finetune.lr=2e-4")


def add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command ``compare``."""
    compare = commands.add_parser(
        "compare", help="baselines and LANISTR on the same draws of labels: Tables 1 and 2", description=PROLOGUE
    )
    add_arguments(compare)
    compare.add_argument("--methods", type=names, help="for example tfidf,trees,lanistr (default: all that fit)")
    compare.add_argument("--ours", default="lanistr", help="the method that p-values are against (default lanistr)")
    compare.add_argument("--from", dest="source", type=Path, help="pretraining run (default: one is made in --out)")
    compare.add_argument(
        "--text-encoder", type=Path, help="folder of a BERT for the probes (default: MiniLM's package)"
    )
    compare.add_argument(
        "--autogluon-python", type=Path, metavar="PATH", help="interpreter that has autogluon.multimodal"
    )
    compare.add_argument("--autogluon-config", type=Path, metavar="JSON", help="file of AutoGluon's hyperparameters")
    compare.set_defaults(run=run_compare)


def run_compare(arguments: argparse.Namespace) -> str:
    """Run; returns the table."""
    prepare(arguments.verbose)
    from lanistr.comparison.compare import compare_methods

    return compare_methods(arguments)


def add_ablate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command ``ablate``."""
    ablate = commands.add_parser(
        "ablate", help="LANISTR without each modality, loss and part of its data: Tables 3 and 4", description=PROLOGUE
    )
    add_arguments(ablate)
    ablate.add_argument("--arms", type=names, help="for example full,without_image,unlabelled_50 (default: all)")
    ablate.add_argument(
        "--frozen", action="store_true", help="logistic regression on the frozen model in the place of fine-tuning"
    )
    ablate.set_defaults(run=run_ablate)


def run_ablate(arguments: argparse.Namespace) -> str:
    """Run; returns the table."""
    prepare(arguments.verbose)
    from lanistr.comparison.ablate import ablate

    return ablate(arguments)


def prepare(verbose: bool) -> None:
    """Log progress to the terminal; refuse a launcher.

    Raises:
        ValueError: started as one of several ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a comparison is one process: start it without a launcher (several may share one --out)")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lanistr").setLevel(logging.INFO if verbose else logging.ERROR)
    logging.getLogger("lanistr.comparison").setLevel(logging.INFO)
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 1")
    return int(text)


def label_counts(text: str) -> list[int | None]:
    """Numbers or ``all``, separated by commas."""
    return [None if part == "all" else positive(part) for part in names(text)]


def names(text: str) -> list[str]:
    """Separated by commas; each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: names separated by commas, each once")
    return parts
