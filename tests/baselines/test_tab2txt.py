"""Tables as words: what a row spells, where the words stand, and that a model reads them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lanistr.baselines.pretrained import AlbefMethod, PretrainedMethod, Tab2TxtMethod
from lanistr.baselines.tab2txt import TableAsText, View, spell
from lanistr.baselines.trainer import seeded
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import CorruptSample, Fetched, read_samples
from lanistr.metrics import accuracy
from lanistr.transforms import CategoricalColumn, NumericColumn, TabularSpec, npy_bytes, read_npy
from tests.baselines.planted import CHANCE, make_tokenizer, planted_gold, planted_recipe, planted_splits, publish_text
from tests.tiny_gold import write_gold

SPEC = TabularSpec(
    numeric=[NumericColumn(name="weight_g", mean=0.0, std=1.0), NumericColumn(name="price", mean=5.0, std=2.0)],
    categorical=[
        CategoricalColumn(name="material", values=["steel", "(none)"]),
        CategoricalColumn(name="maker", values=["acme"], buckets=20),
    ],
)


def test_a_row_spells_its_columns_and_values() -> None:
    assert spell(np.array([450.0, 2.5, 2, 3], dtype=np.float32), SPEC) == (
        "weight g: 450, price: 2.5, material: steel, maker: bucket 0"
    )
    assert spell(np.array([np.nan, -0.125, 3, 20]), SPEC) == "price: -0.125, material: (none), maker: bucket 17"
    assert spell(np.array([1234567.0, np.nan, 1, np.nan]), SPEC) == "weight g: 1235000, material: unseen"
    assert spell(np.full(4, np.nan), SPEC) == ""
    with pytest.raises(ValueError, match="category id 23 of column maker, cardinality 23"):
        spell(np.array([1.0, 1.0, 1, 23]), SPEC)
    with pytest.raises(ValueError, match=r"shape \(3,\), the schema has 4 columns"):
        spell(np.ones(3), SPEC)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32) | st.just(float("nan")), min_size=2, max_size=2),
    st.integers(1, 3),
    st.integers(1, 22),
)
def test_what_is_spelt_can_be_read_back(numbers: list[float], material: int, maker: int) -> None:
    words = spell(np.array([*numbers, material, maker]), SPEC)
    cells = dict(cell.split(": ") for cell in words.split(", "))
    for name, number in zip(("weight g", "price"), numbers, strict=True):
        if np.isnan(number):
            assert name not in cells
        else:
            assert float(cells[name]) == pytest.approx(number, rel=5e-4)
    assert cells["material"] == ["unseen", "steel", "(none)"][material - 1]
    assert cells["maker"] == ["unseen", "acme", *(f"bucket {i}" for i in range(20))][maker - 1]


def test_the_words_stand_before_the_text_and_the_table_is_gone(tmp_path: Path) -> None:
    present = [["text", "tabular", "image"], ["tabular"], ["text"], ["image"]]
    recipe = planted_recipe()
    gold = planted_gold(tmp_path, lambda i: present[i % 4])
    view = View(recipe, None, tables=True)
    dataset, plain = view.open(gold, "train"), planted_splits(tmp_path / "same", lambda i: present[i % 4]).train
    assert isinstance(dataset, TableAsText)
    assert list(dataset.modalities) == ["text", "image", "timeseries"]
    tokenizer, bits = make_tokenizer(), dataset.index.bits
    for position in range(8):
        ours, theirs = dataset.fetch(position), plain.fetch(position)
        own = read_npy(theirs.members["tok.npy"]).tolist() if "tok.npy" in theirs.members else [2, 3]
        words = spell(read_npy(theirs.members["tab.npy"]), plain.modalities["tabular"].spec) if position % 4 < 2 else ""  # pyright: ignore
        ids = tokenizer.encode(words, add_special_tokens=False).ids
        assert (1 in ids) is False  # every word of the table has a token of its own
        assert "tab.npy" not in ours.members
        if position % 4 == 3:
            assert "tok.npy" not in ours.members
        else:
            assert read_npy(ours.members["tok.npy"]).tolist() == [2, *ids, *own[1:-1], 3]
        assert ours.presence == sum(bits[n] for n in ours_present(position))
        assert ours.members.get("jpg") == theirs.members.get("jpg")


def ours_present(position: int) -> list[str]:
    return [["text", "image"], ["text"], ["text"], ["image"]][position % 4]


def test_the_text_has_room_for_the_longest_table_as_far_as_bert_has(tmp_path: Path) -> None:
    gold, recipe = planted_gold(tmp_path), planted_recipe()
    view = View(recipe, None, tables=True).widened(gold)
    dataset = view.open(gold, "train")
    lengths = [len(read_npy(dataset.fetch(i).members["tok.npy"])) for i in range(dataset.n)]
    assert max(lengths) <= view.widest <= 16 + max(lengths)
    block = view.model_recipe(dataset.manifest).model.modalities
    assert block["text"]["max_tokens"] == view.widest
    assert "tabular" not in block
    narrow = planted_recipe(model__modalities__text__positions=20)
    assert View(narrow, None, tables=True).widened(gold).widest == 20


def test_a_corrupt_table_is_a_corrupt_sample(tmp_path: Path) -> None:
    gold = planted_gold(tmp_path)
    dataset = View(planted_recipe(), None, tables=True).open(gold, "train")
    assert isinstance(dataset, TableAsText)
    inner, key = dataset.inner, dataset.inner.fetch(0).key

    class Bad(GoldDataset):
        def __init__(self) -> None:
            self.__dict__.update(inner.__dict__)

        def fetch(self, position: int) -> Fetched:
            fetched = inner.fetch(position)
            return fetched._replace(members={**fetched.members, "tab.npy": npy_bytes(np.ones(7))})

    dataset.inner = Bad()
    (found,) = read_samples(dataset, [0])
    assert isinstance(found, CorruptSample)
    assert found.key == key
    assert "shape (7,), the schema has 3 columns" in found.reason


def test_without_a_tokenizer_tables_cannot_be_spelt(tmp_path: Path) -> None:
    gold = write_gold(tmp_path, {"train": 4}, lambda i: ["text", "tabular"])
    with pytest.raises(ValueError, match="tables are spelt in a text and its tokenizer, which tiny has not"):
        View(planted_recipe(), None, tables=True).open(gold, "train")


def test_lanistr_on_tab2txt_pretrains_once_beats_chance_and_repeats_itself(tmp_path: Path) -> None:
    recipe = planted_recipe(finetune__global_batch=8)
    splits = planted_splits(tmp_path / "gold", lambda i: ["text", "tabular"], recipe)
    methods = [Tab2TxtMethod(recipe, tmp_path / "gold", tmp_path / name, 1) for name in ("a", "b")]
    methods[0].pretrain(1)
    weights = tmp_path / "a" / "pretrain-0.safetensors"
    made = weights.stat().st_mtime_ns
    first, second = (method.fit(splits.draw(72, 1), splits.val, 1)(splits.test) for method in methods)
    assert weights.stat().st_mtime_ns == made
    np.testing.assert_array_equal(first, second)
    assert accuracy(first, splits.test.labels_N) > CHANCE + 0.3


@pytest.mark.parametrize("kind", [Tab2TxtMethod, partial(AlbefMethod, tables=True)])
def test_a_frozen_text_stays_as_it_was_and_runs_once_for_all_seeds(
    kind: Callable[..., PretrainedMethod], tmp_path: Path
) -> None:
    crossing = {"objective__cross": ["text", "tabular"]}  # of which Tab2Txt has only one
    published = publish_text(tmp_path / "bert")
    recipe = planted_recipe(pretrain__cache=True, pretrain__epochs=1, **crossing, **published)
    gold = planted_gold(tmp_path / "gold")
    method = kind(recipe, gold, tmp_path / "a", 2)
    for seed in (0, 1):
        method.pretrain(seed)
    assert len(list((tmp_path / "a").glob("features-*"))) == 1
    dataset = method.view.open(gold, "train")
    for seed in (0, 1):
        config = method.view.model_recipe(dataset.manifest)
        config = config.model_copy(update={"pretrain": config.pretrain.model_copy(update={"seed": seed})})
        with seeded(seed):
            fresh = method.make(config, dataset).model.state_dict()
        stored = load_file(str(tmp_path / "a" / f"pretrain-{seed}.safetensors"))
        for name, weight in fresh.items():
            moved = not torch.equal(stored[f"model.{name}"], weight)
            assert moved != name.startswith("encoders.text.encoder."), name
