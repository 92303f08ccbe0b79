"""The dataset recipe: where the raw data is, which modalities to build from it, and how.

A recipe is YAML. ``source`` says where things are in the raw folder; one block per modality (``text``, ``image``,
``tabular``, ``timeseries``) says how to encode it, and a modality without a block is not built. An unknown key is
an error that names the nearest known one.
"""

import difflib
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from etl.sources.models import AmazonSource, MimicSource, TableSource
from lanistr.manifest import Strict

NAME = r"^[A-Za-z0-9_-]+$"  # names a folder and its shards; a dot would confuse WebDataset's keys
MODALITIES = ("text", "image", "tabular", "timeseries")  # the bit order of a presence mask
MAX_CATEGORY_ID = 1 << 24  # ids are stored as float32, which is exact up to here

Modality = Literal["text", "image", "tabular", "timeseries"]


class TokenizerChoice(Strict):
    """Exactly one of: a file, a name (a folder or a hub name), or a vocabulary size to train on the train split."""

    path: str | None = None
    name: str | None = None
    train: int | None = Field(default=None, ge=100, le=1 << 20)

    @model_validator(mode="after")
    def _one(self) -> "TokenizerChoice":
        given = [key for key, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, name, train; got {', '.join(given) or 'none'}")
        return self


class TextRecipe(Strict):
    """How to tokenise. ``max_chars`` cuts before, ``max_tokens`` (special tokens included) after tokenising.

    Attributes:
        keep_raw: store the whole text too, as ``.txt``: for people, never for training.
    """

    tokenizer: TokenizerChoice
    max_tokens: int = Field(default=512, ge=3)
    max_chars: int | None = Field(default=None, ge=1)
    keep_raw: bool = False


class ImageRecipe(Strict):
    """Shorter side in pixels at most ``size``; JPEG quality 1-95."""

    size: int = Field(default=224, ge=8)
    quality: int = Field(default=90, ge=1, le=95)


class TabularRecipe(Strict):
    """Columns, and how categories get ids.

    Attributes:
        numeric, categorical: column names; absent means all that the source has (not ``table``).
        max_values: at most this many train values per categorical column get their own id.
        buckets: the others are hashed into this many ids; only where a column has more than ``max_values``.
    """

    numeric: list[str] | None = None
    categorical: list[str] | None = None
    max_values: int = Field(default=10_000, ge=1)
    buckets: int = Field(default=1_000, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "TabularRecipe":
        if self.max_values + self.buckets + 2 > MAX_CATEGORY_ID:
            raise ValueError(f"max_values + buckets must stay below {MAX_CATEGORY_ID} (ids are stored as float32)")
        columns = [*(self.numeric or []), *(self.categorical or [])]
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise ValueError(f"listed twice: {', '.join(twice)}")
        return self


class SeriesRecipe(Strict):
    """Channels and length.

    Attributes:
        variables: channel names in order; absent means all that occur in train, sorted.
        max_steps: the last so many steps are kept.
    """

    variables: list[str] | None = Field(default=None, min_length=1)
    max_steps: int = Field(default=512, ge=1)


class TimeCut(Strict):
    """Where a time split cuts: a group whose latest sample is before ``val`` is train, before ``test`` val, else test.

    Dates (``2016-01-01``, in UTC), or numbers of the unit of the source's time.
    """

    val: float
    test: float

    @field_validator("val", "test", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        return value

    @model_validator(mode="after")
    def _order(self) -> "TimeCut":
        if not self.val <= self.test:
            raise ValueError("val starts after test")
        return self


class Split(Strict):
    """Who is in train, val and test; see `etl.split` for the rules.

    Attributes:
        salt: draws another split.
        train, val, test: shares of the groups, not of the samples.
        stratify: cut these shares within each label.
        time: cut by time instead; needs a source with times.
        unlabelled: ``train`` = groups without any label are all train: they can only teach, not judge. The others are
            split as they would be anyway, so that nothing of a group that is judged on is trained on.
        near_duplicates: groups with texts of at least this Jaccard similarity share a split.
    """

    salt: str = "lanistr"
    train: float = Field(default=0.8, gt=0, le=1)
    val: float = Field(default=0.1, ge=0, lt=1)
    test: float = Field(default=0.1, ge=0, lt=1)
    stratify: bool = False
    unlabelled: Literal["split", "train"] = "split"
    time: TimeCut | None = None
    near_duplicates: float | None = Field(default=None, gt=0.3, le=1)

    @property
    def method(self) -> Literal["hash", "stratified", "time"]:
        """The name of the rule."""
        return "time" if self.time else "stratified" if self.stratify else "hash"

    @model_validator(mode="after")
    def _sum(self) -> "Split":
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + val + test is {total:g}, must be 1")
        fields, chosen = type(self).model_fields, ("train", "val", "test", "stratify", "unlabelled")
        unused = [name for name in chosen if getattr(self, name) != fields[name].default]
        if self.time and unused:
            raise ValueError(f"time cuts by time: leave out {', '.join(unused)}")
        return self


class Recipe(Strict):
    """A dataset recipe.

    Attributes:
        name: the gold dataset's name: letters, digits, ``_``, ``-``.
        require: keep only samples that have all of these modalities.
        shard_size: samples per tar.
        salvage: read truncated raw files up to where they break.
        private: data of people: `etl preview` and `etl stats` hide texts, images and identifying values; absent means
            only a ``mimic4`` source is private.
        fit_from: a gold folder whose tokenizer, vocabularies and statistics are used instead of fitting.
    """

    name: str = Field(pattern=NAME)
    source: Annotated[TableSource | AmazonSource | MimicSource, Field(discriminator="kind")]
    split: Split = Split()
    require: list[Modality] = []
    text: TextRecipe | None = None
    image: ImageRecipe | None = None
    tabular: TabularRecipe | None = None
    timeseries: SeriesRecipe | None = None
    shard_size: int = Field(default=10_000, ge=1)
    private: bool | None = None
    fit_from: str | None = None
    salvage: bool = False

    @property
    def is_private(self) -> bool:
        """See ``private``."""
        return self.source.kind == "mimic4" if self.private is None else self.private

    @property
    def modalities(self) -> list[Modality]:
        """Modalities that are built, in bit order."""
        return [name for name in MODALITIES if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if not self.modalities:
            raise ValueError(f"no modality: give a block for at least one of {', '.join(MODALITIES)}")
        absent = [name for name in self.require if name not in self.modalities]
        if absent:
            raise ValueError(f"require names {', '.join(absent)}, but the recipe has no such block")
        for name in self.modalities:
            self._check_source(name)
        if self.split.time and isinstance(self.source, TableSource) and self.source.time is None:
            raise ValueError("split.time cuts by time: name a column in source.time")
        if self.split.stratify and isinstance(self.source, TableSource) and self.source.target != "class":
            raise ValueError(f"split.stratify cuts within each class: source.target is {self.source.target}")
        if self.split.unlabelled == "train" and isinstance(self.source, TableSource) and self.source.target != "class":
            raise ValueError(f"split.unlabelled looks for a class: source.target is {self.source.target}")
        return self

    def _check_source(self, modality: Modality) -> None:
        source = self.source
        if isinstance(source, AmazonSource):
            if modality == "timeseries":
                raise ValueError("amazon2018 has no timeseries: remove the block")
            return
        if isinstance(source, MimicSource):
            self._check_mimic(source, modality)
            return
        field = {"text": "text", "image": "image", "timeseries": "series"}.get(modality)
        if field and getattr(source, field) is None:
            raise ValueError(f"the block {modality} needs source.{field}")
        columns = self.tabular and (self.tabular.numeric or self.tabular.categorical)
        if modality == "tabular" and not columns:
            raise ValueError("tabular needs numeric or categorical columns for a table source")

    def _check_mimic(self, source: MimicSource, modality: Modality) -> None:
        switches = {
            "text": ("radiology", source.notes is not None),
            "image": ("image_metadata", source.image_metadata is not None),
            "tabular": ("demographics: true", source.demographics),
        }
        switch, on = switches.get(modality, ("", True))
        if not on:
            raise ValueError(f"the block {modality} needs source.{switch}")
        if self.timeseries and self.timeseries.variables is not None:
            raise ValueError(
                "timeseries.variables: mimic4 has its own 76 channels; see source.add_items and drop_items"
            )
        if self.timeseries and self.timeseries.max_steps < source.hours:
            raise ValueError(
                f"timeseries.max_steps {self.timeseries.max_steps} cuts the {source.hours} hours of a stay"
            )


def load(given: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a path, or by the name of a file in ``etl/recipes`` (with or without ``.yaml``).

    Args:
        given: path or name.
        overrides: ``source.metadata=null``, ...: values are YAML and replace what the file says.

    Raises:
        ValueError: no such recipe, not YAML, an unknown key (names the nearest) or a bad value.
    """
    text = _read(given)
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {given}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"recipe {given}: must be a mapping of keys to values, got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"recipe {given}: {_explain(error)}") from None


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    value = None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        equals = ""
    if not equals or not all([*parents, last]):
        raise ValueError(f"{override!r}: write key=value, for example split.train=0.7 or source.metadata=null")
    for parent in parents:
        branch = tree.get(parent)
        if not isinstance(branch, dict):
            branch = tree[parent] = {}
        tree = branch
    tree[last] = value


def _read(given: str | Path) -> str:
    if Path(given).is_file():
        return Path(given).read_text(encoding="utf-8")
    folder = files("etl") / "recipes"
    name = Path(given).name.removesuffix(".yaml")
    inside = folder / f"{name}.yaml"
    if not inside.is_file():
        known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        raise ValueError(f"recipe {given}: no such file, and no recipe of that name; there are {', '.join(known)}")
    return inside.read_text(encoding="utf-8")


def _explain(error: ValidationError) -> str:
    # "One or many" gives errors for both readings: an unknown key says most, then what is wrong deepest inside.
    first = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"])))
    path, siblings = _locate(first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], siblings, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(siblings)}"
        return f"unknown key {'.'.join(path)!r}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{'.'.join(path)}: {message}" if path else message


def _locate(loc: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The location as people write it (pydantic adds a union's tag), and the known keys at its last level."""
    path: list[str] = []
    candidates: list[type[BaseModel]] = [Recipe]
    siblings: list[str] = []
    for part in loc:
        if len(candidates) > 1:
            candidates = [m for m in candidates if part in getattr(m.model_fields["kind"].annotation, "__args__", ())]
            continue
        if not candidates or "[" in str(part) or part == candidates[0].__name__:  # the tag of "one or many"
            continue
        path.append(str(part))
        if isinstance(part, int):
            continue
        siblings = list(candidates[0].model_fields) if candidates else []
        field = candidates[0].model_fields.get(str(part)) if candidates else None
        candidates = list(dict.fromkeys(_models(field.annotation))) if field else []
    return path, siblings


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models(argument)
