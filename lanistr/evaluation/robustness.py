"""The robustness card: what a metric is worth when modalities are missing at test time."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lanistr.data.hiding import HidingDataset
from lanistr.data.reader import GoldDataset
from lanistr.evaluation.evaluate import Tuned, estimate_metric, load_tuned
from lanistr.metrics import METRICS, Metric, find_metric
from lanistr.training.best import predict

logger = logging.getLogger(__name__)
Predict = Callable[[GoldDataset, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Rival:
    """A fitted method that is no run of ours.

    Attributes:
        labels: it was fitted on.
        train_hidden: shares of modalities that were hidden from it.
        answer: see `curve`.
    """

    name: str
    labels: int
    train_hidden: dict[str, float]
    answer: Predict


def curve(
    answer: Predict,
    dataset: GoldDataset,
    positions: np.ndarray,
    hidden: Sequence[str],
    metric: Metric,
    rates: Sequence[float],
    seeds: int,
) -> list[dict[str, Any]]:
    """A metric against the share of samples whose modalities are hidden, with intervals over samples and draws.

    Args:
        answer: outputs and truth of samples of a split, by any method: see `lanistr.metrics`.
        dataset: the split as it is; what it lacks itself stays missing.
        positions: in it.
        hidden: modalities, each hidden by a draw of its own.
        metric: of `lanistr.metrics`.
        rates: in [0, 1].
        seeds: draws of what is hidden; 0 and 1 need only one.

    Returns:
        Per rate ``rate``, ``value`` (mean over the draws) and ``ci95``; None where the metric is undefined.

    Raises:
        ValueError: a rate or a modality that there is not.
    """
    rows = []
    for rate in rates:
        splits = [
            HidingDataset(dataset, dict.fromkeys(hidden, rate), seed) for seed in range(seeds if 0 < rate < 1 else 1)
        ]
        answers = [answer(split, positions) for split in splits]
        outputs, truth = [found for found, _ in answers], answers[0][1]
        rows.append({"rate": rate, **estimate_metric(metric, outputs, truth)})
    return rows


def measure_robustness(
    runs: Sequence[Path],
    data: Path,
    split: str,
    metric: str | None,
    hide: Sequence[str] | None,
    rates: Sequence[float],
    seeds: int,
    rivals: Iterable[Rival] = (),
) -> dict[str, Any]:
    """Curves of fine-tuned runs and of other methods: each modality hidden alone, then all of them at one rate.

    Runs that were trained with ``finetune.hide`` make the grid of train-missing against test-missing.

    Args:
        runs: finished runs of `lanistr.training.finetune`.
        data: gold dataset.
        split: of it.
        metric: None = the default of the target.
        hide: modalities; None = all that the first run uses.
        rates: in [0, 1].
        seeds: draws of what is hidden.
        rivals: fitted when it is their turn.

    Raises:
        ValueError: not a fine-tuning run, or a metric, modality, rate or number of draws that cannot be.
    """
    steps = _checked(rates, seeds)
    first = load_tuned(runs[0], data, split).dataset
    chosen = find_metric(first.manifest.target, metric)
    names = list(dict.fromkeys(hide or first.modalities))
    for run in runs:  # a wrong one is named before the work begins
        used = load_tuned(run, data, split).dataset.modalities
        if unknown := [name for name in names if name not in used]:
            raise ValueError(f"{run} has no modality {', '.join(unknown)} to hide; it uses {', '.join(used)}")
    groups = [[name] for name in names] + ([names] if len(names) > 1 else [])
    positions, measure = first.labelled(None, 0), METRICS[first.manifest.target][chosen]

    def curves(answer: Predict, dataset: GoldDataset, who: str) -> list[dict[str, Any]]:
        rows = []
        for hidden in groups:
            logger.info("%s: hiding %s", who, ", ".join(hidden))
            rows.append({"hidden": hidden, "rows": curve(answer, dataset, positions, hidden, measure, steps, seeds)})
        return rows

    rows = []
    for run in runs:
        tuned = load_tuned(run, data, split)
        answer = partial(predict, tuned.task, device=tuned.device)
        rows.append({**_about(run, tuned), "curves": curves(answer, tuned.dataset, str(run))})
    for rival in rivals:
        about = {"run": rival.name, "labels": rival.labels, "from": None, "train_hidden": rival.train_hidden}
        rows.append({**about, "modality_dropout": 0.0, "curves": curves(rival.answer, first, rival.name)})
    about = {"dataset": first.manifest.name, "content_id": first.content_id, "split": split, "samples": len(positions)}
    return {**about, "metric": chosen, "rates": steps, "seeds": seeds, "runs": rows}


def _checked(rates: Sequence[float], seeds: int) -> list[float]:
    """The rates, ascending, each once. Raises ValueError for what cannot be."""
    wrong = [rate for rate in rates if not 0 <= rate <= 1]
    if wrong or not rates:
        raise ValueError(f"rates {', '.join(map(str, wrong)) or 'none'}: give shares in [0, 1], for example 0,0.5,1")
    if seeds < 1:
        raise ValueError(f"{seeds} draws of what is hidden; at least 1 is needed")
    return sorted(set(rates))


def _about(run: Path, tuned: Tuned) -> dict[str, Any]:
    config = tuned.recipe.finetune
    return {
        "run": str(run),
        "labels": tuned.identity["n_labels"],
        "from": tuned.identity["from"],
        "train_hidden": config.hide,
        "modality_dropout": config.modality_dropout,
    }
