"""``python -m lanistr COMMAND``: a recipe, a run or many methods at a glance; ``--help`` lists the commands."""

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from lanistr.comparison.command import add_ablate, add_compare
from lanistr.comparison.robustness import add_robustness
from lanistr.evaluation.command import add_importance
from lanistr.tune import add_tune


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for a user's mistake)."""
    parser = argparse.ArgumentParser(prog="python -m lanistr", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    describe = commands.add_parser("describe", help="parameter counts per part, reconciled with the published model")
    describe.add_argument("--recipe", default="demo", help="name or path")
    describe.add_argument("--data", help="gold dataset whose vocabulary and columns count (default: the paper's)")
    describe.add_argument("overrides", nargs="*", metavar="key=value")
    describe.set_defaults(run=_describe)
    export = commands.add_parser(
        "export", help="a run as a folder that `Lanistr.from_pretrained` and the predictor load"
    )
    export.add_argument("source", type=Path, metavar="RUN", help="of pretraining or fine-tuning")
    export.add_argument("--out", type=Path, required=True, help="new folder")
    export.add_argument("--data", type=Path, help="gold dataset, for a run that keeps no tokenizer")
    export.add_argument("--onnx", action="store_true", help="also model.onnx: padded tensors and masks in, answers out")
    export.set_defaults(run=_export)
    report = commands.add_parser("report", help="of a pretraining run and models tuned from it, or of methods compared")
    report.add_argument("--pretrain", type=Path, help="run folder of pretraining")
    report.add_argument("--finetuned", type=Path, nargs="+", help="evaluated run folders")
    report.add_argument(
        "--method",
        action="append",
        metavar="NAME=RUN,RUN",
        help="evaluated runs of one method, one per seed; once per method, the first is compared with the others",
    )
    report.add_argument("--truth", type=Path, help="truth.json of the demo data")
    report.add_argument("--out", type=Path, required=True, help="the report; loss curves go beside it")
    report.set_defaults(run=_report)
    _add_plan(commands)
    plot = commands.add_parser("plot", help="loss, throughput and health curves of runs: PNG files and one HTML page")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    plot.add_argument("--out", type=Path, required=True, help="folder")
    plot.set_defaults(run=_plot)
    for add in (add_importance, add_robustness, add_compare, add_ablate, add_tune):
        add(commands)
    arguments = _parse(parser, argv)
    try:
        print(arguments.run(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="memory per GPU under a recipe, and the largest micro-batch that fits")
    plan.add_argument("--recipe", default="demo", help="name or path")
    plan.add_argument("--data", help="gold dataset whose vocabulary and columns count (default: the paper's)")
    plan.add_argument("--gpus", type=int, required=True)
    plan.add_argument("--gpu-memory", type=float, required=True, help="GiB of each")
    plan.add_argument("--stage", type=int, choices=[0, 1, 2], default=2, help="of ZeRO, as the shipped ds_configs")
    plan.add_argument("--offload", action="store_true", help="optimizer states in the memory of the host")
    plan.add_argument("--deepspeed", type=Path, help="ZeRO configuration instead of --stage and --offload")
    plan.add_argument("--checkpoint-activations", action="store_true", help="model.checkpoint_activations=true")
    plan.add_argument(
        "--measure", type=int, default=1, metavar="N", help="check by a real step of N samples on this CPU; 0 = do not"
    )
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.set_defaults(run=_plan)


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Argparse takes ``key=value`` only straight after the recipe; people write it at the end, as for the launchers."""
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(r.startswith("-") or "=" not in r for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _describe(arguments: argparse.Namespace) -> str:
    from lanistr.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)

    from lanistr.describe import describe
    from lanistr.manifest import Manifest

    manifest = Manifest.load(arguments.data) if arguments.data else None
    return describe(recipe, load_recipe("official"), manifest)


def _export(arguments: argparse.Namespace) -> str:
    from lanistr.export import export_run

    out = export_run(arguments.source, arguments.out, arguments.data, arguments.onnx)
    return f"{out}: " + ", ".join(f"{file.name} {file.stat().st_size:,} bytes" for file in sorted(out.iterdir()))


def _plan(arguments: argparse.Namespace) -> str:
    # Hugging Face announces the next name of its checkpointing switch.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from lanistr.config import load_recipe

    extra = ["model.checkpoint_activations=true"] if arguments.checkpoint_activations else []
    recipe = load_recipe(arguments.recipe, [*arguments.overrides, *extra])

    from lanistr.manifest import Manifest
    from lanistr.plan import plan, read_zero

    zero = read_zero(arguments.deepspeed, arguments.stage)
    if arguments.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    manifest = Manifest.load(arguments.data) if arguments.data else None
    if arguments.measure > 0:
        said = f"planning, then a real step of {arguments.measure} samples on this CPU (a minute at full size; --measure 0: none)"
        print(said, file=sys.stderr, flush=True)
    return plan(recipe, zero, arguments.gpus, arguments.gpu_memory, manifest, arguments.measure)


def _plot(arguments: argparse.Namespace) -> str:
    from lanistr.plot import plot

    return plot(arguments.runs, arguments.out)


def _report(arguments: argparse.Namespace) -> str:
    if arguments.method:
        return _report_methods(arguments)
    if not arguments.pretrain or not arguments.finetuned:
        raise ValueError("report: give --pretrain RUN and --finetuned RUN..., or --method NAME=RUN,RUN for each method")

    from lanistr.evaluation.report import write_report

    return write_report(arguments.pretrain, arguments.finetuned, arguments.truth, arguments.out)


def _report_methods(arguments: argparse.Namespace) -> str:
    named = [method.partition("=") for method in arguments.method]
    if not all(name and runs for name, _, runs in named):
        raise ValueError("--method: write NAME=RUN,RUN, for example pretrained=runs/a0,runs/a1")
    if arguments.out.suffix != ".md":
        raise ValueError(f"--out {arguments.out}: give a .md file; .html and .json are written beside it")

    from lanistr.evaluation.methods import read_method, write_comparison

    methods = [read_method(name, [Path(run) for run in runs.split(",")]) for name, _, runs in named]
    write_comparison(methods, arguments.out)
    return arguments.out.read_text(encoding="utf-8")


if __name__ == "__main__":
    from lanistr.training.lifeline import end_process  # compare and tune train in this process

    end_process(main())
