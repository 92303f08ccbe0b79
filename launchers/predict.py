"""Predict: ``python launchers/predict.py --model DIR --input FILE|GOLD --out predictions.parquet``."""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launchers import common


def run(arguments: argparse.Namespace) -> None:
    """Call the library and say what came of it."""
    from lanistr.predict import Predictor
    from lanistr.predict_file import latency, read_records, write_predictions

    predictor = Predictor.from_pretrained(arguments.model, trust=arguments.trust, device=arguments.device)
    if arguments.latency:
        found = itertools.islice(read_records(arguments.input), arguments.latency)
        records = [{k: v for k, v in r.items() if k in predictor.keys} for r in found if isinstance(r, dict)]
        times = latency(predictor, records, repeats=5)
        print(f"one record: p50 {times['p50_ms']:.2f} ms, p95 {times['p95_ms']:.2f} ms ({times['n']:.0f} timed)")
        return
    done = write_predictions(
        predictor,
        arguments.input,
        arguments.out,
        split=arguments.split,
        identifier=arguments.id,
        embeddings=arguments.embeddings or predictor.task is None,
    )
    if done.ignored:
        print(f"ignored, the model does not know them: {', '.join(done.ignored)}", file=sys.stderr)
    first = f" (the first: {done.first_error})" if done.first_error else ""
    print(f"{arguments.out}: {done.answered:,} answered, {done.failed:,} not{first}", file=sys.stderr)


def parse() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description="Predict from raw records or a gold dataset with an exported model.")
    made.add_argument("--model", type=Path, required=True, help="folder made by python -m lanistr export")
    made.add_argument(
        "--input", type=Path, required=True, help=".jsonl, .csv or .parquet of raw records, or a gold dataset"
    )
    made.add_argument("--out", type=Path, help="Parquet file")
    made.add_argument("--split", choices=["train", "val", "test"], default="test", help="of a gold dataset")
    made.add_argument("--id", metavar="COLUMN", help="column of the input to copy")
    made.add_argument("--embeddings", action="store_true", help="write embeddings, too")
    made.add_argument("--latency", type=int, metavar="N", help="time the first N records one by one instead")
    made.add_argument("--device", default="cpu", help="for example cuda")
    made.add_argument("--trust", action="store_true", help="also load weights in a pickle, which can run any code")
    arguments = made.parse_args()
    if arguments.out is None and not arguments.latency:
        made.error("--out FILE is needed")
    return arguments


if __name__ == "__main__":
    parsed = parse()
    sys.exit(common.main(lambda: run(parsed)))
