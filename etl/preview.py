"""One self-contained HTML page that shows a gold dataset: sample cards, missingness, labels, lengths, lineage.

The page needs no network and no script. It samples, so that its weight does not grow with the dataset. Text comes from
the tokens (raw text is not stored), so what is shown is what the model sees.
"""

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from etl.stats import read_indices, share
from lanistr.manifest import SPLITS, Manifest
from lanistr.transforms import FIRST_KNOWN_ID, MISSING_ID, UNSEEN_ID, SeriesSpec, TabularSpec, load_tokenizer, read_npy

COLOURS = ("#1f5fa8", "#c4561c", "#2e7d4f", "#7a4fa3")


def preview(gold: Path, out: Path, cards: int = 24) -> None:
    """Write the page.

    Args:
        gold: dataset.
        out: HTML file, written atomically.
        cards: samples shown, spread over the missingness patterns.

    Raises:
        ValueError: not a gold dataset.
    """
    manifest = Manifest.load(gold)
    samples = read_indices(gold, manifest)
    style = (files("etl") / "preview.css").read_text(encoding="utf-8")
    title = escape(manifest.name)
    body = [
        f"<h1>{title}</h1><p class=sub>{samples.height:,} samples, content {manifest.content_id[:16]}</p>",
        section("Which modalities are there", missingness(samples, manifest)),
        section("Labels per split", labels(samples, manifest)) if manifest.labels else "",
        section("Lengths where present", lengths(samples, manifest)),
        section("Samples", "<div class=cards>" + "".join(_cards(gold, manifest, samples, cards)) + "</div>"),
        section("Quarantine", rows_table(("reason", "records"), manifest.quarantine)),
        section("Rows at each stage", rows_table(("stage", "rows"), manifest.counts)),
        section("Lineage", rows_table(("raw file", "sha256"), {p["file"]: p["sha256"] for p in manifest.parents})),
    ]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{style}</style>{''.join(body)}</html>"
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)


def section(title: str, content: str) -> str:
    """A titled part of the page."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def rows_table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    """Two columns."""
    cells = "".join(
        f"<tr><td>{escape(str(k))}<td>{f'{v:,}' if isinstance(v, int) else escape(str(v))}" for k, v in rows.items()
    )
    return f"<table><tr><th>{head[0]}<th>{head[1]}{cells}</table>" if rows else "<p class=sub>none</p>"


def missingness(samples: pl.DataFrame, manifest: Manifest) -> str:
    """The most frequent presence patterns as dots, each with its bar (after UpSet, Lex et al. 2014)."""
    counts = samples.group_by("presence").len().sort(["len", "presence"], descending=[True, False]).head(16)
    names = list(manifest.modalities)
    most = counts["len"].max()
    head = "".join(f"<th>{escape(name)}" for name in names)
    rows = []
    for mask, n in counts.iter_rows():
        dots = "".join(f"<td class={'on' if mask & manifest.bit(name) else 'off'}>&#9679;" for name in names)
        rows.append(f"<tr>{dots}<td class=num>{n:,}<td class=num>{share(n, samples.height)}<td>{bar(n / most, 0)}")
    missing = "".join(
        f"<td class=num>{share(samples.filter((pl.col('presence') & manifest.bit(n)) == 0).height, samples.height)}"
        for n in names
    )
    return (
        f"<table class=upset><tr>{head}<th>samples<th><th>{''.join(rows)}<tr class=total>{missing}<td>missing</table>"
    )


def bar(fraction: float, colour: int) -> str:
    """A horizontal bar of at most 220 px."""
    return f"<span class=bar style='width:{220 * fraction:.1f}px;background:{COLOURS[colour % len(COLOURS)]}'></span>"


def labels(samples: pl.DataFrame, manifest: Manifest) -> str:
    """Share of every class in every split."""
    names = [*manifest.labels, "(unlabelled)"]
    rows = []
    for label, name in enumerate(names):
        index = label if label < len(manifest.labels) else -1
        cells = ""
        for i, split in enumerate(SPLITS):
            part = samples.filter(pl.col("split") == split)
            n = part.filter(pl.col("label") == index).height
            cells += f"<td class=num>{n:,}<td>{bar(n / max(part.height, 1), i)}"
        rows.append(f"<tr><td>{escape(name)}{cells}")
    head = "".join(f"<th>{split}<th>" for split in SPLITS)
    return f"<table><tr><th>label{head}{''.join(rows)}</table>"


def lengths(samples: pl.DataFrame, manifest: Manifest) -> str:
    """Histograms of tokens and steps; a modality of constant length is a line of text."""
    parts = []
    for i, (name, schema) in enumerate(manifest.modalities.items()):
        found = samples[f"length/{name}"].filter(samples[f"length/{name}"] > 0).to_numpy()
        if schema.kind in ("image", "tabular") or not len(found):
            continue
        counts, edges = np.histogram(found, bins=min(24, int(np.ptp(found)) + 1))
        parts.append(f"<figure>{_columns(counts, i)}<figcaption>{escape(name)}: {found.min()} to {found.max()}, ")
        parts.append(f"median {np.median(found):.0f} ({len(edges) - 1} bins)</figcaption></figure>")
    return "".join(parts) or "<p class=sub>every sample has the same length</p>"


def _columns(counts: np.ndarray, colour: int) -> str:
    width, height = 300 / len(counts), 80
    rects = "".join(
        f"<rect x={i * width:.1f} y={height - height * n / counts.max():.1f} width={width - 1:.1f} "
        f"height={height * n / counts.max():.1f} fill='{COLOURS[colour % len(COLOURS)]}'/>"
        for i, n in enumerate(counts)
    )
    return f"<svg width=300 height={height} role=img>{rects}</svg>"


def _cards(gold: Path, manifest: Manifest, samples: pl.DataFrame, wanted: int) -> Iterator[str]:
    """Cards of samples that come from every pattern in turn, the most frequent first, in the order of their keys."""
    turn = pl.int_range(pl.len()).over("presence")
    frequency = pl.len().over("presence")
    chosen = samples.sort("key").with_columns(turn=turn, frequency=frequency)
    chosen = chosen.sort(["turn", "frequency", "presence"], descending=[False, True, False]).head(wanted)
    tokenizer = load_tokenizer(gold / manifest.tokenizer.file) if manifest.tokenizer else None
    draw = {"text": _text, "image": _image, "tabular": _tabular, "timeseries": _series}
    for row in chosen.iter_rows(named=True):
        label = manifest.labels[row["label"]] if row["label"] >= 0 else "unlabelled"
        parts = []
        for name, schema in manifest.modalities.items():
            if not row["presence"] & manifest.bit(name):
                parts.append(f"<p class=absent>no {escape(name)}</p>")
                continue
            members = {member: _member(gold / row["shard"], row, member) for member in schema.members}
            parts.append(draw[schema.kind](members, schema.spec, tokenizer))
        head = f"<h3>{row['key']}</h3><p class=sub>{row['split']}, {escape(label)}</p>"
        yield f"<article>{head}{''.join(parts)}</article>"


def _member(shard: Path, row: Mapping[str, Any], member: str) -> bytes:
    with open(shard, "rb") as file:
        file.seek(row[f"offset/{member}"])
        return file.read(row[f"size/{member}"])


def _text(members: Mapping[str, bytes], _: Mapping[str, Any], tokenizer: Any) -> str:
    ids = read_npy(members["tok.npy"]).tolist()
    text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
    return f"<p class=text>{escape(text[:400])}{'&hellip;' if len(text) > 400 else ''}</p>"


def _image(members: Mapping[str, bytes], _: Mapping[str, Any], __: Any) -> str:
    encoded = base64.b64encode(members["jpg"]).decode()
    return f"<img alt='' src='data:image/jpeg;base64,{encoded}'>"


def _tabular(members: Mapping[str, bytes], spec: Mapping[str, Any], _: Any) -> str:
    columns = TabularSpec.model_validate(spec)
    row = read_npy(members["tab.npy"]).tolist()
    cells = {c.name: "&ndash;" if np.isnan(v) else f"{v:g}" for c, v in zip(columns.numeric, row, strict=False)}
    for column, value in zip(columns.categorical, row[len(columns.numeric) :], strict=True):
        cells[column.name] = _category(value, column.values)
    lines = "".join(f"<tr><td>{escape(name)}<td>{value}" for name, value in cells.items())
    return f"<table class=row>{lines}</table>"


def _category(value: float, values: Sequence[str]) -> str:
    if np.isnan(value) or int(value) == MISSING_ID:
        return "&ndash;"
    position = int(value) - FIRST_KNOWN_ID
    if int(value) == UNSEEN_ID:
        return "(unseen)"
    return escape(values[position][:40]) if position < len(values) else f"(bucket {position - len(values)})"


def _series(members: Mapping[str, bytes], spec: Mapping[str, Any], _: Any) -> str:
    """At most four variables, each scaled to its own range; gaps stay gaps."""
    series = SeriesSpec.model_validate(spec)
    values, observed = read_npy(members["ts.npy"]), read_npy(members["tsmask.npy"]).astype(bool)
    lines, legend = [], []
    for channel, name in enumerate(series.variables[:4]):
        seen = np.flatnonzero(observed[:, channel])
        if not len(seen):
            continue
        y = values[seen, channel]
        y = 54 - 48 * (y - y.min()) / (np.ptp(y) or 1)
        x = 4 + 252 * seen / max(len(values) - 1, 1)
        colour = COLOURS[channel]
        runs = np.split(np.arange(len(seen)), np.flatnonzero(np.diff(seen) > 1) + 1)
        for run in runs:
            points = " ".join(f"{x[i]:.1f},{y[i]:.1f}" for i in run)
            dot = f"<circle cx={x[run[0]]:.1f} cy={y[run[0]]:.1f} r=1.5 fill='{colour}'/>" if len(run) == 1 else ""
            lines.append(dot or f"<polyline points='{points}' fill=none stroke='{colour}' stroke-width=1.3 />")
        legend.append(f"<span style='color:{colour}'>{escape(name)}</span>")
    return f"<svg width=260 height=60 role=img>{''.join(lines)}</svg><p class=legend>{' '.join(legend)}</p>"
