"""Hidden modalities are gone as if they had never been there."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lanistr.data.hiding import HidingDataset
from lanistr.data.reader import GoldDataset
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from tests.model.support import NAMES, RECIPE
from tests.tiny_gold import write_gold

N = 200


def open_gold(folder: Path) -> GoldDataset:
    return GoldDataset(folder, "test", make_modalities(Manifest.load(folder), RECIPE.model.modalities))


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> GoldDataset:
    folder = tmp_path_factory.mktemp("hiding") / "gold"
    return open_gold(write_gold(folder, {"test": N}, lambda i: NAMES, items={"image": 3}))


def hidden_at(dataset: GoldDataset, name: str, rate: float, seed: int, n: int = N) -> np.ndarray:
    """(n,) bool, as the samples themselves have it."""
    hiding = HidingDataset(dataset, {name: rate}, seed)
    bit = dataset.manifest.bit(name)
    return np.array([not hiding.fetch(i).presence & bit for i in range(n)])


@settings(max_examples=15)
@given(
    name=st.sampled_from(NAMES),
    rates=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    seed=st.integers(0, 1 << 30),
)
def test_what_is_hidden_at_a_rate_is_hidden_at_every_higher_one(
    complete: GoldDataset, name: str, rates: list[float], seed: int
) -> None:
    low, high = (hidden_at(complete, name, rate, seed, 40) for rate in rates)
    assert not (low & ~high).any()


def test_rates_are_kept_and_modalities_are_drawn_independently(complete: GoldDataset) -> None:
    text, image = (hidden_at(complete, name, 0.4, 7) for name in ("text", "image"))
    for share, expected in [(text, 0.4), (image, 0.4), (text & image, 0.16)]:
        assert abs(share.mean() - expected) < 4 * (expected * (1 - expected) / N) ** 0.5
    assert (hidden_at(complete, "text", 0.4, 8) != text).any()


@pytest.mark.parametrize("name", NAMES)
def test_hiding_all_of_a_modality_gives_the_dataset_written_without_it(
    complete: GoldDataset, name: str, tmp_path: Path
) -> None:
    others = [other for other in NAMES if other != name]
    without = open_gold(write_gold(tmp_path / "gold", {"test": N}, lambda i: others, items={"image": 3}))
    hiding = HidingDataset(complete, {name: 1.0}, 0)
    for position in range(0, N, 7):
        got, expected = hiding.fetch(position), without.fetch(position)
        assert got._replace(where="") == expected._replace(where="")


def test_rate_0_changes_nothing_and_the_dataset_beneath_stays_as_it_is(complete: GoldDataset) -> None:
    before = [complete.fetch(i) for i in range(20)]
    HidingDataset(complete, dict.fromkeys(NAMES, 1.0), 0).fetch(3)
    nothing = HidingDataset(complete, dict.fromkeys(NAMES, 0.0), 0)
    assert [nothing.fetch(i) for i in range(20)] == before
    assert [complete.fetch(i) for i in range(20)] == before


def test_a_worker_process_hides_the_same(complete: GoldDataset) -> None:
    hiding = HidingDataset(complete, {"text": 0.5, "image": 0.3}, 5)
    sent = pickle.loads(pickle.dumps(hiding))
    assert [sent.fetch(i) for i in range(N)] == [hiding.fetch(i) for i in range(N)]


@pytest.mark.parametrize("rates, message", [({"smell": 0.5}, "no such modality"), ({"text": 1.5}, r"in \[0, 1\]")])
def test_what_cannot_be_hidden_is_refused(complete: GoldDataset, rates: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HidingDataset(complete, rates, 0)
