"""``python -m lanistr describe | export | report | compare | ablate``: a recipe, a run or many methods at a glance."""

import argparse
import sys
from pathlib import Path

from lanistr.comparison.command import add_ablate, add_compare


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
    export.set_defaults(run=_export)
    report = commands.add_parser("report", help="a Markdown report of a pretraining run and of models tuned from it")
    report.add_argument("--pretrain", type=Path, required=True, help="run folder of pretraining")
    report.add_argument("--finetuned", type=Path, nargs="+", required=True, help="evaluated run folders")
    report.add_argument("--truth", type=Path, help="truth.json of the demo data")
    report.add_argument("--out", type=Path, required=True, help="the report; loss curves go beside it")
    report.set_defaults(run=_report)
    add_compare(commands)
    add_ablate(commands)
    arguments = _parse(parser, argv)
    try:
        print(arguments.run(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


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

    out = export_run(arguments.source, arguments.out, arguments.data)
    return f"{out}: " + ", ".join(f"{file.name} {file.stat().st_size:,} bytes" for file in sorted(out.iterdir()))


def _report(arguments: argparse.Namespace) -> str:
    from lanistr.evaluation.report import write_report

    return write_report(arguments.pretrain, arguments.finetuned, arguments.truth, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
