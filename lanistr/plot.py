"""``python -m lanistr plot RUN... --out DIR``: curves of one or several runs as PNG files and one self-contained HTML page."""

import base64
import html
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lanistr.training.summary import read_rows, summarise

# Okabe and Ito's colours: told apart by colour-blind readers, too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
COLUMNS = 3
SMOOTH_FROM = 60  # points: fewer are shown as they are


@dataclass(frozen=True)
class Run:
    """A run's name and its rows of ``metrics.jsonl`` and ``validation.jsonl``."""

    name: str
    rows: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One small chart: what is drawn against the step.

    Attributes:
        key: of the rows.
        title, unit: what it is, and the y axis.
        scale: factor for the reader's unit.
        log: logarithmic where all values are positive.
        floor: smallest value of the y axis.
    """

    key: str
    title: str
    unit: str = ""
    scale: float = 1.0
    log: bool = False
    floor: float | None = None


THROUGHPUT = (
    Panel("samples_per_s", "Samples", "per second", floor=0),
    Panel("tokens_per_s", "Fusion tokens", "per second", floor=0),
    Panel("data_wait", "Waiting for data", "% of the time", 100, floor=0),
    Panel("utilisation", "Useful operations", "% of peak", 100, floor=0),
    Panel("memory_mib", "Peak memory, largest rank", "GiB", 1 / 1024, floor=0),
    Panel("gpu_memory_mib", "Peak GPU memory, largest rank", "GiB", 1 / 1024, floor=0),
    Panel("health_cost", "Cost of the health monitors", "% of the time", 100, floor=0),
)
FAMILIES = {
    "rank/": ("Effective rank", "directions", 1.0, False, 0.0),
    "spread/": ("Spread", "% of squared length", 100.0, True, None),
    "std/": ("Standard deviation", "mean over features", 1.0, True, None),
    "grad_norm/": ("Gradient norm", "before clipping", 1.0, True, None),
    "mmm/": ("SimMMM", "mean on its tokens", 1.0, False, None),
    "mmm_share/": ("Share of SimMMM", "% of its average", 100.0, False, 0.0),
    "present/": ("Present", "% of samples", 100.0, False, 0.0),
}


def plot(folders: Sequence[Path], out: Path) -> str:
    """Write ``loss.png``, ``throughput.png``, ``health.png`` and ``index.html``; returns a line that says so.

    Raises:
        ValueError: a folder without ``metrics.jsonl``, or more runs than there are colours.
    """
    runs = [_read(folder) for folder in folders]
    if len(runs) > len(COLOURS):
        raise ValueError(f"{len(runs)} runs; at most {len(COLOURS)} can be told apart in one chart")
    out.mkdir(parents=True, exist_ok=True)
    sections = {
        "loss": ("Loss", loss_panels(runs)),
        "throughput": ("Throughput", [panel for panel in THROUGHPUT if _has(runs, panel.key)]),
        "health": ("Health", health_panels(runs)),
    }
    drawn = {}
    for name, (title, panels) in sections.items():
        if panels:
            draw(runs, panels, out / f"{name}.png")
            drawn[title] = out / f"{name}.png"
    page = out / "index.html"
    temporary = out / ".index.html.tmp"
    temporary.write_text(render(runs, drawn), encoding="utf-8")
    os.replace(temporary, page)
    return f"{page}: {', '.join(path.name for path in drawn.values())} of {', '.join(run.name for run in runs)}"


def _read(folder: Path) -> Run:
    rows = read_rows(folder / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{folder}: no metrics.jsonl with rows; give run folders, for example runs/demo/pretrain")
    held_out = [row for row in read_rows(folder / "validation.jsonl") if row["step"] > 0]
    return Run(str(folder), rows, held_out, summarise(folder))


def _has(runs: Sequence[Run], key: str) -> bool:
    return any(row.get(key) is not None for run in runs for row in run.rows)


def _keys(runs: Sequence[Run]) -> list[str]:
    """Keys of all rows, in the order of their first appearance."""
    return list(dict.fromkeys(key for run in runs for row in run.rows for key in row))


def loss_panels(runs: Sequence[Run]) -> list[Panel]:
    """The total, each term (they stand between the loss and the learning rate), the rate and the gradient."""
    names = dict.fromkeys(
        name
        for run in runs
        for row in run.rows
        for name in list(row)[list(row).index("loss") + 1 : list(row).index("lr")]
    )
    terms = [Panel(name, name.upper() if len(name) == 3 else name, "mean per unit", log=True) for name in names]
    ends = [Panel("lr", "Learning rate"), Panel("grad_norm", "Gradient norm", "before clipping", log=True)]
    return [
        panel for panel in [Panel("loss", "Loss", "weighted sum", log=True), *terms, *ends] if _has(runs, panel.key)
    ]


def health_panels(runs: Sequence[Run]) -> list[Panel]:
    """The figures of `lanistr.training.health`, family by family."""
    panels = []
    for family, (title, unit, scale, log, floor) in FAMILIES.items():
        for key in _keys(runs):
            if key.startswith(family) and _has(runs, key):
                panels.append(Panel(key, f"{title}: {key.removeprefix(family)}", unit, scale, log, floor))
    return panels


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Running median, centred; shorter at the ends."""
    half = window // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def draw(runs: Sequence[Run], panels: Sequence[Panel], out: Path) -> None:
    """A grid of small charts with one legend; a thin line is measured, a bold one its running median, dots are held out."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    lines = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(
        lines, COLUMNS, figsize=(4.2 * COLUMNS, 2.7 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        for run, colour in zip(runs, COLOURS, strict=False):
            _curve(axis, run, panel, colour)
        _dress(axis, panel, runs)
    if len(runs) > 1:
        handles = [Line2D([], [], color=c, linewidth=2, label=r.name) for r, c in zip(runs, COLOURS, strict=False)]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(runs), frameon=False, fontsize=9)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _curve(axis: Any, run: Run, panel: Panel, colour: str) -> None:
    points = [(row["step"], row[panel.key] * panel.scale) for row in run.rows if row.get(panel.key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    many = len(points) >= SMOOTH_FROM
    axis.plot(steps, values, color=colour, linewidth=0.8 if many else 1.6, alpha=0.35 if many else 1.0)
    if many:
        axis.plot(steps, smooth(values, len(values) // 30 + 1), color=colour, linewidth=1.8)
    dots = [(row["step"], row[panel.key] * panel.scale) for row in run.held_out if row.get(panel.key) is not None]
    if dots:
        axis.plot(
            *zip(*dots, strict=True), "o", color=colour, markersize=4.5, markeredgecolor="white", label="held out"
        )


def _dress(axis: Any, panel: Panel, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_title(panel.title, fontsize=10, loc="left", fontweight="bold")
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(panel.unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    values = [row[panel.key] for run in runs for row in run.rows if row.get(panel.key) is not None]
    if panel.log and min(values) > 0 and max(values) > 5 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif panel.floor is not None:
        axis.set_ylim(bottom=panel.floor)
    if any(row.get(panel.key) is not None for run in runs for row in run.held_out):
        axis.plot([], [], "o", color="#777777", markersize=4.5, label="held out")
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(handles[-1:], labels[-1:], fontsize=8, frameon=False, loc="best")


def _number(summary: Mapping[str, Any], key: str, form: str, scale: float = 1.0) -> str:
    value = summary.get(key)
    return "-" if value is None else format(value * scale, form)


TABLE = {
    "steps": partial(_number, key="steps", form=",.0f"),
    "samples seen": partial(_number, key="samples", form=",.0f"),
    "minutes": partial(_number, key="wall_s", form=",.1f", scale=1 / 60),
    "last loss": partial(_number, key="loss", form=".4f"),
    "samples/s": partial(_number, key="samples_per_s", form=",.1f"),
    "tokens/s": partial(_number, key="tokens_per_s", form=",.0f"),
    "data wait": partial(_number, key="data_wait", form=".1%"),
    "of peak": partial(_number, key="utilisation", form=".0%"),
    "memory, GiB": partial(_number, key="memory_mib", form=".2f", scale=1 / 1024),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1e; background: #fff; max-width: 1400px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; white-space: nowrap } th { font-weight: 600; color: #555 }
th:first-child, td:first-child { text-align: left } tbody tr { border-top: 1px solid #eee }
i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em } img { width: 100% }
p { color: #555; max-width: 60rem }
"""
NOTES = {
    "Loss": "Training terms of each interval; dots are the held-out samples under fixed masks.",
    "Throughput": "Sums over all ranks; waits and memory are the largest of any rank.",
    "Health": "Embeddings before the fusion encoder's last norm. Spread is the share of their mean squared length that differs "
    "between samples: it falls towards zero when they all become the same. Effective rank is the exponential of the entropy of "
    "the normalised singular values.",
}


def render(runs: Sequence[Run], drawn: Mapping[str, Path]) -> str:
    """The page, images included."""
    head = "".join(f"<th>{name}</th>" for name in ("run", *TABLE))
    body = ""
    for run, colour in zip(runs, COLOURS, strict=False):
        cells = "".join(f"<td>{cell(run.summary)}</td>" for cell in TABLE.values())
        body += f'<tr><td><i style="background:{colour}"></i>{html.escape(run.name)}</td>{cells}</tr>'
    sections = ""
    for title, path in drawn.items():
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        image = f'<img alt="{title} curves" src="data:image/png;base64,{data}">'
        sections += f"<h2>{title}</h2><p>{NOTES[title]}</p>{image}"
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>lanistr runs</title><style>{STYLE}</style></head><body><h1>Training runs</h1>{table}{sections}</body></html>\n"
    )
