"""The figures of `lanistr.evaluation.attribution` as JSON, Markdown and a drawing."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lanistr.evaluation.figures import write_figures
from lanistr.metrics import LOWER_IS_BETTER

WHOLE, WITHOUT, ALONE, LOOK, QUIET = "#444444", "#d55e00", "#0072b2", "#009e73", "#9a9a9a"
SHOWN_COLUMNS = 20


def write_attribution(found: Mapping[str, Any], out: Path) -> str:
    """Write ``importance.json``, ``importance.md`` and ``importance.png`` into a folder; returns the Markdown."""
    return write_figures(found, markdown(found), draw, out, "importance")


def markdown(found: Mapping[str, Any]) -> list[str]:
    """The report, line by line."""
    better = "less" if found["metric"] in LOWER_IS_BETTER else "more"
    return [
        f"# What {found['run']} rests on",
        "",
        f"{found['dataset']}, {found['split']} split, {found['samples']} labelled samples; {found['metric']} "
        f"({better} is better): {_figure(found['whole'])} with all that there is, {_figure(found['nothing'])} with "
        "everything hidden. In brackets 95 % intervals over samples.",
        "",
        "![importance](importance.png)",
        "",
        "## What is lost without it",
        "",
        "Over the samples that have the modality. `adds`: how much better the model is with it than without, paired.",
        "",
        "| modality | samples | with all | without it | it alone | adds | p |",
        "|---|---|---|---|---|---|---|",
        *(_ablation(row) for row in found["modalities"]),
        "",
        "A model that was trained with a modality may need it more than one trained without: this is about this model.",
        "",
        "## Where it looks",
        "",
        f"The fusion encoder's attention, mean over heads and over {found['looked_at']} samples (of these, those that have "
        f"the source); query: {found['attention']['query']}. `tokens`: the source's share of the tokens, what an even look "
        "would give. Attention says where a model looks, not what it needs: that is the table above.",
        "",
        *_attention(found["attention"]["sources"]),
        *_columns(found["columns"]),
    ]


def _ablation(row: Mapping[str, Any]) -> str:
    if not row["n"]:
        return f"| {row['modality']} | 0 | - | - | - | - | - |"
    adds = row["adds"]
    figures = " | ".join(_figure(row[key]) for key in ("whole", "without", "alone"))
    return f"| {row['modality']} | {row['n']} | {figures} | {_figure(adds, '+.3f')} | {adds['p']:.3f} |"


def _attention(sources: Sequence[Mapping[str, Any]]) -> list[str]:
    layers = max(len(row.get("layers", [])) for row in sources)
    lines = [
        f"| source | samples | share | tokens | {' | '.join(f'layer {i + 1}' for i in range(layers))} |",
        "|---" * (4 + layers) + "|",
    ]
    for row in sources:
        if row["n"]:
            own = " | ".join(f"{share:.1%}" for share in row["layers"])
            lines.append(f"| {row['source']} | {row['n']} | {row['share']:.1%} | {row['tokens']:.1%} | {own} |")
    return lines


def _columns(columns: Sequence[Mapping[str, Any]]) -> list[str]:
    if not columns:
        return []
    return [
        "",
        "## Which columns it reads",
        "",
        "TabNet's masks, each step weighted by what it puts out (Arik and Pfister 2021); mean over rows, and the share of "
        "rows in which the column is first.",
        "",
        "| column | share | first in |",
        "|---|---|---|",
        *(f"| {row['modality']}/{row['cell']} | {row['share']:.1%} | {row['first']:.0%} |" for row in columns),
    ]


def _figure(row: Mapping[str, Any], form: str = ".3f") -> str:
    if row["value"] is None:
        return "undefined"
    low, high = (format(end, form) if end is not None else "-" for end in row["ci95"])
    return f"{format(row['value'], form)} ({low} to {high})"


def draw(found: Mapping[str, Any], out: Path) -> None:
    """Ablation, attention and columns side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = 3 if found["columns"] else 2
    tallest = max(2 * len(found["modalities"]), min(SHOWN_COLUMNS, len(found["columns"])))
    figure, axes = plt.subplots(1, panels, figsize=(4.4 * panels, 1.9 + 0.28 * tallest), layout="constrained")
    _draw_ablation(axes[0], found)
    _draw_attention(axes[1], [row for row in found["attention"]["sources"] if row["n"]])
    if panels == 3:
        shown = found["columns"][:SHOWN_COLUMNS]
        axes[2].barh(range(len(shown)), [100 * row["share"] for row in shown], color=LOOK, height=0.6)
        _finish(axes[2], [row["cell"] for row in shown], "TabNet's masks by column", "% of the attention to columns")
    temporary = out.with_name(f".{out.name}")
    figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
    os.replace(temporary, out)


def _draw_ablation(axis: Any, found: Mapping[str, Any]) -> None:
    rows = [row for row in found["modalities"] if row["n"]]
    for i, row in enumerate(rows):
        for shift, key, colour in ((-0.2, "whole", WHOLE), (0.0, "without", WITHOUT), (0.2, "alone", ALONE)):
            if row[key]["value"] is None:
                continue
            if None not in row[key]["ci95"]:
                axis.plot(row[key]["ci95"], [i + shift] * 2, color=colour, linewidth=2, alpha=0.5)
            label = {"whole": "with all", "without": "without it", "alone": "it alone"}[key]
            axis.plot(row[key]["value"], i + shift, "o", color=colour, markersize=5, label=label if i == 0 else None)
    if found["nothing"]["value"] is not None:
        axis.axvline(found["nothing"]["value"], color=QUIET, linewidth=1, linestyle="--", label="everything hidden")
    _finish(axis, [f"{row['modality']} ({row['n']})" for row in rows], "samples that have it", found["metric"])
    axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)


def _draw_attention(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    axis.barh(range(len(rows)), [100 * row["share"] for row in rows], color=LOOK, height=0.6, label="attention")
    axis.plot(
        [100 * row["tokens"] for row in rows], range(len(rows)), "|", color=WHOLE, markersize=14, markeredgewidth=2,
        label="share of the tokens",
    )  # fmt: skip
    _finish(axis, [row["source"] for row in rows], "attention in the fusion encoder", "% of the attention")
    axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)


def _finish(axis: Any, names: Sequence[str], title: str, label: str) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(label.replace("_", " "), fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
