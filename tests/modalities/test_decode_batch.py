"""Decoding a batch at once gives what decoding its samples one by one gives, and stops at no bad one."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from lanistr.data.streams import philox
from lanistr.modalities.base import Modality, stack
from lanistr.transforms import npy_bytes
from tests.model.support import NAMES, make_modalities, random_members, recipe_with

BAD: dict[str, list[dict[str, bytes]]] = {
    "text": [
        {"tok.npy": b"no npy"},
        {"tok.npy": npy_bytes(np.zeros((2, 2), dtype=np.uint16))},
        {"tok.npy": npy_bytes(np.array([2], dtype=np.uint16))},
        {"tok.npy": npy_bytes(np.array([2, 50, 3], dtype=np.uint16))},
        {"tok.npy": npy_bytes(np.array([2, -1, 3], dtype=np.int32))},
    ],
    "image": [{"jpg": b"no jpeg"}, {"jpg": random_members(np.random.default_rng(0))["image"]["jpg"][:200]}],
    "tabular": [
        {"tab.npy": b"no npy"},
        {"tab.npy": npy_bytes(np.zeros(5, dtype=np.float32))},
        {"tab.npy": npy_bytes(np.array([0, 0, 5], dtype=np.float32))},
        {"tab.npy": npy_bytes(np.array([0, 0, -1], dtype=np.float32))},
    ],
    "timeseries": [{"ts.npy": b"no npy", "tsmask.npy": b""}],
}


def leaves(content: Any) -> list[np.ndarray]:
    if isinstance(content, np.ndarray):
        return [content]
    return list(content) if isinstance(content, tuple) else list(vars(content).values())


def assert_same(batch: Any, alone: Any) -> None:
    assert type(batch) is type(alone)
    for a, b in zip(leaves(batch), leaves(alone), strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def good(name: str, n: int = 9) -> list[Mapping[str, bytes]]:
    return [random_members(np.random.default_rng(i))[name] for i in range(n)]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_samples_one_by_one(name: str) -> None:
    modality = make_modalities()[name]
    members = good(name)
    for content, own in zip(modality.decode_batch(members), members, strict=True):
        assert_same(content, modality.decode(own))
    assert modality.decode_batch([]) == []


@pytest.mark.parametrize("name", NAMES)
def test_bad_samples_are_errors_in_their_places_and_no_others(name: str) -> None:
    modality = make_modalities()[name]
    members = good(name)
    for i, bad in enumerate(BAD[name]):
        members.insert(2 * i, bad)
    for content, own in zip(modality.decode_batch(members), members, strict=True):
        if own in BAD[name]:
            assert isinstance(content, ValueError)
            with pytest.raises(ValueError, match=r".") as error:
                modality.decode(own)
            assert str(content) == str(error.value)
        else:
            assert_same(content, modality.decode(own))


def test_augmented_images_of_a_batch_draw_from_their_own_generators() -> None:
    recipe = recipe_with(model__modalities__image__crop=[0.2, 0.9], model__modalities__image__flip=0.5)
    modality = make_modalities(recipe)["image"]
    members = good("image")
    batch = modality.decode_batch(members, (philox("augment", i) for i in range(len(members))))
    for i, (content, own) in enumerate(zip(batch, members, strict=True)):
        assert_same(content, modality.decode_augmented(own, philox("augment", i)))


def test_images_of_a_batch_are_collated_without_a_copy() -> None:
    modality: Modality[Any, Any] = make_modalities()["image"]
    contents: list[Any] = modality.decode_batch(good("image"))
    pixels = modality.collate(contents, None, [1.0] * len(contents)).inputs.pixels_nHWC
    assert np.shares_memory(pixels.numpy(), contents[0])
    assert np.array_equal(pixels.numpy(), np.stack(contents))


@pytest.mark.parametrize(
    "chosen", [[0, 1, 2, 3], [1, 2, 3], [2], [3, 2, 1], [0, 0, 0], [0, 2], [0, 1, 3], [1, 2, 0, 3]], ids=str
)
@pytest.mark.parametrize("crooked", [False, True])
def test_stacked_rows_are_the_rows_whether_copied_or_not(chosen: list[int], crooked: bool) -> None:
    array = np.arange(4 * 5 * 6, dtype=np.int32).reshape(4, 5, 6)
    rows = list(array[:, ::-1] if crooked else array)
    expected = np.stack([rows[i] for i in chosen])
    found = stack([rows[i] for i in chosen])
    assert np.array_equal(found, expected)
    beside = not crooked and chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    assert np.shares_memory(found, array) == beside


def test_rows_of_several_arrays_are_copied() -> None:
    first, second = np.zeros((2, 3)), np.ones((2, 3))
    assert np.array_equal(stack([first[0], second[0], first[1]]), [[0] * 3, [1] * 3, [0] * 3])
    assert np.array_equal(stack([np.zeros(3), np.ones(3)]), [[0] * 3, [1] * 3])


def test_rows_that_nobody_may_write_are_copied() -> None:
    array = np.arange(6).reshape(2, 3)
    array.flags.writeable = False
    found = stack(list(array))
    assert np.array_equal(found, array)
    assert found.flags.writeable
