"""Does pretraining pay with few labels? The same model, fine-tuned from a run and from scratch, on the same draws.

``python benchmarks/few_labels.py --from RUN --data GOLD --labels 200 --seeds 3 --out results.json``. Nothing is frozen in
either arm; both keep their best step on validation; the test split is read once per model. Settings are the recipe's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._harness import ROOT, write_result

ARMS = ("pretrained", "scratch")


def accuracy(source: str, arguments: argparse.Namespace, seed: int, run: Path) -> float:
    """Test accuracy of one model fine-tuned from ``source`` (a run, or none)."""
    recipe = ["--recipe", str(Path(arguments.source) / "recipe.yaml")]
    shared = [*recipe, "--data", str(arguments.data), "--run", str(run)]
    tune = ["--from", source, "--labels", str(arguments.labels), "--seed", str(seed), "--freeze", "none"]
    epochs = [f"finetune.epochs={arguments.epochs}", f"finetune.eval_every={max(1, arguments.epochs // 6)}"]
    zero = ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json")]
    _run([sys.executable, "launchers/finetune.py", *zero, *shared, *tune, *epochs], run)
    _run([sys.executable, "launchers/evaluate.py", "--run", str(run), "--data", str(arguments.data)], run)
    result = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return result["metrics"]["accuracy"]["value"]


def _run(command: list[str], run: Path) -> None:
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, env=_one_rank())
    if done.returncode:
        raise ValueError(f"{run.name}: {' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _one_rank() -> dict[str, str]:
    """The environment without what a distributed launcher may have left in it."""
    return {k: v for k, v in os.environ.items() if k not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both arms over all seeds: accuracies, the mean of the paired differences and its standard error."""
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for arm in ARMS:
                source = str(arguments.source) if arm == "pretrained" else "none"
                found[arm].append(accuracy(source, arguments, seed, Path(folder) / f"{arm}-{seed}"))
                print(f"seed {seed}  {arm:<11}{found[arm][-1]:.4f}", flush=True)
    differences = [a - b for a, b in zip(*found.values(), strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    print(f"pretrained - scratch: {mean:+.4f}, standard error {error:.4f} over {arguments.seeds} seeds")
    case = f"labels={arguments.labels}/epochs={arguments.epochs}"
    return {
        "case": case,
        "comparator": "scratch",
        "accuracy": found,
        "mean_difference": mean,
        "standard_error": error,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Does pretraining pay with few labels?")
    parser.add_argument("--from", dest="source", type=Path, required=True, help="pretraining run")
    parser.add_argument("--data", type=Path, required=True, help="gold dataset")
    parser.add_argument("--labels", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: at least 2, for a standard error")
    write_result(arguments.out, "few_labels", [compare(arguments)])


if __name__ == "__main__":
    main()
