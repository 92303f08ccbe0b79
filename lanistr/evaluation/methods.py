"""Methods side by side: several seeds each, intervals, paired tests, presence patterns, calibration; Markdown and HTML."""

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lanistr.evaluation.statistics import DRAWS, Comparison, Estimate, compare, estimate
from lanistr.metrics import DEFAULT, LOWER_IS_BETTER, METRICS, reliability

COLOURS = ("#1f5fa8", "#c8541e", "#3b8f5a", "#7b4fa3", "#8c6d1f", "#444444")


@dataclass(frozen=True)
class Method:
    """What evaluation left of one method.

    Attributes:
        outputs: per seed, of the same samples.
        results: ``metrics.json`` per seed.
        keys, presence_N, truth: of the samples.
    """

    name: str
    outputs: list[np.ndarray]
    results: list[dict[str, Any]]
    keys: np.ndarray
    presence_N: np.ndarray
    truth: np.ndarray


def read_method(name: str, runs: Sequence[Path]) -> Method:
    """Read the evaluated runs of one method, one per seed.

    Raises:
        ValueError: a run that was not evaluated, or seeds over different samples.
    """
    outputs, results, found = [], [], []
    for run in runs:
        if not (run / "metrics.json").is_file():
            raise ValueError(f"{run}: no metrics.json; run launchers/evaluate.py --run {run} first")
        result = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        path = run / f"predictions-{result['split']}.npz"
        if not path.is_file():
            raise ValueError(f"{run}: no {path.name}; run launchers/evaluate.py --run {run} again")
        with np.load(path, allow_pickle=False) as stored:
            found.append({key: stored[key] for key in ("keys", "presence", "truth")})
            outputs.append(stored["outputs"])
        results.append(result)
        if not np.array_equal(found[0]["keys"], found[-1]["keys"]):
            raise ValueError(f"{run} was evaluated on other samples than {runs[0]}")
    return Method(name, outputs, results, found[0]["keys"], found[0]["presence"], found[0]["truth"])


def write_comparison(methods: Sequence[Method], out: Path) -> dict[str, Any]:
    """Write ``out`` (Markdown), the same as HTML with the plots inside, and all figures as JSON beside it.

    Args:
        methods: the first is the one that the others are compared with, seed by seed.
        out: ``.md``.

    Returns:
        The figures.

    Raises:
        ValueError: methods with other samples, targets or numbers of seeds.
    """
    first = methods[0]
    target = first.results[0]["target"]
    for other in methods[1:]:
        if not np.array_equal(other.keys, first.keys) or other.results[0]["target"] != target:
            raise ValueError(f"{other.name} and {first.name} were evaluated on other samples: nothing is paired")
        if len(other.outputs) != len(first.outputs):
            raise ValueError(f"{other.name} has {len(other.outputs)} seeds, {first.name} {len(first.outputs)}")
    figures = _figures(methods, target)
    out.parent.mkdir(parents=True, exist_ok=True)
    plots = {"metrics.png": _draw_metrics, "patterns.png": _draw_patterns}
    if target != "regression":
        plots["calibration.png"] = _draw_calibration
    names = []
    for ending, draw in plots.items():
        path = out.with_name(f"{out.stem}-{ending}")
        draw(methods, figures, target, path)
        names.append(path)
    blocks = _blocks(methods, figures, target)
    _write(out, _markdown(blocks, names))
    _write(out.with_suffix(".html"), _html(blocks, names))
    _write(out.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")
    return figures


def _figures(methods: Sequence[Method], target: str) -> dict[str, Any]:
    """Estimates of every metric, comparisons by the main one, and metrics by pattern."""
    main = DEFAULT[target]
    first = methods[0]
    rows = []
    for method in methods:
        estimates = {name: _estimate(estimate(m, method.outputs, method.truth)) for name, m in METRICS[target].items()}
        versus = None
        if method is not first:
            metric = METRICS[target][main]
            versus = _compared(compare(metric, first.outputs, method.outputs, first.truth))
        rows.append({"method": method.name, "metrics": estimates, "first_minus_this": versus})
    return {
        "target": target,
        "metric": main,
        "n": len(first.truth),
        "seeds": len(first.outputs),
        "split": first.results[0]["split"],
        "labels": first.results[0]["labels"],
        "methods": rows,
        "patterns": _patterns(methods, target),
    }


def _estimate(found: Estimate) -> dict[str, Any]:
    return {"mean": found.value, "std": found.std, "ci95": [found.low, found.high]}


def _compared(found: Comparison) -> dict[str, Any]:
    return {
        "difference": found.difference,
        "ci95": [found.low, found.high],
        "p_bootstrap": found.p_bootstrap,
        "p_permutation": found.p_permutation,
    }


def _patterns(methods: Sequence[Method], target: str) -> list[dict[str, Any]]:
    """The main metric of each method by presence pattern, mean over the seeds; patterns too rare are left out."""
    metric = METRICS[target][DEFAULT[target]]
    rows = []
    for row in methods[0].results[0]["patterns"]:
        if not row["metrics"]:
            continue
        own = methods[0].presence_N == row["mask"]
        values = {m.name: float(np.mean([metric(o[own], m.truth[own]) for o in m.outputs])) for m in methods}
        rows.append({"present": row["present"], "n": row["n"], "values": values})
    return rows


Table = tuple[list[str], list[list[str]]]
Block = str | Table


def _blocks(methods: Sequence[Method], figures: dict[str, Any], target: str) -> list[Block]:
    """What both reports say: headings (``# ...``), paragraphs and tables."""
    seeds, main = figures["seeds"], figures["metric"]
    note = "less" if main in LOWER_IS_BETTER else "more"
    return [
        "# Methods compared",
        f"{figures['n']:,} samples of the {figures['split']} split, {seeds} seed{'s' if seeds > 1 else ''} per method, "
        f"fine-tuned on {figures['labels']} labels. Values are means over the seeds, with their standard deviation and a 95 % "
        f"percentile interval of {DRAWS:,} bootstrap draws of samples" + (" and seeds." if seeds > 1 else "."),
        "## Metrics",
        _metrics_table(figures),
        f"## Is {methods[0].name} better? ({main}: {note} is better)",
        f"The difference is {methods[0].name} minus the other method, seed by seed and sample by sample. p-values are "
        "two-sided: of the paired bootstrap, and of a paired permutation test that exchanges the two outputs of a sample "
        "(of all seeds at once: it speaks of other samples, not of other seeds). "
        "They are not corrected for the number of methods.",
        _tests_table(figures),
        f"## {main} by what is present",
        _patterns_table(figures),
    ]


def _metrics_table(figures: dict[str, Any]) -> Table:
    names = list(figures["methods"][0]["metrics"])
    rows = []
    for row in figures["methods"]:
        cells = []
        for name in names:
            found = row["metrics"][name]
            low, high = found["ci95"]
            cells.append(f"{found['mean']:.3f} ± {found['std']:.3f} ({low:.3f} to {high:.3f})")
        rows.append([row["method"], *cells])
    return ["method", *names], rows


def _tests_table(figures: dict[str, Any]) -> Table:
    rows = []
    for row in figures["methods"]:
        found = row["first_minus_this"]
        if found:
            low, high = found["ci95"]
            p = [f"{found[key]:.3f}" for key in ("p_bootstrap", "p_permutation")]
            rows.append([row["method"], f"{found['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}", *p])
    head = ["against", "difference", "95 % interval", "p (bootstrap)", "p (permutation)"]
    return head, rows or [["(nothing to compare with)", "", "", "", ""]]


def _patterns_table(figures: dict[str, Any]) -> Table:
    names = [row["method"] for row in figures["methods"]]
    rows = [
        [" + ".join(row["present"]) or "nothing", f"{row['n']:,}", *(f"{row['values'][name]:.3f}" for name in names)]
        for row in figures["patterns"]
    ]
    return ["present", "samples", *names], rows


def _markdown(blocks: Sequence[Block], plots: Sequence[Path]) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, str):
            parts.append(block)
        else:
            head, rows = block
            lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            parts.append("\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]))
    return "\n\n".join([*parts, *(f"![{path.stem}]({path.name})" for path in plots)]) + "\n"


def _html(blocks: Sequence[Block], plots: Sequence[Path]) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, str):
            level = len(block) - len(block.lstrip("#"))
            tag = f"h{level}" if level else "p"
            parts.append(f"<{tag}>{escape(block.lstrip('# '))}</{tag}>")
        else:
            head, rows = block
            body = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
            parts.append(f"<table><tr>{''.join(f'<th>{escape(name)}' for name in head)}{body}</table>")
    for path in plots:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(f"<p><img alt='{escape(path.stem)}' src='data:image/png;base64,{data}'></p>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
        "table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.25em .7em;text-align:left;"
        "border-bottom:1px solid #ddd;white-space:nowrap}img{max-width:100%}"
    )
    return f"<!doctype html><meta charset=utf-8><title>Methods compared</title><style>{style}</style>{''.join(parts)}\n"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _figure(width: float, height: float) -> tuple[Any, Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(width, height))
    axis.grid(alpha=0.3)
    return plt, figure, axis


def _save(plt: Any, figure: Any, out: Path) -> None:
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _draw_metrics(methods: Sequence[Method], figures: dict[str, Any], target: str, out: Path) -> None:
    """The main metric with its interval, one row per method."""
    plt, figure, axis = _figure(6.4, 0.9 + 0.45 * len(methods))
    for i, row in enumerate(figures["methods"]):
        found = row["metrics"][figures["metric"]]
        axis.plot(found["ci95"], [i, i], color=COLOURS[i % len(COLOURS)], linewidth=2.5, solid_capstyle="round")
        axis.plot(found["mean"], i, "o", color=COLOURS[i % len(COLOURS)])
    axis.set_yticks(range(len(methods)), [method.name for method in methods])
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.set_xlabel(f"{figures['metric']} (95 % interval)")
    _save(plt, figure, out)


def _draw_patterns(methods: Sequence[Method], figures: dict[str, Any], target: str, out: Path) -> None:
    """The main metric by presence pattern, a bar per method."""
    rows = figures["patterns"]
    plt, figure, axis = _figure(6.8, 1.2 + 0.3 * max(1, len(rows)) * len(methods))
    height = 0.8 / len(methods)
    for i, method in enumerate(methods):
        places = [y + height * (i - (len(methods) - 1) / 2) for y in range(len(rows))]
        axis.barh(places, [row["values"][method.name] for row in rows], height, color=COLOURS[i % len(COLOURS)])
    axis.set_yticks(
        range(len(rows)), [f"{' + '.join(r['present']) or 'nothing'} ({r['n']:,})" for r in rows], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_xlabel(figures["metric"])
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[i % len(COLOURS)]) for i in range(len(methods))]
    names = [method.name for method in methods]
    figure.legend(handles, names, fontsize=8, frameon=False, ncols=4, loc="upper center")
    figure.tight_layout(rect=(0, 0, 1, 0.9))
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _draw_calibration(methods: Sequence[Method], figures: dict[str, Any], target: str, out: Path) -> None:
    """Share that is right against confidence, all seeds together."""
    plt, figure, axis = _figure(4.2, 4.0)
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    for i, method in enumerate(methods):
        pairs = [_confidence(output, method.truth, target) for output in method.outputs]
        confidence, right = (np.concatenate(part) for part in zip(*pairs, strict=True))
        rows = reliability(confidence, right, 10)
        sizes = [4 + 60 * n / len(confidence) for _, _, n in rows]
        axis.plot([c for c, _, _ in rows], [r for _, r, _ in rows], color=COLOURS[i % len(COLOURS)], label=method.name)
        axis.scatter([c for c, _, _ in rows], [r for _, r, _ in rows], s=sizes, color=COLOURS[i % len(COLOURS)])
    axis.set_xlabel("probability given")
    axis.set_ylabel("share that is right")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.legend(fontsize=8, frameon=False)
    _save(plt, figure, out)


def _confidence(outputs: np.ndarray, truth: np.ndarray, target: str) -> tuple[np.ndarray, np.ndarray]:
    if target == "class":
        return outputs.max(1), outputs.argmax(1) == truth
    known = np.isfinite(truth)
    return outputs[known], truth[known] == 1
