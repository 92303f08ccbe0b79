"""Statistics, vocabularies and the tokenizer, from the train split only, in one fixed order.

A dataset keeps its first fit (``lake/fit/<name>/``) until ``--refit``; ``fit_from`` takes another dataset's.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.quarantine import column, literal
from etl.recipe import Recipe, TokenizerChoice
from etl.sources.samples import Samples
from lanistr.manifest import Manifest, Strict
from lanistr.transforms import (
    SPECS,
    CategoricalColumn,
    ImageSpec,
    NumericColumn,
    SeriesSpec,
    TabularSpec,
    load_tokenizer,
    text_spec,
)

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
BATCH = 8_192
QUANTILES = 129
QUANTILE_VALUES = 2**20  # that they are taken from, at most: they are held in memory


@dataclass(frozen=True)
class Fit:
    """Specs per modality, the tokenizer where there is text, and what both were made from (`Manifest.fit`)."""

    specs: dict[str, Strict]
    tokenizer: "Tokenizer | None"
    origin: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write ``fit.json`` and ``tokenizer.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        tree = {"origin": self.origin, "specs": {name: spec.model_dump() for name, spec in self.specs.items()}}
        if self.tokenizer:
            (folder / TOKENIZER).write_text(self.tokenizer.to_str(pretty=True), encoding="utf-8")
        (folder / "fit.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")


def make_fit(con: "DuckDBPyConnection", recipe: Recipe, samples: Samples, raw: Path, kept: Path | None) -> Fit:
    """The fit of a build.

    Args:
        con: has ``samples`` with ``split``, and ``series``.
        recipe: which modalities.
        samples: columns of the source.
        raw: raw folder, for a tokenizer by path.
        kept: folder with the fit of an earlier build; None = fit anew.

    Raises:
        ValueError: an earlier fit or ``fit_from`` that does not match the recipe or its tokenizer.
    """
    if recipe.fit_from:
        return _from_gold(Path(recipe.fit_from), recipe, samples, raw)
    if kept and (kept / "fit.json").is_file():
        saved = json.loads((kept / "fit.json").read_text(encoding="utf-8"))
        fit = _load(kept / TOKENIZER, saved["specs"], saved["origin"], recipe)
        _check(fit, recipe, samples, raw, f"the fit kept in {kept}", "give --refit")
        return fit
    tokenizer = _tokenizer(con, recipe, raw)
    makers: dict[str, Callable[[], Strict]] = {
        "text": lambda: text_spec(_needed(tokenizer), recipe.text.max_tokens if recipe.text else 0),
        "image": lambda: ImageSpec(**(recipe.image.model_dump() if recipe.image else {})),
        "tabular": lambda: _fit_tabular(con, recipe, samples),
        "timeseries": lambda: _fit_series(con, recipe, samples),
    }
    return Fit({name: makers[name]() for name in recipe.modalities}, tokenizer, _origin(con, recipe))


def _origin(con: "DuckDBPyConnection", recipe: Recipe) -> dict[str, str]:
    """Which samples the fit is made from: how many, and the XOR of their keys (`etl.refit.train_digest`)."""
    n, xor = con.execute(f"select count(*), bit_xor({_key(recipe)}) from samples where split = 'train'").fetchall()[0]
    origin = {"from": "train", "train": f"{n}-{xor or 0:016x}"}
    if recipe.text:
        origin["tokenizer"] = "trained" if recipe.text.tokenizer.train else "given"
        if recipe.text.max_chars:
            origin["max_chars"] = str(recipe.text.max_chars)
    return origin


def _key(recipe: Recipe) -> str:
    """SQL for `lanistr.manifest.sample_key`, as a number."""
    return f"('0x' || left(sha256({literal(recipe.name + '|')} || grp || '|' || row_id), 16))::ubigint"


def _needed(tokenizer: "Tokenizer | None") -> "Tokenizer":
    assert tokenizer is not None
    return tokenizer


def _load(file: Path | None, specs: dict[str, Any], origin: dict[str, str], recipe: Recipe) -> Fit:
    """A fit made earlier. What is chosen and not fitted (sizes, limits) is the recipe's."""
    parsed = {name: SPECS[spec["kind"]].model_validate(spec) for name, spec in specs.items()}
    tokenizer = load_tokenizer(file) if file and file.is_file() else None
    if recipe.image and "image" in parsed:
        parsed["image"] = ImageSpec(**recipe.image.model_dump())
    if recipe.text and "text" in parsed:
        parsed["text"] = text_spec(_needed(tokenizer), recipe.text.max_tokens)
    if recipe.timeseries and "timeseries" in parsed:
        parsed["timeseries"] = parsed["timeseries"].model_copy(update={"max_steps": recipe.timeseries.max_steps})
    return Fit(parsed, tokenizer, origin)


def _from_gold(gold: Path, recipe: Recipe, samples: Samples, raw: Path) -> Fit:
    manifest = Manifest.load(gold)
    tokenizer = gold / manifest.tokenizer.file if manifest.tokenizer else None
    specs = {name: schema.spec for name, schema in manifest.modalities.items()}
    missing = [name for name in recipe.modalities if name not in specs]
    if missing:
        raise ValueError(f"fit_from {gold}: that dataset has no {missing[0]}; it has {', '.join(specs)}")
    origin = {"from": f"{manifest.name} {manifest.content_id[:16]}"}
    fit = _load(tokenizer, {name: specs[name] for name in recipe.modalities}, origin, recipe)
    _check(fit, recipe, samples, raw, f"fit_from {gold}", "use the same columns and tokenizer")
    return fit


def _check(fit: Fit, recipe: Recipe, samples: Samples, raw: Path, whose: str, remedy: str) -> None:
    if list(fit.specs) != recipe.modalities:
        raise ValueError(f"{whose} has {', '.join(fit.specs)}; the recipe has {', '.join(recipe.modalities)}: {remedy}")
    given = recipe.text.tokenizer.path if recipe.text else None
    if given and fit.tokenizer and fit.tokenizer.to_str() != load_tokenizer(raw / given).to_str():
        raise ValueError(f"{whose} has another tokenizer than {given}: {remedy}")
    spec = fit.specs.get("tabular")
    if isinstance(spec, TabularSpec):
        theirs = [c.name for c in spec.numeric], [c.name for c in spec.categorical]
        if theirs != (samples.numeric, samples.categorical):
            raise ValueError(
                f"{whose} has columns {theirs}; the recipe {samples.numeric, samples.categorical}: {remedy}"
            )
    spec = fit.specs.get("timeseries")
    if isinstance(spec, SeriesSpec) and spec.grid != (samples.series.grid if samples.series else None):
        raise ValueError(f"{whose} lays the series on another grid (imputation or normal values): {remedy}")


def _tokenizer(con: "DuckDBPyConnection", recipe: Recipe, raw: Path) -> "Tokenizer | None":
    if recipe.text is None:
        return None
    choice = recipe.text.tokenizer
    if choice.train is None:
        return _given_tokenizer(choice, raw)
    from etl import wordpiece

    limit = recipe.text.max_chars
    # The trainer counts words: their order does not matter, and no more than a batch of texts is in memory.
    reader = con.sql("select text from samples where split = 'train' and text is not null").to_arrow_reader(BATCH)
    texts = (text[:limit] for batch in reader for text in batch["text"].to_pylist())
    return wordpiece.train(texts, choice.train)


def _given_tokenizer(choice: TokenizerChoice, raw: Path) -> "Tokenizer":
    if choice.path:
        return load_tokenizer(raw / choice.path if not Path(choice.path).is_absolute() else choice.path)
    from tokenizers import Tokenizer

    assert choice.name
    for file in (Path(choice.name), Path(choice.name) / TOKENIZER):
        if file.is_file():
            return load_tokenizer(file)
    try:
        return Tokenizer.from_pretrained(choice.name)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"tokenizer {choice.name!r}: {str(error).splitlines()[0]}") from None


def _round(value: float) -> float:
    """Nine significant digits: float aggregates may differ in the last ones."""
    return float(f"{value:.9g}")


def _statistics(con: "DuckDBPyConnection", query: str) -> tuple[float, float]:
    """Mean and standard deviation (1 for a constant) of a column ``v``. The sums are exact: no order of rows changes them."""
    n, largest = con.execute(f"select count(*), max(abs(v)) from ({query})").fetchall()[0]
    if not n:
        return 0.0, 1.0
    mean = _exact_sum(con, query) / n
    deviation = math.sqrt(_exact_sum(con, f"select (v - {mean!r}) ** 2 as v from ({query})") / n)
    return _round(mean), _round(deviation) if deviation > 1e-12 * max(1.0, largest) else 1.0


def _exact_sum(con: "DuckDBPyConnection", query: str) -> float:
    batches = con.sql(query).to_arrow_reader(BATCH)
    return math.fsum(value for batch in batches for value in batch["v"].to_numpy().tolist())


def _quantiles(con: "DuckDBPyConnection", value: str, known: str, key: str) -> list[float]:
    """Evenly spaced; 0 where no value is known. Of many values those of the smallest keys: an even, repeatable draw."""
    (n,) = con.execute(f"select count(*) {known}").fetchall()[0]
    if not n:
        return [0.0]
    few = f" and {key} < {2**64 * QUANTILE_VALUES // n}" if n > QUANTILE_VALUES else ""
    at = [i / (QUANTILES - 1) for i in range(QUANTILES)]
    (found,) = con.execute(f"select quantile_cont({value}::double, {at}) {known}{few}").fetchall()[0]
    return [_round(v) for v in found]


def _fit_tabular(con: "DuckDBPyConnection", recipe: Recipe, samples: Samples) -> TabularSpec:
    assert recipe.tabular
    numeric = []
    for name in samples.numeric:
        c = column(f"n:{name}")
        known = f"from samples where split = 'train' and {c} is not null"
        mean, std = _statistics(con, f"select {c} as v {known}")
        quantiles = _quantiles(con, c, known, _key(recipe))
        numeric.append(NumericColumn(name=name, mean=mean, std=std, quantiles=quantiles))
    categorical = []
    for name in samples.categorical:
        c = column(f"c:{name}")
        most = recipe.tabular.max_values
        rows = con.execute(
            f"select {c} from samples where split = 'train' and {c} is not null group by 1 order by count(*) desc, 1 "
            f"limit {most + 1}"
        ).fetchall()
        known = [value for (value,) in rows[:most]]
        buckets = recipe.tabular.buckets if len(rows) > len(known) else 0
        categorical.append(CategoricalColumn(name=name, values=known, buckets=buckets))
    return TabularSpec(numeric=numeric, categorical=categorical)


def _fit_series(con: "DuckDBPyConnection", recipe: Recipe, samples: Samples) -> SeriesSpec:
    assert recipe.timeseries
    train = "row_id in (select row_id from samples where split = 'train') and value is not null"
    layout = samples.series
    variables = (layout.channels if layout else recipe.timeseries.variables) or [
        row[0] for row in con.execute(f"select distinct variable from series where {train} order by 1").fetchall()
    ]
    if not variables:
        raise ValueError("timeseries: no variable in the train split; is the series table empty?")
    # On a grid, one-hots and flags keep their 0 and 1: only a variable of a single number is standardised.
    numbers = [group[0] for group in layout.groups if len(group) == 2] if layout else range(len(variables))
    mean, std = [0.0] * len(variables), [1.0] * len(variables)
    for channel in numbers:
        query = f"select value as v from series where {train} and variable = {literal(variables[channel])}"
        mean[channel], std[channel] = _statistics(con, query)
    return SeriesSpec(
        variables=variables,
        groups=layout.groups if layout else [[i] for i in range(len(variables))],
        mean=mean,
        std=std,
        max_steps=recipe.timeseries.max_steps,
        grid=layout.grid if layout else None,
    )
