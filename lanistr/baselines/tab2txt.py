"""Tab2Txt: tables as words, put before the text (paper, section "Baselines"), for methods that read text.

The paper spells categorical columns; here numbers are spelt, too, and missing cells left out. A dataset stores encoded
columns: what an id stands for is in the manifest; a hashed value is only known by its bucket, and stays ``bucket 17``.

Shape suffixes: K columns of a row.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from lanistr.baselines import Subset
from lanistr.config import Recipe
from lanistr.data.reader import GoldDataset, load_manifest, load_tokenizer_bytes, open_split
from lanistr.data.samples import CorruptSample, Fetched
from lanistr.manifest import Manifest, ModalitySchema
from lanistr.modalities import modalities_of
from lanistr.modalities.tabular import TabularModality
from lanistr.modalities.text import TextConfig, TextModality
from lanistr.transforms import FIRST_KNOWN_ID, UNSEEN_ID, CategoricalColumn, TabularSpec, npy_bytes, read_npy

DIGITS = 4  # significant ones of a number
MAX_TOKENS = 512  # of BERT
SAMPLED = 1000  # rows that tell how many tokens a table takes


def spell(row_K: np.ndarray, spec: TabularSpec) -> str:
    """``weight g: 450, material: steel`` of a stored row; missing cells are left out.

    Raises:
        ValueError: not a row of this schema.
    """
    columns = [*spec.numeric, *spec.categorical]
    if row_K.shape != (len(columns),):
        raise ValueError(f"tab.npy: shape {row_K.shape}, the schema has {len(columns)} columns")
    return ", ".join(
        f"{column.name.replace('_', ' ')}: {_spell_cell(value, column)}"
        for column, value in zip(columns, row_K.tolist(), strict=True)
        if np.isfinite(value)
    )


def _spell_cell(value: float, column: Any) -> str:
    if not isinstance(column, CategoricalColumn):
        return np.format_float_positional(value, precision=DIGITS, fractional=False, trim="-")
    category = int(value)
    if not UNSEEN_ID <= category < column.cardinality:
        raise ValueError(f"tab.npy: category id {category} of column {column.name}, cardinality {column.cardinality}")
    known = FIRST_KNOWN_ID <= category < FIRST_KNOWN_ID + len(column.values)
    return column.name_of(category) if known else column.name_of(category).strip("()")


class TableAsText(GoldDataset):
    """The same samples without tables, whose rows stand as words before the sample's text.

    A sample that had a table and no text has a text now. Plans still count what the index says.

    Args:
        dataset: the split, with the tables in use.
        text: name of the modality that takes the words.
        tables: names of the tables.
        tokenizer: of the dataset.
    """

    def __init__(self, dataset: GoldDataset, text: str, tables: list[str], tokenizer: Any):
        self.__dict__.update(dataset.__dict__)
        self.inner, self.tokenizer = dataset, tokenizer
        self.modalities = {name: modality for name, modality in dataset.modalities.items() if name not in tables}
        self.text = cast(TextModality, dataset.modalities[text])
        self.tables = [cast(TabularModality, dataset.modalities[name]) for name in tables]

    @property
    def view_id(self) -> str:
        """Of the words, too: features of these texts are no features of the dataset's own."""
        return f"{self.inner.content_id}+{'+'.join(table.name for table in self.tables)}"

    def only(self, names: Collection[str]) -> GoldDataset:
        """The words stay where the text does."""
        tables = [table.name for table in self.tables]
        if self.text.name not in names:
            return self.inner.only([name for name in names if name not in tables])
        return TableAsText(self.inner.only([*names, *tables]), self.text.name, tables, self.tokenizer)

    def fetch(self, position: int) -> Fetched:
        """As `GoldDataset.fetch`, with the words in the text's member."""
        fetched = self.inner.fetch(position)
        members, presence, words = dict(fetched.members), fetched.presence, []
        try:
            for table in self.tables:
                data = members.pop(table.members[0], None)
                if data is not None:
                    presence &= ~self.index.bits[table.name]
                    words.append(spell(read_npy(data), table.spec))
            spelt = ", ".join(filter(None, words))
            if spelt:
                member = self.text.members[0]
                members[member] = self._before(spelt, members.get(member))
                presence |= self.index.bits[self.text.name]
        except ValueError as error:
            raise CorruptSample(fetched.key, f"{fetched.where}: {fetched.key}: {error}") from None
        return fetched._replace(members=members, presence=presence)

    def _before(self, words: str, text: bytes | None) -> bytes:
        """The text's member with words in front."""
        spec = self.text.spec
        ids = self.tokenizer.encode(words, add_special_tokens=False).ids
        own = [] if text is None else read_npy(text)[1:-1].tolist()
        return npy_bytes(np.array([spec.cls_id, *ids, *own, spec.sep_id], dtype=np.int32))


@dataclass(frozen=True)
class View:
    """How a method sees datasets: some kinds of modalities, tables as words or not at all.

    Attributes:
        recipe: of the comparison.
        kinds: that the method has encoders for; None = all but tables.
        tables: whether tables are spelt.
        single: of several texts or images the first one only, and all tokens of a text enter fusion.
        widest: text tokens that the model takes, where tables are spelt.
    """

    recipe: Recipe
    kinds: tuple[str, ...] | None
    tables: bool
    single: bool = False
    widest: int = MAX_TOKENS
    _opened: dict[tuple[str, str], GoldDataset] = field(default_factory=dict, compare=False, repr=False)

    def widened(self, data: Path) -> "View":
        """With room in the text for the tables of a dataset, as far as BERT has it.

        Raises:
            ValueError: no such dataset; no text, or no tokenizer, to spell tables in.
        """
        dataset = self.open(data, "train")
        if not isinstance(dataset, TableAsText):
            return self
        config = dataset.text.config
        room = min(config.positions or MAX_TOKENS, MAX_TOKENS)
        return View(self.recipe, self.kinds, self.tables, self.single, min(room, self._own_tokens(dataset)))

    def _own_tokens(self, dataset: "TableAsText") -> int:
        block = self.recipe.model.modalities[dataset.text.name]
        return TextConfig.model_validate(block).max_tokens + _longest(dataset)

    def model_recipe(self, manifest: Manifest) -> Recipe:
        """The recipe of a model for this view."""
        blocks = {n: self._block(n, s) for n, s in manifest.modalities.items() if self._is_seen(n, s)}
        return self.recipe.model_copy(update={"model": self.recipe.model.model_copy(update={"modalities": blocks})})

    def open(self, path: str | Path, split: str) -> GoldDataset:
        """A split, opened once. Raises ValueError as `View.make` does."""
        key = (str(path), split)
        if key not in self._opened:
            self._opened[key] = self._open(path, split)
        return self._opened[key]

    def of(self, subset: Subset) -> Subset:
        """The same samples."""
        return Subset(self.open(subset.dataset.path, subset.dataset.split), subset.positions_N)

    def _open(self, path: str | Path, split: str) -> GoldDataset:
        data, configured = self.recipe.data, self.recipe.model.modalities
        manifest = load_manifest(path, data)
        schemas, blocks = {}, self.model_recipe(manifest).model.modalities
        for name, schema in manifest.modalities.items():
            schemas[name] = schema.model_copy(update={"items": 1}) if self.single and name in blocks else schema
        tables = [n for n, s in schemas.items() if self.tables and s.kind == "tabular" and n in configured]
        spelt = {name: configured[name] for name in tables}
        modalities = modalities_of(schemas, blocks | spelt, f"dataset {manifest.name}")
        dataset = open_split(path, split, modalities, data)
        if not tables:
            return dataset
        texts = [name for name, modality in modalities.items() if modality.kind == "text"]
        blob = load_tokenizer_bytes(path, data, manifest)
        if not texts or blob is None:
            raise ValueError(f"{path}: tables are spelt in a text and its tokenizer, which {manifest.name} has not")
        return TableAsText(dataset, texts[0], tables, _load(blob))

    def _is_seen(self, name: str, schema: ModalitySchema) -> bool:
        fits = schema.kind != "tabular" if self.kinds is None else schema.kind in self.kinds
        return fits and name in self.recipe.model.modalities

    def _block(self, name: str, schema: ModalitySchema) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if schema.kind == "text":
            changes |= {"max_tokens": self.widest} if self.tables else {}
            changes |= {"fusion_tokens": "all"} if self.single else {}
        return {**self.recipe.model.modalities[name], **changes}


def _load(blob: bytes) -> Any:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_str(blob.decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _longest(dataset: TableAsText) -> int:
    """Tokens of the longest of some tables, spread over the split."""
    longest = 0
    for position in np.unique(np.linspace(0, dataset.n - 1, SAMPLED).astype(int)).tolist():
        fetched = dataset.inner.fetch(position)
        rows = [(t, fetched.members[t.members[0]]) for t in dataset.tables if t.members[0] in fetched.members]
        words = ", ".join(spell(read_npy(data), table.spec) for table, data in rows)
        longest = max(longest, len(dataset.tokenizer.encode(words, add_special_tokens=False).ids))
    return longest
