"""The leak probe: which single column, value or phrase predicts the label suspiciously well?

A dataset in which one column or phrase gives the label away trains models that are good on paper only: Amazon's summary
"Five Stars", an ICD code written after death. Two rules, both on a sample of the labelled train split:

* A **column** (a tabular one, the presence or size of a modality, a channel's mean, last value or number of
  observations) alone decides a class: Youden's J = recall + specificity - 1 of the best rule that sees this column only
  is at least 0.8. The rule is made on half of the groups and judged on the other: identifiers gain nothing.
* A **phrase** (1 to 3 tokens) or **value** of a category goes with one class, and hardly ever with another: it removes at
  least 80 % of the error that guessing this class leaves (lower Wilson bound, z = 2.5, as very many phrases are tried).
  A group counts once: a reviewer who posts one text under ten products is one witness.

What is found is a question to a person, no verdict: a clinical score may be meant to be that good.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from etl.members import Members
from lanistr.manifest import Manifest
from lanistr.transforms import SeriesSpec, TabularSpec, load_tokenizer

SUSPICIOUS = 0.8
Z = 2.5  # standard errors; more than the usual 2, as thousands of phrases are tried
BINS = 20
MIN_CLASS = 20  # fewer samples of a class say nothing
MAX_PHRASE = 3
MAX_FOUND = 12
SAMPLE = 20_000


@dataclass(frozen=True)
class Leak:
    """Something that predicts a class by itself.

    Attributes:
        what: for people: ``column product``, ``phrase 'five stars'``.
        label: the class that it predicts.
        strength: 0 to 1: Youden's J of a column, error removed by a value or phrase (lower bound).
        evidence: the counts behind it.
    """

    what: str
    label: str
    strength: float
    evidence: str

    def redacted(self) -> "Leak":
        """The same without words or values."""
        return replace(self, what=self.what.split("'")[0].split('"')[0].rstrip(" =") + " (redacted)")

    def __str__(self) -> str:
        return f"{self.what} predicts label {self.label!r}: {self.evidence}"


def probe(gold: Path, manifest: Manifest, index: pl.DataFrame, sample: int = SAMPLE) -> list[Leak]:
    """Leaks of a dataset, the strongest first, at most twelve.

    Args:
        gold: dataset.
        manifest: its manifest.
        index: rows of `etl.summary.read_indices`.
        sample: at most so many samples are looked at: those with the smallest keys, which are hashes.
    """
    rows = index.filter((pl.col("split") == "train") & (pl.col("label") >= 0)).sort("key").head(sample)
    groups = rows["group_hash"].rank("dense").to_numpy().astype(np.int64) - 1
    known = Known(rows["label"].to_numpy(), groups, manifest.labels)
    if not known.classes:
        return []
    found: list[Leak] = []
    with Members(gold) as members:
        for name, values, names in _columns(rows, manifest, members):
            found += _column_leaks(name, values, names, known)
        for name, schema in manifest.modalities.items():
            if schema.kind == "text":
                texts = [members.array(row, "tok.npy") for row in _having(rows, manifest, name)]
                here = np.flatnonzero(rows["presence"].to_numpy() & manifest.bit(name))
                found += _phrase_leaks(gold, manifest, texts, here, known)
    return sorted(found, key=lambda leak: (-leak.strength, leak.what))[:MAX_FOUND]


class Known:
    """Label and group of each sample that is looked at.

    Attributes:
        label, group: (samples,) ids.
        classes: those frequent enough to say something about.
        witness: (samples,) number of the sample's (group, label).
        base: share of each class among witnesses.
    """

    def __init__(self, label: np.ndarray, group: np.ndarray, names: list[str]):
        self.label, self.group, self.names = label, group, names
        self.classes = [c for c in range(len(names)) if MIN_CLASS <= (label == c).sum() <= len(label) - MIN_CLASS]
        pairs, self.witness = np.unique(group * len(names) + label, return_inverse=True)
        self.base = np.bincount(pairs % len(names), minlength=len(names)) / max(len(pairs), 1)
        self._class = pairs % len(names)  # of a witness

    def strengths(self, code: np.ndarray, sample: np.ndarray, width: int) -> dict[int, np.ndarray]:
        """`removed_error` per class of features 0 to ``width`` - 1, of which ``sample[i]`` has ``code[i]``.

        A witness counts once.
        """
        feature, witness = np.divmod(np.unique(code * len(self._class) + self.witness[sample]), len(self._class))
        support = np.bincount(feature, minlength=width)
        hits = {c: np.bincount(feature[self._class[witness] == c], minlength=width) for c in self.classes}
        return {c: removed_error(hits[c], support, float(self.base[c])) for c in self.classes}

    def evidence(self, sample: np.ndarray, c: int) -> str:
        """How many of these samples have the label."""
        hits, n, groups = int((self.label[sample] == c).sum()), len(sample), len(np.unique(self.group[sample]))
        return (
            f"{hits:,} of the {n:,} samples with it ({groups:,} groups) have this label: {hits / n:.1%}, "
            f"against {(self.label == c).mean():.1%} of all"
        )


def _having(rows: pl.DataFrame, manifest: Manifest, name: str) -> Iterator[dict[str, Any]]:
    return rows.filter((pl.col("presence") & manifest.bit(name)) != 0).iter_rows(named=True)


Column = tuple[str, np.ndarray, list[str] | None]


def _columns(rows: pl.DataFrame, manifest: Manifest, members: Members) -> Iterator[Column]:
    """(name, float values with NaN = missing, names of the categories or None for a number)."""
    for name, schema in manifest.modalities.items():
        here = (rows["presence"].to_numpy() & manifest.bit(name)) != 0
        yield f"presence of {name}", here.astype(float), ["absent", "present"]
        length = rows[f"size/{schema.members[0]}" if schema.kind == "image" else f"length/{name}"].to_numpy()
        yield f"size of {name}", np.where(here, length, np.nan), None
        if schema.kind == "tabular":
            yield from _tabular(rows, TabularSpec.model_validate(schema.spec), here)
        elif schema.kind == "timeseries":
            yield from _series(rows, manifest, name, SeriesSpec.model_validate(schema.spec), here, members)


def _tabular(rows: pl.DataFrame, spec: TabularSpec, here: np.ndarray) -> Iterator[Column]:
    width = len(spec.numeric) + len(spec.categorical)
    table = np.full((len(here), width), np.nan, dtype=np.float32)
    table[here] = rows.filter(pl.Series(here))["tab"].explode().to_numpy().reshape(-1, width)
    for i, column in enumerate(spec.numeric):
        yield f"column {column.name}", table[:, i], None
    for i, column in enumerate(spec.categorical, len(spec.numeric)):
        yield f"column {column.name}", table[:, i], [column.name_of(id_) for id_ in range(column.cardinality)]


def _series(
    rows: pl.DataFrame, manifest: Manifest, name: str, spec: SeriesSpec, here: np.ndarray, members: Members
) -> Iterator[Column]:
    summary = np.full((len(here), len(spec.variables), 3), np.nan)  # mean, last, number of observations
    for at, row in zip(np.flatnonzero(here), _having(rows, manifest, name), strict=True):
        values = members.array(row, "ts.npy").astype(float)
        observed = members.array(row, "tsmask.npy").astype(bool)
        count = observed.sum(axis=0)
        last = len(observed) - 1 - np.argmax(observed[::-1], axis=0)
        with np.errstate(invalid="ignore"):
            summary[at, :, 0] = np.where(observed, values, 0).sum(axis=0) / count
        summary[at, :, 1] = np.where(count, values[last, np.arange(values.shape[1])], np.nan)
        summary[at, :, 2] = count
    for i, variable in enumerate(spec.variables):
        for j, what in enumerate(("mean", "last value", "observations")):
            yield f"{what} of series {variable}", summary[:, i, j], None


def _column_leaks(name: str, values: np.ndarray, names: list[str] | None, known: Known) -> Iterator[Leak]:
    code = _bins(values) if names is None else np.nan_to_num(values, nan=0).astype(np.int64)
    decided = {c: j for c in known.classes if (j := _youden(code, known.label == c, known.group)) >= SUSPICIOUS}
    for c, j in decided.items():
        yield Leak(name, known.names[c], j, f"alone it tells this class from the others, J = {j:.2f}")
    if decided or names is None:
        return
    everyone = np.arange(len(code))
    for c, strength in known.strengths(code, everyone, len(names)).items():
        for value in np.flatnonzero(strength >= SUSPICIOUS):
            evidence = known.evidence(np.flatnonzero(code == value), c)
            yield Leak(f"{name} = {names[value]!r}", known.names[c], float(strength[value]), evidence)


def _bins(values: np.ndarray) -> np.ndarray:
    """Quantile bins from 1; 0 is missing. A value that is frequent enough has a bin of its own."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.zeros(len(values), dtype=np.int64)
    edges = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1), method="lower"))
    return np.where(np.isfinite(values), np.searchsorted(edges, values, side="right"), 0)


def _youden(code: np.ndarray, positive: np.ndarray, group: np.ndarray) -> float:
    """Recall + specificity - 1 of "this code is more frequent in the class than elsewhere", judged on unseen groups."""
    half = np.random.default_rng(0).permutation(int(group.max()) + 1)[group] % 2 == 0
    said = np.zeros(len(code), dtype=bool)
    width = int(code.max()) + 1
    for made, judged in ((half, ~half), (~half, half)):
        yes = np.bincount(code[made & positive], minlength=width) / max((made & positive).sum(), 1)
        no = np.bincount(code[made & ~positive], minlength=width) / max((made & ~positive).sum(), 1)
        said[judged] = (yes > no)[code[judged]]
    return float(said[positive].mean() - said[~positive].mean())


def removed_error(hits: np.ndarray, support: np.ndarray, base: float) -> np.ndarray:
    """Share of the error of "always this class" that goes away where the feature is there; lower bound (Wilson 1927).

    Args:
        hits: samples with the feature that are of the class.
        support: samples with the feature.
        base: share of the class among all samples, below 1.
    """
    n = np.maximum(support, 1)
    p = hits / n
    centre = p + Z * Z / (2 * n)
    spread = Z * np.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    low = (centre - spread) / (1 + Z * Z / n)
    return np.where(support > 0, 1 - (1 - low) / (1 - base), 0.0)


def _phrase_leaks(
    gold: Path, manifest: Manifest, texts: list[np.ndarray], at: np.ndarray, known: Known
) -> Iterator[Leak]:
    """``at``: number of the sample of each text."""
    assert manifest.tokenizer
    tokenizer = load_tokenizer(gold / manifest.tokenizer.file)
    distinct, code, text = _phrases([ids[1:-1].astype(np.int64) for ids in texts])  # without [CLS] and [SEP]
    support, sample = np.bincount(code, minlength=len(distinct)), at[text]
    for c, strength in known.strengths(code, sample, len(distinct)).items():
        suspects = np.flatnonzero(strength >= SUSPICIOUS)
        carriers = {i: sample[code == i] for i in suspects[np.argsort(-support[suspects], kind="stable")]}
        for i in _named(carriers, distinct):
            words = tokenizer.decode(_ids(int(distinct[i])))
            yield Leak(f"phrase {words!r}", known.names[c], float(strength[i]), known.evidence(carriers[i], c))


def _named(carriers: dict[int, np.ndarray], phrases: np.ndarray) -> list[int]:
    """Of phrases in mostly the same samples one: the longest that is nearly as frequent as the most frequent."""
    named: list[tuple[int, int]] = []  # (most frequent, the one to name)
    for i, mine in carriers.items():
        for at, (head, best) in enumerate(named):
            if np.isin(mine, carriers[head]).mean() > 0.8:
                if (
                    len(mine) > 0.9 * len(carriers[head]) and phrases[i] > phrases[best]
                ):  # a longer one has a larger code
                    named[at] = head, i
                break
        else:
            named.append((i, i))
    return [best for _, best in named]


def _phrases(texts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct phrases (21 bits per token), and once per phrase and text: number of the phrase, number of the text."""
    text = np.repeat(np.arange(len(texts)), [len(ids) for ids in texts])
    ids = np.concatenate(texts) + 1 if texts else np.zeros(0, dtype=np.int64)
    code, codes, numbers = np.zeros(len(ids), dtype=np.int64), [], []
    for n in range(MAX_PHRASE):
        code = code[: len(ids) - n] << 21 | ids[n:]
        whole = text[: len(ids) - n] == text[n:]
        codes.append(code[whole])
        numbers.append(text[n:][whole])
    distinct, dense = np.unique(np.concatenate(codes), return_inverse=True)
    once = np.unique(dense * max(len(texts), 1) + np.concatenate(numbers))
    return distinct, *np.divmod(once, max(len(texts), 1))


def _ids(code: int) -> list[int]:
    """The token ids of a phrase's code."""
    ids = []
    while code:
        ids.append((code & (1 << 21) - 1) - 1)
        code >>= 21
    return ids[::-1]
