"""``python -m lanistr robustness``: fine-tuned runs, and baselines fitted on the same labels, when modalities are missing."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from lanistr.evaluation.command import prepare


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
    parser.add_argument(
        "--methods", help="baselines of `compare`, for example tfidf,trees: fitted on what each run was given"
    )
    parser.add_argument("--text-encoder", type=Path, help="folder of a BERT for the probes (default: MiniLM's package)")
    parser.set_defaults(run=run_robustness)


def run_robustness(arguments: argparse.Namespace) -> str:
    """Run; returns the card."""
    prepare(arguments.out)
    from lanistr.evaluation.robustness import Rival, measure_robustness
    from lanistr.evaluation.robustness_report import write_robustness

    rivals: Iterable[Rival] = ()
    if arguments.methods:
        from lanistr.comparison.rivals import fit_rivals

        names, work = _names(arguments.methods), arguments.out / "runs"
        rivals = fit_rivals(names, arguments.runs, arguments.data, work, arguments.text_encoder)
    found = measure_robustness(
        arguments.runs,
        arguments.data,
        arguments.split,
        arguments.metric,
        _names(arguments.hide) if arguments.hide else None,
        _numbers(arguments.rates),
        arguments.seeds,
        rivals,
    )
    return write_robustness(found, arguments.out)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[float]:
    """Separated by commas. Raises ValueError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--rates {text}: give numbers separated by commas, for example 0,0.5,1") from None
