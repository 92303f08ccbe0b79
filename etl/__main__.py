"""Raw tables, text, images and series -> modality-tagged WebDataset shards."""

import argparse
import re
import sys
from pathlib import Path

MIN_MEMORY = 200 * 10**6


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for a user's mistake)."""
    arguments = _parse(argv)
    try:
        arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Argparse takes ``key=value`` only straight after the recipe; people write it at the end, as for the launchers."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(r.startswith("-") or "=" not in r for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m etl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    synth = commands.add_parser("synth", help="write the raw files of the demo shop")
    synth.add_argument("--out", type=Path, required=True)
    synth.add_argument("--samples", type=int, default=6000)
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--missing", type=_rates, default={}, metavar="image=0.5,series=0.4,...")
    synth.set_defaults(run=_synth)
    _add_before_build(commands)
    build = commands.add_parser(
        "build",
        help="raw files -> bronze, silver, gold",
        epilog="A build that was killed goes on where it stopped when the same command is run again. As an array job: run "
        "the command once with --prepare, then N times with --task-index 0..N-1 --num-tasks N, then once without these "
        "options: this does what a killed member left, and writes the manifest.",
    )
    build.add_argument("recipe", help="path, or name of a recipe in etl/recipes")
    build.add_argument("overrides", nargs="*", metavar="key=value", help="for example source.metadata=null")
    build.add_argument("--raw", type=Path, required=True, help="folder with the raw files; only read")
    build.add_argument("--lake", type=Path, required=True, help="folder to build into")
    build.add_argument("--refit", action="store_true", help="fit statistics and vocabularies anew")
    build.add_argument("--workers", type=_positive, default=2, help="local processes (the bytes do not depend on it)")
    build.add_argument("--cluster", metavar="tcp://HOST:PORT", help="run the tasks on this dask.distributed scheduler")
    build.add_argument(
        "--prepare", action="store_true", help="only ingest, fit and plan the tasks: the first step of an array job"
    )
    build.add_argument("--task-index", type=int, metavar="I", help="member of an array job, from 0: run its share only")
    build.add_argument("--num-tasks", type=_positive, metavar="N", help="members of the array job")
    build.add_argument("--max-bad", type=_share, default=1.0, help="stop if more than this share of records is bad")
    build.add_argument(
        "--memory", type=_bytes, metavar="4GB", help="what the build may use; the rest is spilled to disk"
    )
    build.add_argument("--salvage", action="store_true", help="read truncated files up to where they break")
    build.add_argument("--threads", type=_positive, help="threads of DuckDB (default: all cores)")
    build.add_argument("--tmp", type=Path, help="folder to spill into (default: in the lake)")
    build.set_defaults(run=_build)
    _add_maintenance(commands)

    _image_options(commands)
    verify = commands.add_parser("verify", help="re-read and re-hash everything")
    verify.add_argument("gold", type=Path)
    verify.add_argument(
        "--deep", action="store_true", help="also members, content across splits, the fit, the lake, and the leak probe"
    )
    verify.set_defaults(run=_verify)
    stats = commands.add_parser("stats", help="splits, missingness, labels, lengths, lineage of a gold dataset")
    stats.add_argument("gold", type=Path)
    _redaction(stats)
    stats.set_defaults(run=_stats)
    preview = commands.add_parser("preview", help="one self-contained page with sample cards and plots")
    preview.add_argument("gold", type=Path)
    preview.add_argument("--out", type=Path, required=True, help="HTML file")
    preview.add_argument("--cards", type=int, default=24, help="samples shown")
    _redaction(preview)
    preview.set_defaults(run=_preview)
    return parser


def _add_maintenance(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    gc = commands.add_parser("gc", help="remove from a lake what no manifest refers to")
    gc.add_argument("lake", type=Path)
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    gc.set_defaults(run=_gc)
    diff = commands.add_parser("diff", help="what differs between two gold datasets")
    diff.add_argument("a", type=Path)
    diff.add_argument("b", type=Path)
    diff.set_defaults(run=_diff)
    index = commands.add_parser("index", help="index and manifest for existing WebDataset tars")
    index.add_argument("tars", type=Path, nargs="*", help="plain tars of the train split")
    index.add_argument("--val", type=Path, nargs="*", default=[])
    index.add_argument("--test", type=Path, nargs="*", default=[])
    index.add_argument("--out", type=Path, required=True, help="new folder; the tars stay where they are")
    index.add_argument("--like", type=Path, metavar="GOLD", help="take schema, labels and tokenizer from this dataset")
    index.add_argument("--size", type=_positive, default=224, help="pixels that the images are meant for")
    index.add_argument("--ignore", default="", metavar="txt,...", help="members to leave out")
    index.set_defaults(run=_index)


def _add_before_build(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    init = commands.add_parser("init", help="guess a recipe from raw tables")
    init.add_argument("files", nargs="+", type=Path, help="tables: csv, tsv, jsonl, parquet, each also .gz and .zst")
    init.add_argument("--out", type=Path, help="recipe to write (default: print it)")
    init.add_argument("--force", action="store_true", help="overwrite --out")
    init.set_defaults(run=_init)

    convert = commands.add_parser("convert", help="UEA .ts -> csv tables, .zip -> files")
    convert.add_argument("files", nargs="+", type=Path)
    convert.add_argument("--out", type=Path, required=True, help="folder")
    convert.set_defaults(run=_convert)


def _image_options(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    images = commands.add_parser("images", help="fetch the product images of an amazon2018 recipe")
    images.add_argument("recipe", help="path, or name of a recipe in etl/recipes")
    images.add_argument("overrides", nargs="*", metavar="key=value", help="for example source.metadata=null")
    images.add_argument(
        "--raw", type=Path, required=True, help="folder with the raw files; images go into source.images"
    )
    images.add_argument("--concurrency", type=_positive, default=32, help="requests in flight")
    images.add_argument("--per-host", type=_positive, default=8, help="requests in flight to one host")
    images.add_argument("--timeout", type=float, default=20.0, help="seconds without a byte")
    images.add_argument("--retries", type=int, default=4, help="further attempts where a failure may pass")
    images.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="may have a private address")
    images.set_defaults(run=_images)


def _redaction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--redact",
        action=argparse.BooleanOptionalAction,
        help="hide texts, images and identifying values (default: where the dataset is private, as mimic4 is)",
    )


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a share between 0 and 1, for example 0.01")
    return share


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number, at least 1")
    return int(text)


def _bytes(text: str) -> int:
    """``4GB``, ``500MB``, ``2GiB``."""
    units = {
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
        "KIB": 2**10,
        "MIB": 2**20,
        "GIB": 2**30,
        "TIB": 2**40,
    }
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * units[match[2].upper()]) if match else 0
    if size < MIN_MEMORY:
        raise argparse.ArgumentTypeError(f"{text!r}: a size of at least 200MB, for example 4GB or 500MB")
    return size


def _rates(text: str) -> dict[str, float]:
    """``image=0.5,series=0.4``."""
    rates = {}
    for part in text.split(","):
        name, equals, rate = part.partition("=")
        try:
            rates[name.strip()] = float(rate)
        except ValueError:
            equals = ""
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r}: write modality=rate, for example image=0.5")
    return rates


def _synth(arguments: argparse.Namespace) -> None:
    from etl.sources import synthetic

    synthetic.generate(arguments.out, arguments.samples, arguments.seed, arguments.missing)
    print(f"{arguments.out}: {arguments.samples} products", file=sys.stderr)


def _convert(arguments: argparse.Namespace) -> None:
    from etl.convert import convert

    print("\n".join(convert(arguments.files, arguments.out)))


def _init(arguments: argparse.Namespace) -> None:
    from etl.init import init

    if arguments.out and arguments.out.exists() and not arguments.force:
        raise ValueError(f"--out {arguments.out}: is there already; overwrite it with --force")
    text = init(arguments.files)
    if not arguments.out:
        print(text, end="")
        return
    arguments.out.write_text(text, encoding="utf-8")
    print(arguments.out)


def _build(arguments: argparse.Namespace) -> None:
    from etl import recipe
    from etl.build import build, build_plan, build_share
    from etl.cluster import executor
    from etl.prepare import Limits

    salvage = ["salvage=true"] if arguments.salvage else []
    loaded = recipe.load(arguments.recipe, [*arguments.overrides, *salvage])
    if not arguments.raw.is_dir():
        raise ValueError(f"--raw {arguments.raw}: no such folder")
    if arguments.tmp and not arguments.tmp.is_dir():
        raise ValueError(f"--tmp {arguments.tmp}: no such folder")
    if (arguments.task_index is None) != (arguments.num_tasks is None):
        raise ValueError("--task-index and --num-tasks belong together")
    where = executor(arguments.workers, arguments.cluster)
    if arguments.task_index is not None:
        build_share(loaded, arguments.raw, arguments.lake, arguments.task_index, arguments.num_tasks, executor=where)
        return
    limits = Limits(arguments.memory, arguments.threads, arguments.tmp)
    options = {"refit": arguments.refit, "max_bad": arguments.max_bad, "limits": limits}
    if arguments.prepare:
        build_plan(loaded, arguments.raw, arguments.lake, **options)
        return
    print(build(loaded, arguments.raw, arguments.lake, executor=where, **options))


def _gc(arguments: argparse.Namespace) -> None:
    from etl.gc import collect

    print("\n".join(collect(arguments.lake, dry_run=arguments.dry_run)))


def _diff(arguments: argparse.Namespace) -> None:
    from etl.diff import diff

    print(diff(arguments.a, arguments.b))


def _index(arguments: argparse.Namespace) -> None:
    from etl.index import index

    tars = {"train": arguments.tars, "val": arguments.val, "test": arguments.test}
    ignore = [suffix.strip().removeprefix(".") for suffix in arguments.ignore.split(",") if suffix.strip()]
    print(index(tars, arguments.out, size=arguments.size, like=arguments.like, ignore=ignore))


def _images(arguments: argparse.Namespace) -> None:
    from etl import recipe
    from etl.fetch import Limits
    from etl.images import fetch_images

    loaded = recipe.load(arguments.recipe, arguments.overrides)
    if not arguments.raw.is_dir():
        raise ValueError(f"--raw {arguments.raw}: no such folder")
    if arguments.timeout <= 0 or arguments.retries < 0:
        raise ValueError("--timeout is above 0, --retries at least 0")
    limits = Limits(
        concurrency=arguments.concurrency,
        per_host=arguments.per_host,
        timeout=arguments.timeout,
        retries=arguments.retries,
        allow=frozenset(arguments.allow_host),
    )
    for outcome, n in fetch_images(loaded, arguments.raw, limits).most_common():
        if n:
            print(f"{n:>8,}  {outcome}")


def _verify(arguments: argparse.Namespace) -> None:
    from etl.verify import verify

    print("\n".join(verify(arguments.gold, deep=arguments.deep)))


def _stats(arguments: argparse.Namespace) -> None:
    from etl.stats import stats

    print(stats(arguments.gold, arguments.redact))


def _preview(arguments: argparse.Namespace) -> None:
    from etl.preview import preview

    if arguments.cards < 0:
        raise ValueError(f"--cards {arguments.cards}: at least 0")
    preview(arguments.gold, arguments.out, arguments.cards, arguments.redact)
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
