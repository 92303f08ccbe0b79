"""Evaluate: ``python launchers/evaluate.py --run RUN --data GOLD --split test`` writes ``RUN/metrics.json``."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launchers import common


def run(arguments: argparse.Namespace) -> None:
    """Call the library and print a table."""
    from lanistr.evaluation.evaluate import evaluate_run

    result = evaluate_run(arguments.run, arguments.data, arguments.split)
    print(f"{result['run']} on {result['split']}: {result['n']} samples")
    for name, metric in result["metrics"].items():
        low, high = metric["ci95"]
        if metric["value"] is None:
            print(f"  {name:<18}undefined on these samples")
        else:
            print(f"  {name:<18}{metric['value']:.4f}  (95 % interval {low:.4f} to {high:.4f})")
    for row in result["patterns"]:
        found = "  ".join(f"{name} {v:.3f}" for name, v in list(row["metrics"].items())[:2] if v is not None)
        print(f"  {row['n']:>6} with {' + '.join(row['present']) or 'nothing'}: {found or 'too few'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Evaluate a fine-tuned run.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", choices=["train", "val", "test"], default="test")
    parsed = parser.parse_args()
    sys.exit(common.main(lambda: run(parsed)))
