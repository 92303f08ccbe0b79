"""The robustness card as a result file: a metric of fine-tuned runs and of baselines when modalities are missing.

``python benchmarks/robustness.py RUN... --data GOLD --methods tfidf,trees --out results.json``: what ``python -m lanistr
robustness`` draws, one row per run or method. Runs that differ in their seed alone are named ``<arm>-<seed>`` and make one
row: the mean over the seeds beside each of them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._harness import write_result
from lanistr.comparison.rivals import fit_rivals
from lanistr.evaluation.robustness import measure_robustness


def make_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per arm: values by hidden modality and rate, each the mean over the seeds."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in found["runs"]:
        arms.setdefault(Path(run["run"]).name.rsplit("-", 1)[0], []).append(run)
    return [
        {
            "case": arm,
            "comparator": "nothing hidden",
            "seeds": len(runs),
            "labels": runs[0]["labels"],
            "train_hidden": runs[0]["train_hidden"],
            "modality_dropout": runs[0]["modality_dropout"],
            "metric": found["metric"],
            "curves": [_curve([run["curves"][i] for run in runs]) for i in range(len(runs[0]["curves"]))],
        }
        for arm, runs in arms.items()
    ]


def _curve(curves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same curve of several seeds."""
    rows = []
    for points in zip(*(curve["rows"] for curve in curves), strict=True):
        values = [point["value"] for point in points]
        mean = {"rate": points[0]["rate"], "mean": float(np.mean(values)), "values": values}
        rows.append({**mean, "ci95": points[0]["ci95"]} if len(values) == 1 else mean)
    return {"hidden": curves[0]["hidden"], "rows": rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="The robustness card as a result file")
    parser.add_argument("runs", type=Path, nargs="+", help="finished fine-tuning runs")
    parser.add_argument("--data", type=Path, required=True, help="gold dataset with labels")
    parser.add_argument("--methods", default="", help="baselines of `compare`, fitted on what each run was given")
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 0.5, 1])
    parser.add_argument("--draws", type=int, default=1, help="of what is hidden")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    names = [name for name in arguments.methods.split(",") if name]
    rivals = fit_rivals(names, arguments.runs, arguments.data, arguments.runs[0].parent, None)
    found = measure_robustness(
        arguments.runs, arguments.data, "test", None, None, arguments.rates, arguments.draws, rivals
    )
    rows = make_rows(found)
    write_result(arguments.out, "robustness", rows)
    for row in rows:
        whole, everything = row["curves"][0]["rows"], row["curves"][-1]["rows"]
        print(
            f"{row['case']}: {whole[0]['mean']:.3f} whole", *(f"{p['mean']:.3f} at {p['rate']:.0%}" for p in everything)
        )


if __name__ == "__main__":
    main()
