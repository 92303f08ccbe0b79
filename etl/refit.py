"""Is the fit of a gold dataset that of its train split? Recomputed from the shards by code of its own."""

from pathlib import Path

import numpy as np
import polars as pl

from etl.members import Members
from lanistr.manifest import Manifest
from lanistr.transforms import FIRST_KNOWN_ID, UNSEEN_ID, CategoricalColumn, NumericColumn, SeriesSpec, TabularSpec

FLOAT32 = 1.2e-7  # shards hold float32, the fit was made from float64
QUANTILES, QUANTILE_VALUES = 129, 2**20  # as in `etl.fit`


def train_digest(keys: list[str]) -> str:
    """A name for a set of samples: how many, and the XOR of their keys. `etl.fit` says the same in SQL."""
    total = 0
    for key in keys:
        total ^= int(key, 16)
    return f"{len(keys)}-{total:016x}"


def verify_fit(gold: Path, manifest: Manifest, index: pl.DataFrame) -> list[str]:
    """Recompute means, deviations, quantiles and vocabularies from the train split.

    Raises:
        ValueError: they differ, although the manifest says that they were made from these samples.
    """
    origin = manifest.fit.get("from", "unknown")
    if origin != "train":
        return [f"fit: not recomputed, it is that of {origin}"]
    train = index.filter(pl.col("split") == "train")
    there, then = train_digest(train["key"].to_list()), manifest.fit["train"]
    if there != then:
        n, m = then.split("-")[0], there.split("-")[0]
        return [
            f"fit: not recomputed, it was made from another train split ({n} samples, now {m}): kept from an earlier "
            "build, or samples were left out after it; `build --refit` makes a new one"
        ]
    lines = []
    for name, schema in manifest.modalities.items():
        present = train.filter((pl.col("presence") & manifest.bit(name)) != 0)
        if schema.kind == "tabular":
            lines.append(_tabular(TabularSpec.model_validate(schema.spec), present))
        elif schema.kind == "timeseries":
            lines.append(_series(gold, SeriesSpec.model_validate(schema.spec), present, name))
    return lines


def _tabular(spec: TabularSpec, train: pl.DataFrame) -> str:
    width = len(spec.numeric) + len(spec.categorical)
    table = train["tab"].explode().to_numpy().astype(np.float64).reshape(-1, width)
    for i, column in enumerate(spec.numeric):
        values = table[:, i][np.isfinite(table[:, i])]
        _same(f"column {column.name}", values, column.mean, column.std)
        if column.quantiles:  # a fit of before 2026-12 has none
            _same_quantiles(column, table[:, i], train["key"].to_list())
    for i, column in enumerate(spec.categorical, len(spec.numeric)):
        ids = table[:, i][np.isfinite(table[:, i])].astype(np.int64)
        _vocabulary(column, np.bincount(ids, minlength=column.cardinality))
    return (
        f"fit: {len(spec.numeric)} numeric columns and {len(spec.categorical)} vocabularies recomputed from "
        f"{train.height:,} train rows: the same"
    )


def _same(what: str, values: np.ndarray, mean: float, std: float) -> None:
    """Raises ValueError unless the values have this mean and standard deviation, as far as float32 tells."""
    if not len(values):
        expected_mean, expected_std, slack = 0.0, 1.0, 0.0
    else:
        slack = FLOAT32 * float(np.abs(values).max())
        expected_mean, expected_std = float(values.mean()), float(values.std())
        if expected_std <= slack and std == 1.0:  # a constant column
            expected_std = 1.0
    slack += 1e-6 * max(std, expected_std)
    if abs(expected_mean - mean) > slack or abs(expected_std - std) > slack:
        raise ValueError(
            f"fit: {what} has mean {mean:g} and std {std:g} in the manifest, {expected_mean:g} and {expected_std:g} in "
            "the train split; if the raw data changed since the fit, rebuild with --refit"
        )


def _same_quantiles(column: NumericColumn, values_N: np.ndarray, keys: list[str]) -> None:
    """Raises ValueError unless the column's quantiles are those of its values, as far as float32 tells."""
    known_N = np.isfinite(values_N)
    n = int(known_N.sum())
    if n > QUANTILE_VALUES:
        known_N &= np.array([int(key, 16) < 2**64 * QUANTILE_VALUES // n for key in keys])
    expected = np.quantile(values_N[known_N], np.linspace(0, 1, QUANTILES)) if n else np.zeros(1)
    slack = 2 * FLOAT32 * float(np.abs(expected).max())
    if len(expected) != len(column.quantiles) or (np.abs(expected - column.quantiles) > slack).any():
        raise ValueError(
            f"fit: column {column.name} has other quantiles in the manifest than in the train split; if the raw data changed "
            "since the fit, rebuild with --refit"
        )


def _vocabulary(column: CategoricalColumn, counts: np.ndarray) -> None:
    """Raises ValueError unless the known values are those of train, the most frequent first, then by spelling."""
    known = counts[FIRST_KNOWN_ID : FIRST_KNOWN_ID + len(column.values)].tolist()
    order = [(-n, value) for n, value in zip(known, column.values, strict=True)]
    wrong = None
    if not all(known):
        wrong = f"value {column.values[known.index(0)]!r} is known but not in train"
    elif order != sorted(order):
        wrong = "its values are not in the order of their frequency in train"
    elif counts[UNSEEN_ID]:
        wrong = f"{counts[UNSEEN_ID]:,} train values are not known"
    if wrong:
        raise ValueError(f"fit: column {column.name}: {wrong}; if the raw data changed, rebuild with --refit")


def _series(gold: Path, spec: SeriesSpec, train: pl.DataFrame, name: str) -> str:
    cut = train.filter(pl.col(f"length/{name}") >= spec.max_steps).height
    if cut and spec.grid is None:
        return f"fit: channels not recomputed, {cut:,} train series may have been cut to {spec.max_steps} steps"
    seen: list[list[np.ndarray]] = [[] for _ in spec.variables]
    with Members(gold) as members:
        for row in train.drop("tab").iter_rows(named=True):
            values, observed = members.array(row, "ts.npy"), members.array(row, "tsmask.npy") == 1
            for channel, found in enumerate(seen):
                found.append(values[observed[:, channel], channel])
    numbers = [group[0] for group in spec.groups if len(group) == 2] if spec.grid else range(len(spec.variables))
    for channel in numbers:
        values = np.concatenate([*seen[channel], np.zeros(0, np.float32)]).astype(np.float64)
        _same(f"channel {spec.variables[channel]}", values, spec.mean[channel], spec.std[channel])
    return f"fit: {len(numbers)} channels recomputed from {train.height:,} train series: the same"
