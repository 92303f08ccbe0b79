"""The figures of `lanistr.evaluation.robustness` as JSON, Markdown and a drawing."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lanistr.evaluation.figures import write_figures
from lanistr.metrics import LOWER_IS_BETTER

COLUMNS = 3
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")  # Okabe and Ito


def write_robustness(found: Mapping[str, Any], out: Path) -> str:
    """Write ``robustness.json``, ``robustness.md`` and ``robustness.png`` into a folder; returns the Markdown."""
    return write_figures(found, markdown(found), draw, out, "robustness")


def markdown(found: Mapping[str, Any]) -> list[str]:
    """The card, line by line: a table per modality, with a row per run and a column per rate."""
    better = "less" if found["metric"] in LOWER_IS_BETTER else "more"
    lines = [
        f"# {found['dataset']}: when modalities are missing at test time",
        "",
        f"{found['metric']} ({better} is better) on {found['samples']} labelled samples of the {found['split']} split, "
        f"against the share of samples whose modality is hidden; the draw is over all samples, also those that lack it "
        f"anyway. In brackets the 95 % interval, over samples and {found['seeds']} draws.",
        "",
        "![robustness](robustness.png)",
        "",
        "| run | labels | pretrained from | hidden in training | modality dropout |",
        "|---|---|---|---|---|",
        *(_about(run) for run in found["runs"]),
    ]
    for i, hidden in enumerate(_panels(found)):
        rates = " | ".join(f"{rate:.0%}" for rate in found["rates"])
        lines += ["", f"## {_name(hidden)}", "", f"| run | {rates} |", "|---" * (1 + len(found["rates"])) + "|"]
        lines += [f"| {run['run']} | {' | '.join(map(_figure, run['curves'][i]['rows']))} |" for run in found["runs"]]
    return lines


def _panels(found: Mapping[str, Any]) -> list[list[str]]:
    return [curve["hidden"] for curve in found["runs"][0]["curves"]]


def _name(hidden: Sequence[str]) -> str:
    return f"Without {hidden[0]}" if len(hidden) == 1 else f"All of {', '.join(hidden)}, each hidden on its own"


def _about(run: Mapping[str, Any]) -> str:
    hidden = ", ".join(f"{name} {rate:.0%}" for name, rate in run["train_hidden"].items()) or "-"
    return f"| {run['run']} | {run['labels']} | {run['from'] or '-'} | {hidden} | {run['modality_dropout']:.0%} |"


def _figure(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return "undefined"
    return f"{row['value']:.3f} ({_number(row['ci95'][0])} to {_number(row['ci95'][1])})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw(found: Mapping[str, Any], out: Path) -> None:
    """A chart per modality on one scale, a line per run with its interval."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = _panels(found)
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 2.8 * lines), sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for i, (axis, hidden) in enumerate(zip(axes.flat, panels, strict=False)):
        for number, run in enumerate(found["runs"]):
            _line(axis, run["curves"][i]["rows"], COLOURS[number % len(COLOURS)], run["run"])
        axis.set_title(f"without {hidden[0]}" if len(hidden) == 1 else "all, each on its own", fontsize=10, loc="left")
        axis.set_xlabel("% of samples from which it is hidden", fontsize=8)
        axis.tick_params(labelsize=8, labelleft=True)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if i % columns == 0:
            axis.set_ylabel(found["metric"].replace("_", " "), fontsize=8)
    if len(found["runs"]) > 1:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper left", frameon=False, fontsize=8)
    temporary = out.with_name(f".{out.name}")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    os.replace(temporary, out)


def _line(axis: Any, rows: Sequence[Mapping[str, Any]], colour: str, label: str) -> None:
    known = [row for row in rows if row["value"] is not None and None not in row["ci95"]]
    rates = [100 * row["rate"] for row in known]
    low, high = ([row["ci95"][side] for row in known] for side in (0, 1))
    axis.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.plot(rates, [row["value"] for row in known], "o-", color=colour, markersize=3.5, linewidth=1.6, label=label)
