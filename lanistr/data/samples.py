"""Members -> samples: decoded modality by modality, so that what is decoded together need not be copied together."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lanistr.data.streams import philox
from lanistr.manifest import item_members
from lanistr.modalities.base import Modality


class CorruptSample(ValueError):
    """A sample whose bytes are gone, are not what the index says, or cannot be decoded.

    Attributes:
        key: of the sample.
        reason: what is wrong, and where.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(reason)
        self.key, self.reason = key, reason

    def __reduce__(self) -> tuple[Any, ...]:  # through the pipe of a worker process
        return type(self), (self.key, self.reason)


class Sample(NamedTuple):
    """One decoded sample.

    Attributes:
        presence: bitmask of the modalities in use.
        label: -1 = unlabelled.
        target: (L,) float32 numbers of a multi-label target or a regression, NaN = unknown; None with classes.
        contents: what `Modality.decode` returned, present modalities only.
        repeat: how many times the epoch has already seen it; a repeat draws new masks.
    """

    key: str
    presence: int
    label: int
    contents: dict[str, Any]
    repeat: int = 0
    target: np.ndarray | None = None


class Several(tuple[Any, ...]):
    """The contents of a modality of which a sample may have more than one (`ModalitySchema.items`)."""


class Fetched(NamedTuple):
    """The bytes of one sample.

    Attributes:
        key, presence, label, target: as in `Sample`.
        members: by name, those in use.
        where: the shard, for errors.
    """

    key: str
    presence: int
    label: int
    target: np.ndarray | None
    members: dict[str, bytes]
    where: str


class Fetches(Protocol):
    """Where samples come from."""

    @property
    def modalities(self) -> Mapping[str, Modality[Any, Any]]:
        """In use."""
        ...

    def fetch(self, position: int) -> Fetched:
        """The bytes of the sample at ``position``. Raises `CorruptSample`."""
        ...


def read_samples(
    source: Fetches,
    positions: Sequence[int],
    repeats: Sequence[int] | None = None,
    rng_key: tuple[object, ...] | None = None,
) -> list[Sample | CorruptSample]:
    """Read and decode samples.

    Args:
        source: has them.
        positions: in the source.
        repeats: how many times the epoch has already seen each; None = never.
        rng_key: draw random augmentations keyed by this, the repeat and the key; None = decode plainly.

    Returns:
        For each position the sample, or what is wrong with it.
    """
    places = list(zip(positions, repeats or [0] * len(positions), strict=True))
    found = [_fetch(source, position) for position, _ in places]
    contents: list[dict[str, Any]] = [{} for _ in places]
    whole = [(i, fetched) for i, fetched in enumerate(found) if isinstance(fetched, Fetched)]
    for name, modality in source.modalities.items():
        items = _find_items(modality, whole)
        rngs = None
        if rng_key is not None and modality.augments:
            rngs = (
                philox("augment", *rng_key, places[i][1], fetched.key, name, *([item] if item else []))
                for i, fetched, item, _ in items
            )
        decoded = modality.decode_batch([members for _, _, _, members in items], rngs)
        for (i, fetched, _, _), content in zip(items, decoded, strict=True):
            if isinstance(content, ValueError):
                found[i] = CorruptSample(fetched.key, f"{fetched.where}: {fetched.key}: {content}")
            elif modality.items > 1:
                contents[i][name] = Several((*contents[i].get(name, ()), content))
            else:
                contents[i][name] = content
    return [
        Sample(f.key, f.presence, f.label, content, repeat, f.target) if isinstance(f, Fetched) else f
        for f, content, (_, repeat) in zip(found, contents, places, strict=True)
    ]


def _find_items(
    modality: Modality[Any, Any], fetched: Sequence[tuple[int, Fetched]]
) -> list[tuple[int, Fetched, int, dict[str, bytes]]]:
    """Place, sample, number within the sample and members (named as if it were the first) of each text, image, ..."""
    first = modality.members[0]
    if modality.items == 1:
        return [(i, sample, 0, sample.members) for i, sample in fetched if first in sample.members]
    names = [item_members(modality.members, item) for item in range(modality.items)]
    return [
        (i, sample, item, {m: sample.members[name] for m, name in zip(modality.members, own, strict=True)})
        for i, sample in fetched
        for item, own in enumerate(names)
        if own[0] in sample.members
    ]


def intact(found: Sequence[Sample | CorruptSample]) -> list[Sample]:
    """The samples. Raises the first `CorruptSample` among them."""
    samples = []
    for sample in found:
        if isinstance(sample, CorruptSample):
            raise sample
        samples.append(sample)
    return samples


def _fetch(source: Fetches, position: int) -> Fetched | CorruptSample:
    try:
        return source.fetch(position)
    except CorruptSample as bad:
        return bad
