"""The report of a run: what pretraining did, what fine-tuning reached, beside what was reachable."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TERMS = {
    "mlm": "text (MLM)",
    "mim": "image (MIM)",
    "mfm": "tabular (MFM)",
    "mtm": "series (MTM)",
    "mmm": "multimodal (SimMMM)",
}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl``. Raises ValueError where there is none."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run}: no metrics.jsonl; is this a finished run?")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def first_and_last(rows: Sequence[dict[str, Any]], term: str, share: float = 0.1) -> tuple[float, float]:
    """Mean of a term over the first and over the last tenth of the rows that have it."""
    values = [row[term] for row in rows if row.get(term) is not None]
    if not values:
        raise ValueError(f"metrics.jsonl has no values of {term!r}")
    n = max(1, round(len(values) * share))
    return sum(values[:n]) / n, sum(values[-n:]) / n


def read_validation(run: Path) -> list[dict[str, Any]]:
    """Rows of ``validation.jsonl`` after the first step; empty where pretraining was not validated."""
    path = run / "validation.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [row for row in map(json.loads, lines) if row["step"] > 0]


def write_report(pretrain: Path, finetuned: Sequence[Path], truth: Path | None, out: Path) -> str:
    """Write ``out`` (Markdown) and a PNG of the loss curves beside it; returns the Markdown.

    Args:
        pretrain: run of pretraining.
        finetuned: runs with a ``metrics.json`` from `launchers/evaluate.py`.
        truth: ``truth.json`` of the demo data: Bayes accuracies.
        out: where the report goes.
    """
    rows = read_metrics(pretrain)
    terms = [t for t in TERMS if any(row.get(t) is not None for row in rows)]
    out.parent.mkdir(parents=True, exist_ok=True)
    curves = out.with_name("pretrain_losses.png")
    held_out = read_validation(pretrain)
    draw_curves(rows, held_out, terms, curves)
    parts = [
        "# Demo report",
        "",
        f"## Pretraining: {len(rows)} logged steps",
        "",
        f"![loss curves]({curves.name})",
        "",
        f"| term | training, first tenth | last tenth | | {_held_out_header(held_out)} |",
        "|---|---|---|---|---|",
    ]
    for term in terms:
        first, last = first_and_last(rows, term)
        fell = "fell" if last < first else "did not fall"
        later = " -> ".join(f"{row[term]:.4f}" for row in held_out if term in row)
        parts.append(f"| {TERMS[term]} | {first:.4f} | {last:.4f} | {fell} | {later or '-'} |")
    parts += ["", "## Fine-tuned models on the test split", "", *_results_table(finetuned)]
    if truth:
        parts += [
            "",
            "## What is reachable",
            "",
            *_bayes_table(json.loads(truth.read_text(encoding="utf-8")), finetuned),
        ]
    text = "\n".join(parts) + "\n"
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, out)
    return text


def _held_out_header(held_out: Sequence[dict[str, Any]]) -> str:
    steps = ", ".join(str(row["step"]) for row in held_out)
    return f"held out, step {steps}" if steps else "held out"


def _read_result(run: Path) -> dict[str, Any]:
    path = run / "metrics.json"
    if not path.is_file():
        raise ValueError(f"{run}: no metrics.json; run launchers/evaluate.py --run {run} first")
    return json.loads(path.read_text(encoding="utf-8"))


def _results_table(runs: Sequence[Path]) -> list[str]:
    lines = [
        "| model | labels | accuracy (95 % interval) | macro-F1 | AUROC | n |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        result = _read_result(run)
        metrics = result["metrics"]
        low, high = metrics["accuracy"]["ci95"]
        lines.append(
            f"| {run.name} | {result.get('labels', 'all')} | {metrics['accuracy']['value']:.3f} ({low:.3f}-{high:.3f}) "
            f"| {metrics['macro_f1']['value']:.3f} | {metrics['auroc']['value']:.3f} | {result['n']} |"
        )
    return lines


def _bayes_table(truth: dict[str, Any], runs: Sequence[Path]) -> list[str]:
    bayes = truth["bayes_accuracy"]
    single = {subset: value for subset, value in bayes.items() if "+" not in subset}
    best = max(single, key=lambda subset: single[subset])
    lines = [
        "The best possible (Bayes) accuracy on this data, computed from how it was made:",
        "",
        "| modalities, all present | Bayes accuracy |",
        "|---|---|",
        *(f"| {subset} | {value:.3f} |" for subset, value in bayes.items()),
        f"| all, with the data's missing modalities | {truth['bayes_accuracy_with_missing']:.3f} |",
        "",
    ]
    for run in runs:
        reached = _read_result(run)["metrics"]["accuracy"]["value"]
        verdict = "beats" if reached > single[best] else "does not beat"
        lines.append(
            f"* **{run.name}** ({reached:.3f}) {verdict} the best single modality ({best}, {single[best]:.3f}); "
            f"{truth['bayes_accuracy_with_missing'] - reached:.3f} below what is reachable."
        )
    return lines


def draw_curves(
    rows: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]], terms: Sequence[str], out: Path
) -> None:
    """One small panel per term against the step: training as a line, held-out samples as dots."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(terms), figsize=(3.2 * len(terms), 2.8), squeeze=False)
    for axis, term in zip(axes[0], terms, strict=True):
        points = [(row["step"], row[term]) for row in rows if row.get(term) is not None]
        axis.plot(*zip(*points, strict=True), linewidth=1, color="#1f5fa8")
        dots = [(row["step"], row[term]) for row in held_out if term in row]
        if dots:
            axis.plot(*zip(*dots, strict=True), "o", markersize=4, color="#c8541e", label="held out")
            axis.legend(fontsize=7, frameon=False)
        axis.set_title(TERMS[term], fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    plt.close(figure)
