"""The figures of `lanistr.evaluation.importance` as JSON, Markdown and a drawing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lanistr.evaluation.figures import write_figures

MODALITY, SYNERGY, REDUNDANCY, QUIET = "#1f5fa8", "#3b8f5a", "#c8541e", "#9a9a9a"
SHOWN_PAIRS = 8


def write_importance(found: Mapping[str, Any], out: Path) -> str:
    """Write ``importance.json``, ``importance.md`` and ``importance.png`` into a folder; returns the Markdown."""
    return write_figures(found, markdown(found), draw, out, "importance")


def markdown(found: Mapping[str, Any]) -> list[str]:
    """The report, line by line."""
    about = found["about"]
    return [
        f"# Which modalities of {about['dataset']} are worth having",
        "",
        f"{about['labels']} labelled samples of the train split, embeddings of run `{about['run']}`, "
        f"{found['repeats']} x {found['folds']} held-out folds by group, {about['draws']} bootstrap draws. A value is the "
        "share of the held-out variance that a probe explains (of classes: the Brier skill score), from embeddings, a table's "
        "columns, and plain statistics of texts, images and series: what the encoder has not learnt to read is not "
        "nothing. The interval (95 %) is of labelled samples drawn, fitted and scored anew. All of it holds for this "
        "encoder and this number of labels.",
        "",
        "## What to do",
        "",
        *(f"* **{row['modality']}: {row['verdict']}** ({row['why']})." for row in found["advice"]),
        f"* **Order:** {_order(found)}",
        "",
        "![importance](importance.png)",
        "",
        "## Modalities",
        "",
        *_modalities(found),
        "",
        "Shapley values: what a modality adds, averaged over all orders in which modalities could join; they sum to the "
        "value of all. A sample that lacks a modality has the mean of those that have it, and a flag.",
        "",
        "## Pairs",
        "",
        "The Shapley interaction index: above zero the two tell more together than apart (synergy), below they tell the "
        "same (redundancy).",
        "",
        "| pair | index (95 % interval) | |",
        "|---|---|---|",
        *(f"| {' + '.join(row['pair'])} | {_figure(row)} | {_verdict(row)} |" for row in found["pairs"]),
        "",
        *_columns(found),
        "## More labels, or other modalities?",
        "",
        "| labels | value of all modalities | spread |",
        "|---|---|---|",
        *(f"| {row['labels']} | {row['value']:.3f} | {row['spread']:.3f} |" for row in found["curve"]),
        "",
        f"The run's own fused embedding: {_figure(found['fused'])}.",
        "",
        "## All subsets",
        "",
        "| modalities | value (95 % interval) | accuracy |",
        "|---|---|---|",
        *(
            f"| {' + '.join(row['modalities'])} | {_figure(row)} | {_accuracy(row['accuracy'])} |"
            for row in sorted(found["subsets"], key=lambda row: -row["value"])
        ),
    ]


def _order(found: Mapping[str, Any]) -> str:
    """What may be said of the ranking, and what may not."""
    rows = found["order"]
    told = " ".join(f"{'>' if row['told'] else '?'} {row['pair'][1]}" for row in rows)
    line = f"{rows[0]['pair'][0]} {told}."
    open_ = [" from ".join(row["pair"]) for row in rows if not row["told"]]
    if open_:
        line += (
            f" {found['about']['labels']} labels cannot tell {', nor '.join(open_)}: the interval of the difference holds "
            "zero. Label more before you choose between them."
        )
    return line


def _modalities(found: Mapping[str, Any]) -> list[str]:
    alone = {row["modalities"][0]: row for row in found["subsets"] if len(row["modalities"]) == 1}
    lines = [
        "| modality | Shapley value (95 % interval) | alone | missing | bytes of a sample | MFLOP to encode |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["shapley"]:
        name = row["modality"]
        cost = found["cost"][name]
        lines.append(
            f"| {name} | {_figure(row)} | {alone[name]['value']:.3f} | {found['missing'][name]:.0%} "
            f"| {cost['bytes']:,.0f} | {cost['flops'] / 1e6:,.1f} |"
        )
    return lines


def _columns(found: Mapping[str, Any]) -> list[str]:
    if not found["columns"]:
        return []
    shown = [row for row in found["column_pairs"] if row["found"]]
    together = [f"* {' and '.join(row['pair'])}: {_figure(row)}" for row in shown] or [
        f"* none that holds all {len(found['column_pairs'])} tests at once"
    ]
    return [
        "## Columns",
        "",
        "| column | value (95 % interval) | alone | on top of everything else |",
        "|---|---|---|---|",
        *(
            f"| {row['modality']}/{row['column']} | {_figure(row)} | {row['alone']['value']:+.3f} "
            f"| {row['on_top']['value']:+.3f} |"
            for row in found["columns"]
        ),
        "",
        "A value is the mean of the two beside it. A column and another modality that tell together what neither tells "
        "alone:",
        "",
        *together,
        "",
    ]


def _figure(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    return f"{row['value']:+.3f} ({low:+.3f} to {high:+.3f})"


def _verdict(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    return "synergy" if low > 0 else "redundancy" if high < 0 else ""


def _accuracy(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw(found: Mapping[str, Any], out: Path) -> None:
    """Shapley values, pairs and columns, each with its interval."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    pairs = [(" + ".join(row["pair"]), row) for row in found["pairs"]]
    strongest = sorted(found["column_pairs"], key=lambda row: -abs(row["value"]))[:SHOWN_PAIRS]
    pairs += [(" + ".join(row["pair"]), row) for row in strongest if row["found"]]
    panels = [("Shapley value of each modality", [(row["modality"], row) for row in found["shapley"]], False)]
    panels += [("together more (+) or the same (-)", pairs, True)]
    if found["columns"]:
        panels += [("value of each column", [(row["column"], row) for row in found["columns"]], False)]
    tallest = max(len(rows) for _, rows, _ in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 1.4 + 0.32 * tallest), squeeze=False)
    for axis, (title, rows, signed) in zip(axes[0], panels, strict=True):
        _draw_rows(axis, rows, signed)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("share of held-out variance", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _draw_rows(axis: Any, rows: Sequence[tuple[str, Mapping[str, Any]]], signed: bool) -> None:
    for i, (_, row) in enumerate(rows):
        verdict = _verdict(row)
        colour = {"synergy": SYNERGY if signed else MODALITY, "redundancy": REDUNDANCY, "": QUIET}[verdict]
        axis.plot(row["ci95"], [i, i], color=colour, linewidth=2.5, solid_capstyle="round")
        axis.plot(row["value"], i, "o", color=colour, markersize=5)
    axis.axvline(0, color="#444444", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
