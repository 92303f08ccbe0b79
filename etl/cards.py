"""Cards of single samples for `etl preview`."""

import base64
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import numpy as np
import polars as pl

from etl.members import Members
from etl.summary import IDENTIFYING, Summary, in_full
from lanistr.manifest import Manifest, ModalitySchema
from lanistr.transforms import MISSING_ID, SeriesSpec, TabularSpec, load_tokenizer

MAX_TEXT = 400
MAX_VARIABLES = 4


def cards(summary: Summary, wanted: int) -> Iterator[str]:
    """Samples from every missingness pattern in turn, the most frequent pattern first, in the order of their keys."""
    manifest = summary.manifest
    turn = pl.int_range(pl.len()).over("presence")
    frequency = pl.len().over("presence")
    chosen = summary.sample.sort("key").with_columns(turn=turn, frequency=frequency)
    chosen = chosen.sort(["turn", "frequency", "presence"], descending=[False, True, False]).head(wanted)
    tokenizer = load_tokenizer(summary.gold / manifest.tokenizer.file) if manifest.tokenizer else None
    with Members(summary.gold) as members:
        for i, row in enumerate(chosen.iter_rows(named=True), 1):
            label = label_text(manifest, row)
            parts = []
            for name, schema in manifest.modalities.items():
                if not row["presence"] & manifest.bit(name):
                    parts.append(f"<p class=absent>no {escape(name)}</p>")
                elif schema.kind in DRAW:
                    parts.append(DRAW[schema.kind](row, schema, members, tokenizer, summary.redact))
            title = f"sample {i}" if summary.redact else row["key"]
            yield f"<article><h3>{title}</h3><p class=sub>{row['split']}, {escape(label)}</p>{''.join(parts)}</article>"


def label_text(manifest: Manifest, row: dict[str, Any]) -> str:
    """What is known of a sample's target, for people."""
    if row["label"] < 0:
        return "unlabelled"
    if manifest.target == "class":
        return manifest.labels[row["label"]]
    pairs = [(name, value) for name, value in zip(manifest.labels, row["target"], strict=True) if not np.isnan(value)]
    if manifest.target == "multilabel":
        return ", ".join(name for name, value in pairs if value) or "none of the labels"
    return ", ".join(f"{name} {value:g}" for name, value in pairs)


def _text(row: dict[str, Any], schema: ModalitySchema, members: Members, tokenizer: Any, redact: bool) -> str:
    ids = members.array(row, "tok.npy").tolist()[1:-1]
    if redact:
        return f"<p class=absent>text of {len(ids):,} tokens</p>"
    text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
    return f"<p class=text>{escape(text[:MAX_TEXT])}{'&hellip;' if len(text) > MAX_TEXT else ''}</p>"


def _image(row: dict[str, Any], schema: ModalitySchema, members: Members, _: Any, redact: bool) -> str:
    data = members.read(row, "jpg")
    if redact:
        return f"<p class=absent>image of {len(data):,} bytes</p>"
    return f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(data).decode()}'>"


def _tabular(row: dict[str, Any], schema: ModalitySchema, members: Members, _: Any, redact: bool) -> str:
    spec = TabularSpec.model_validate(schema.spec)
    found = members.array(row, "tab.npy").tolist()
    cells = {c.name: "&ndash;" if np.isnan(v) else in_full(v) for c, v in zip(spec.numeric, found, strict=False)}
    for column, value in zip(spec.categorical, found[len(spec.numeric) :], strict=True):
        category = MISSING_ID if np.isnan(value) else int(value)
        shown = "&ndash;" if category == MISSING_ID else escape(column.name_of(category)[:40])
        cells[column.name] = "(hidden)" if redact and column.cardinality > IDENTIFYING else shown
    lines = "".join(f"<tr><td>{escape(name)}<td>{value}" for name, value in cells.items())
    return f"<table class=row>{lines}</table>"


def _series(row: dict[str, Any], schema: ModalitySchema, members: Members, _: Any, redact: bool) -> str:
    """Up to four variables, those measured most often, each scaled to its own range; gaps stay gaps."""
    spec = SeriesSpec.model_validate(schema.spec)
    values, observed = members.array(row, "ts.npy"), members.array(row, "tsmask.npy") == 1
    numbers = [group[0] for group in spec.groups if len(group) == 2] if spec.grid else range(len(spec.variables))
    often = sorted(numbers, key=lambda channel: (-int(observed[:, channel].sum()), channel))[:MAX_VARIABLES]
    lines, legend = [], []
    for colour, channel in enumerate(channel for channel in often if observed[:, channel].any()):
        lines.append(f"<g class=s{colour}>{_line(values[:, channel], observed[:, channel])}</g>")
        legend.append(f"<span class=s{colour}>{escape(spec.variables[channel])}</span>")
    return f"<svg viewBox='0 0 260 60' class=series role=img aria-label=series>{''.join(lines)}</svg><p class=legend>{' '.join(legend)}</p>"


def _line(values: np.ndarray, observed: np.ndarray) -> str:
    seen = np.flatnonzero(observed)
    y = values[seen]
    y = 54 - 48 * (y - y.min()) / (np.ptp(y) or 1)
    x = 4 + 252 * seen / max(len(values) - 1, 1)
    parts = []
    for run in np.split(np.arange(len(seen)), np.flatnonzero(np.diff(seen) > 1) + 1):
        if len(run) == 1:
            parts.append(f"<circle cx={x[run[0]]:.1f} cy={y[run[0]]:.1f} r=1.6 />")
        else:
            points = " ".join(f"{x[i]:.1f},{y[i]:.1f}" for i in run)
            parts.append(f"<polyline points='{points}'/>")
    return "".join(parts)


Draw = Callable[[dict[str, Any], ModalitySchema, Members, Any, bool], str]
DRAW: dict[str, Draw] = {"text": _text, "image": _image, "tabular": _tabular, "timeseries": _series}
