"""One self-contained HTML page that shows a gold dataset: sample cards, missingness, labels, values, leaks, lineage.

The page needs no network and no script, follows the reader's light or dark theme, and fits a narrow window. It samples
(see `etl.summary`), so that its weight does not grow with the dataset.
"""

import os
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from etl.cards import cards
from etl.stats import share
from etl.summary import Categories, Numbers, Summary, in_full
from lanistr.manifest import SPLITS

MAX_BINS = 24
MAX_PATTERNS = 16


def preview(gold: Path, out: Path, n_cards: int = 24, redact: bool | None = None) -> None:
    """Write the page.

    Args:
        gold: dataset.
        out: HTML file, written atomically.
        n_cards: samples shown, spread over the missingness patterns.
        redact: see `etl.summary.Summary`.

    Raises:
        ValueError: not a gold dataset.
    """
    summary = Summary(gold, redact)
    manifest = summary.manifest
    style = (files("etl") / "preview.css").read_text(encoding="utf-8")
    title = escape(manifest.name)
    hidden = "<p class=note>Texts, images and identifying values are hidden; --no-redact shows them.</p>"
    body = [
        f"<h1>{title}</h1><p class=sub>{_subtitle(summary)}</p>{hidden if summary.redact else ''}",
        section("Which modalities are there", missingness(summary)),
        section("Labels per split", labels(summary)) if manifest.labels else "",
        section("What predicts the label by itself", leaks(summary)) if manifest.labels else "",
        section("Lengths", lengths(summary)),
        section("Values", values(summary.columns)),
        section("Samples", f"<div class=cards>{''.join(cards(summary, n_cards))}</div>"),
        section("Quarantine", rows_table(("reason", "records"), manifest.quarantine)),
        section("Rows at each stage", rows_table(("stage", "rows"), manifest.counts)),
        section("Lineage", rows_table(("what", ""), dict(summary.lineage))),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<meta name=color-scheme content='light dark'><title>{title}</title>"
        f"<style>{style}</style><main>{''.join(body)}</main></html>"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)


def _subtitle(summary: Summary) -> str:
    parts = [f"{split} {summary.manifest.n(split):,}" for split in SPLITS]
    size = sum(shard.bytes for shard in summary.manifest.shards) / 2**20
    return f"{summary.n:,} samples ({', '.join(parts)}), {size:,.1f} MiB, content {summary.manifest.content_id[:16]}"


def section(title: str, content: str) -> str:
    """A titled part of the page, which scrolls sideways by itself where it is too wide."""
    return f"<section><h2>{escape(title)}</h2><div class=wide>{content}</div></section>"


def rows_table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    """Two columns."""
    cells = "".join(
        f"<tr><td>{escape(str(k))}<td class={'num' if isinstance(v, int) else 'text'}>"
        f"{f'{v:,}' if isinstance(v, int) else escape(str(v))}"
        for k, v in rows.items()
    )
    return f"<table><tr><th>{head[0]}<th>{head[1]}{cells}</table>" if rows else "<p class=sub>none</p>"


def missingness(summary: Summary) -> str:
    """Presence patterns as joined dots, each with its bar, and how often each modality is there (after UpSet, Lex 2014)."""
    manifest, names = summary.manifest, list(summary.manifest.modalities)
    most = summary.patterns[0][1]
    rows = []
    for mask, n in summary.patterns[:MAX_PATTERNS]:
        dots = "".join(_dot(mask, i, len(names)) for i in range(len(names)))
        rows.append(f"<tr>{dots}<td class=num>{n:,}<td class=num>{share(n, summary.n)}<td>{bar(n / most, 0)}")
    if len(summary.patterns) > MAX_PATTERNS:
        rest = sum(n for _, n in summary.patterns[MAX_PATTERNS:])
        more = len(summary.patterns) - MAX_PATTERNS
        rows.append(f"<tr><td colspan={len(names)} class=sub>{more} more<td class=num>{rest:,}<td class=num>")
    head = "".join(f"<th>{escape(name)}" for name in names)
    there = "".join(f"<td>{_level(summary.present(name) / max(summary.n, 1))}" for name in names)
    assert len(manifest.modalities) == len(names)
    return f"<table class=upset><tr>{head}<th>samples<th><th><tr class=total>{there}<td colspan=3 class=left>present{''.join(rows)}</table>"


def _dot(mask: int, i: int, n: int) -> str:
    """A cell of the matrix; a line joins the first to the last modality that is there."""
    here = [bit for bit in range(n) if mask >> bit & 1]
    on = i in here
    line = ""
    if len(here) > 1 and here[0] <= i <= here[-1]:
        line = " from" if i == here[0] else " to" if i == here[-1] else " through"
    return f"<td class='{'on' if on else 'off'}{line}' title={'present' if on else 'absent'}><i></i>"


def _level(fraction: float) -> str:
    return f"<span class=level><span class=f0 style='width:{100 * fraction:.1f}%'></span></span>{fraction:.1%}"


def bar(fraction: float, colour: int) -> str:
    """A horizontal bar of at most 14 em; nothing for nothing."""
    if not fraction:
        return ""
    return f"<span class='bar f{colour % 4}' style='width:{14 * fraction:.2f}em'></span>"


def labels(summary: Summary) -> str:
    """Count and share of every class in every split."""
    totals = [sum(counts[i] for _, counts in summary.labels) for i in range(len(SPLITS))]
    rows = []
    for name, counts in summary.labels:
        if name == "(unlabelled)" and not any(counts):
            continue
        parts = [(n, of, i) for i, (n, of) in enumerate(zip(counts, totals, strict=True))]
        cells = "".join(
            f"<td class=num>{n:,}<td class=num>{share(n, of)}<td>{bar(n / max(of, 1) / 2, i)}" for n, of, i in parts
        )
        rows.append(f"<tr><td>{escape(name)}{cells}")
    head = "".join(f"<th colspan=3>{split}" for split in SPLITS)
    return f"<table class=labels><tr><th>label{head}{''.join(rows)}</table>"


def leaks(summary: Summary) -> str:
    """Findings of the leak probe, as questions."""
    found = [leak.redacted() if summary.redact else leak for leak in summary.leaks]
    if not found:
        return "<p class=sub>No single column, value or phrase predicts a class suspiciously well.</p>"
    rows = "".join(
        f"<tr><td>{escape(leak.what)}<td>{escape(leak.label)}<td class=text>{escape(leak.evidence)}" for leak in found
    )
    intro = "<p class=sub>Is each of these known when the prediction is made, and meant to be used?</p>"
    return f"{intro}<table><tr><th>feature<th>label<th>evidence{rows}</table>"


def lengths(summary: Summary) -> str:
    """Histograms of tokens and steps."""
    parts = []
    for i, (name, schema) in enumerate(summary.manifest.modalities.items()):
        found = summary.lengths(name)
        if schema.kind not in ("image", "tabular") and len(found):
            unit = {"text": "tokens", "timeseries": "steps"}.get(schema.kind, "")
            parts.append(figure(f"{name}, {unit}", found, i, f"{len(found):,} samples"))
    return f"<div class=plots>{''.join(parts)}</div>" if parts else "<p class=sub>no text, no series</p>"


def values(columns: Iterable[Numbers | Categories]) -> str:
    """A small plot per column and channel."""
    parts = []
    for column in columns:
        note = f"{column.missing:.1%} missing"
        if isinstance(column, Categories):
            parts.append(_categories(column, note))
        elif len(column.values):
            parts.append(figure(column.name, column.values, 2, note))
        else:
            parts.append(f"<figure><figcaption><b>{escape(column.name)}</b> {note}</figcaption></figure>")
    return f"<div class=plots>{''.join(parts)}</div>" if parts else "<p class=sub>no table, no series</p>"


def figure(name: str, found: np.ndarray, colour: int, note: str) -> str:
    """A histogram. Bins cover 1 % to 99 % of the values, so that one odd value does not hide the others."""
    low, high = np.quantile(found, (0.01, 0.99), method="nearest").astype(float)
    if high <= low:
        low, high = float(found.min()), float(found.max())
    whole = bool((found % 1 == 0).all())
    bins = min(MAX_BINS, int(high - low) + 1) if whole else MAX_BINS
    counts, _ = np.histogram(np.clip(found, low, high), bins=bins, range=(low, high) if high > low else None)
    width, height = 240 / len(counts), 70
    most = counts.max()
    bars = "".join(
        f"<rect x={i * width:.1f} y={height - height * n / most:.1f} width={max(width - 1, 0.5):.1f} "
        f"height={height * n / most:.1f} />"
        for i, n in enumerate(counts)
    )
    span = f"{in_full(found.min())} to {in_full(found.max())}, median {in_full(float(np.median(found)))}"
    return (
        f"<figure><svg viewBox='0 0 240 {height}' class=f{colour % 4} role=img aria-label='{escape(name, quote=True)}: {span}'>"
        f"{bars}</svg><figcaption><b>{escape(name)}</b> {span}; {note}</figcaption></figure>"
    )


def _categories(column: Categories, note: str) -> str:
    most = max((part for _, part in column.top), default=1)
    rows = "".join(
        f"<tr><td>{escape(value[:28])}<td class=num>{part:.1%}<td><span class='bar f3' style='width:{6 * part / most:.2f}em'></span>"
        for value, part in column.top
    )
    known = f"{column.known:,} values" + (f" and {column.buckets:,} buckets" if column.buckets else "")
    unseen = f", {column.unseen:.1%} unseen" if column.unseen else ""
    return f"<figure><table class=top>{rows}</table><figcaption><b>{escape(column.name)}</b> {known}; {note}{unseen}</figcaption></figure>"
