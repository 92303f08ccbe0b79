"""Contract 3: what a modality is. Each modality lives whole in one file beside this one.

A `Modality` is the loader side: cheap, picklable, no parameters. Its `build` makes the `ModalityEncoder`, the module
with the parameters. A fifth modality is one such file, one line in `lanistr.modalities.MODALITIES` and one function in
`lanistr.transforms`.
"""

import ctypes
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lanistr.config import parse_strict
from lanistr.manifest import ModalitySchema, Strict, item_members

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ContentT = TypeVar("ContentT")  # one decoded sample
ConfigT = TypeVar("ConfigT", bound=Strict)
InputT = TypeVar("InputT")  # a collated batch of them: a frozen dataclass of tensors
NO_ROWS, NO_WEIGHTS = torch.zeros(0, dtype=torch.int64), torch.zeros(0)  # of the masked view where there is none


@dataclass(frozen=True)
class Collated(Generic[InputT]):
    """What `Modality.collate` returns.

    Attributes:
        inputs: tensors for the encoder; both views where masks were given.
        token_counts: (n,) tokens that each row gives to fusion, per view.
        count: how much the reconstruction term predicts (rows of weight 0 excluded).
    """

    inputs: InputT
    token_counts: np.ndarray
    count: float


def stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    """`numpy.stack`; a view, not a copy, where the rows lie one after the other in one writable array."""
    first, base = rows[0], rows[0].base
    shape, kind, size = first.shape, first.dtype, first.nbytes
    if base is None or any(row.base is not base or row.shape != shape or row.dtype != kind for row in rows):
        return np.stack(rows)
    try:
        begin, *others = map(address, rows)
    except (TypeError, ValueError):
        return np.stack(rows)
    if others != list(range(begin + size, begin + len(rows) * size, size)):
        return np.stack(rows)
    return np.lib.stride_tricks.as_strided(first, (len(rows), *shape), (size, *first.strides))


def address(array: np.ndarray) -> int:
    """Where an array begins in memory (asking NumPy takes four times as long).

    Raises:
        TypeError: an array that is read-only or has gaps.
        ValueError: an empty one.
    """
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(array.data))


@dataclass(frozen=True)
class RawContext:
    """What turning raw values into members takes beside the schema.

    Attributes:
        folder: that relative paths are relative to.
        tokenizer: of the dataset that the model was trained on; None where it has no text.
        max_chars: texts are cut to so many characters first; None = not.
    """

    folder: Path
    tokenizer: "Tokenizer | None"
    max_chars: int | None


class Modality(ABC, Generic[ContentT, InputT]):
    """Loader side of a modality."""

    kind: ClassVar[str]
    term: ClassVar[str]  # name of its reconstruction loss, for example "mlm"
    Config: ClassVar[type[Strict]]  # its block in the recipe
    heavy: ClassVar[bool] = False  # decoding a sample takes so long that it wants a process of its own
    augments: bool = False  # whether `decode_augmented` is anything else than `decode`

    def __init__(self, name: str, config: dict[str, Any], schema: ModalitySchema):
        self.name = name
        self.block = config
        self.members = tuple(schema.members)
        self.items = schema.items
        self.absent_token = bool(config.get("absent_token"))

    def parse_config(self, cls: type[ConfigT], config: dict[str, Any]) -> ConfigT:
        """The recipe's block, validated. Raises ValueError that names the key."""
        return parse_strict(cls, config, f"model.modalities.{self.name}")

    def raw_keys(self) -> tuple[str, ...]:
        """Keys of a raw record that `encode` reads."""
        return (self.name,)

    def encode(self, record: Mapping[str, Any], context: RawContext) -> dict[str, bytes]:
        """Members of a raw record, made by `lanistr.transforms` as the ETL makes them; none where it is absent.

        Raises:
            ValueError: a value of the wrong type, or one that cannot be read.
        """
        raise ValueError("cannot be read from raw records")

    def encode_items(
        self, value: Any, kinds: tuple[type, ...], encode: Callable[[Any], dict[str, bytes]]
    ) -> dict[str, bytes]:
        """Members of one value, or of a list of at most ``items`` of them."""
        values = [] if value is None else value if isinstance(value, list | tuple) else [value]
        if len(values) > self.items:
            raise ValueError(f"{len(values)} values; at most {self.items} per record")
        members: dict[str, bytes] = {}
        for item, one in enumerate(values):
            if not isinstance(one, kinds):
                raise ValueError(f"{_short(one)}: must be {' or '.join(k.__name__ for k in kinds)}")
            own = encode(one)
            members |= dict(zip(item_members(list(own), item), own.values(), strict=True))
        return members

    def portable(self) -> dict[str, Any]:
        """Its block of the recipe, such that `build` needs nothing but the block: what an export holds."""
        return self.block

    @classmethod
    @abstractmethod
    def paper_schema(cls) -> ModalitySchema:
        """The schema in the paper's dataset: lets `describe` count parameters without any data."""

    @abstractmethod
    def decode(self, members: Mapping[str, bytes]) -> ContentT:
        """Content of the members of one sample. Raises ValueError for corrupt bytes."""

    def decode_augmented(self, members: Mapping[str, bytes], rng: np.random.Generator) -> ContentT:
        """As `decode`, for training, with random augmentations."""
        return self.decode(members)

    def decode_batch(
        self, members: Sequence[Mapping[str, bytes]], rngs: Iterable[np.random.Generator] | None = None
    ) -> list[ContentT | ValueError]:
        """As `decode` (with ``rngs``, each good until the next one: `decode_augmented`) of each sample, all at once.

        In the place of a sample with corrupt bytes stands the error.
        """
        found: list[ContentT | ValueError] = []
        for own, rng in zip(members, rngs or itertools.repeat(None), strict=rngs is not None):
            try:
                found.append(self.decode(own) if rng is None else self.decode_augmented(own, rng))
            except ValueError as error:
                found.append(error)
        return found

    def cells(self, content: ContentT) -> Mapping[str, float | int]:
        """The parts of a content that have names and are worth looking at one by one (the columns of a table).

        Numbers are floats, NaN = missing; categories are ids, 0 = missing. By default there are none.
        """
        return {}

    def tokens(self, lengths_N: np.ndarray) -> np.ndarray:
        """Tokens that samples of these lengths in the index (each at least 1) give to fusion: what they cost."""
        return lengths_N

    @abstractmethod
    def dummy(self) -> ContentT:
        """The smallest legal content, fixed and finite: stands in where a batch has no sample of the modality."""

    @abstractmethod
    def example(self) -> ContentT:
        """Content of the largest size that the schema and the recipe allow: what `describe` counts."""

    @abstractmethod
    def corrupt(self, content: ContentT, rng: np.random.Generator) -> np.ndarray:
        """Which units (tokens, patches, cells) the masked view hides and predicts, at least one where there is one.

        A boolean mask over the units, or what stands in their place (text).
        """

    @abstractmethod
    def collate(
        self, contents: Sequence[ContentT], masks: Sequence[np.ndarray] | None, weights: Sequence[float]
    ) -> Collated[InputT]:
        """Pack n >= 1 contents. With masks: a clean and a masked view, stacked in this order.

        A row of weight 0 (a dummy, or evaluation padding) must not influence anything of weight > 0.
        """

    def adapt(
        self, stored: dict[str, Tensor], own: dict[str, Tensor], schema: ModalitySchema
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Weights of an encoder that was trained on another dataset, in the shapes of this one.

        Args:
            stored: tensors of the trained ``encoder``, by name.
            own: this dataset's fresh encoder's.
            schema: of the dataset that the stored ones were trained on.

        Returns:
            What to load, and notes for the report. By default everything as it is.
        """
        return stored, []

    @abstractmethod
    def build(self, width: int, attention: str) -> "ModalityEncoder[InputT]":
        """The module with the parameters.

        Initialisation uses torch's global generator.

        Args:
            width: of the fusion tokens.
            attention: a backend of `lanistr.ops.attention` (resolved, not ``auto``).
        """


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


class ModalityEncoder(nn.Module, ABC, Generic[InputT]):
    """Encoder, projection to the fusion width, and reconstruction head.

    ``encoder`` holds what fine-tuning freezes; ``projection`` is the paper's single linear layer; ``head`` holds what
    only pretraining needs (mask tokens, decoders): fine-tuning drops it.

    Attributes:
        pretrained: whether ``encoder`` starts from published weights.
    """

    pretrained: bool = False

    encoder: Any
    projection: nn.Module
    head: Any

    @abstractmethod
    def encode(self, inputs: InputT) -> Tensor:
        """Hidden states (rows of all views, hidden), one per token, in the order of the collated rows."""

    @abstractmethod
    def reconstruct(self, hidden: Tensor, inputs: InputT) -> Tensor:
        """Summed loss (scalar, float32) over masked positions of the masked view; weight-0 rows add exactly zero."""

    def project(self, hidden: Tensor, inputs: InputT) -> Tensor:
        """Tokens of the fusion width: as many as `Collated.token_counts` says, in the order of the collated rows."""
        return self.projection(self.entering(hidden, inputs))

    def entering(self, hidden: Tensor, inputs: InputT) -> Tensor:
        """The hidden states of the tokens that enter fusion; by default all."""
        return hidden

    def cell_shares(self, inputs: InputT) -> Tensor | None:
        """How much of its attention each of `Modality.cells` gets, (rows of one view, cells), where it attends to cells."""
        return None

    def blocks(self) -> Iterable[nn.Module]:
        """The repeated layers, which `torch.compile` compiles one by one."""
        return ()

    def checkpoint_activations(self) -> None:
        """From now on keep only the inputs of the repeated layers in training, and compute the rest again in backward."""
