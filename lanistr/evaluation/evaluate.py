"""Evaluation of a fine-tuned run on one split."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lanistr.config import load_recipe
from lanistr.data.reader import load_manifest, open_split
from lanistr.evaluation.metrics import METRICS, Metric
from lanistr.evaluation.statistics import estimate
from lanistr.modalities import make_modalities
from lanistr.training.checkpoint import WEIGHTS, load_weights
from lanistr.training.finetune import make_task, predict
from lanistr.training.run import read_run


def evaluate_run(run: Path, data: Path, split: str) -> dict[str, Any]:
    """Evaluate the best weights of a fine-tuning run and write ``<run>/metrics.json``.

    Raises:
        ValueError: not a fine-tuning run, or a dataset with other labels.
    """
    identity = read_run(run)
    if identity["task"] != "finetune" or not (run / "best" / WEIGHTS).is_file():
        raise ValueError(f"{run}: no best weights; only a finished fine-tuning run can be evaluated")
    recipe = load_recipe(str(run / "recipe.yaml"))
    manifest = load_manifest(data, recipe.data)
    if manifest.labels != identity["labels"]:
        raise ValueError(f"{data} has labels {manifest.labels}, {run} was trained on {identity['labels']}")
    modalities = make_modalities(manifest, recipe.model.modalities)
    dataset = open_split(data, split, modalities, recipe.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = make_task(recipe, manifest, device.type).to(device)
    report = load_weights(task, run / "best" / WEIGHTS)
    if report.new:
        raise ValueError(f"{run}: the best weights lack {', '.join(report.new[:3])}")
    probabilities, labels = predict(task, dataset, dataset.labelled(None, 0), device)
    result = {
        "run": run.name,
        "split": split,
        "content_id": manifest.content_id,
        "n": len(labels),
        "labels": identity["n_labels"],
        "from": identity["from"],
        "metrics": {name: _rounded(metric, probabilities, labels) for name, metric in METRICS["class"].items()},
    }
    temporary = run / ".metrics.json.tmp"
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, run / "metrics.json")
    return result


def _rounded(metric: Metric, outputs: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    found = estimate(metric, [outputs], truth)
    return {"value": found.value, "ci95": [found.low, found.high]}
