"""Raw value -> members: the same at training and at prediction."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lanistr.transforms import (
    FIRST_KNOWN_ID,
    UNSEEN_ID,
    CategoricalColumn,
    NumericColumn,
    TabularEncoder,
    TabularSpec,
    encode_text,
    load_tokenizer,
    read_npy,
    text_spec,
)


def test_padding_and_truncation_of_a_tokenizer_file_are_not_stored(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=10)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    spec = text_spec(loaded, 512)
    for text, ids in (("a b", [2, 5, 6, 3]), ("a b a b a b", [2, 5, 6, 5, 6, 5, 6, 3])):
        assert read_npy(encode_text(text, loaded, spec)["tok.npy"]).tolist() == ids


@pytest.mark.parametrize("spelling", ["true", "True"])
def test_a_bool_is_found_as_json_or_python_spells_it(spelling: str) -> None:
    column = CategoricalColumn(name="verified", values=[spelling, spelling.replace("rue", "")])
    encoder = TabularEncoder(TabularSpec(numeric=[], categorical=[column]))
    assert encoder.row({"verified": True}).tolist() == [FIRST_KNOWN_ID]


def test_an_unseen_category_has_the_reserved_id_and_a_missing_cell_is_missing() -> None:
    spec = TabularSpec(
        numeric=[NumericColumn(name="x", mean=0, std=1)],
        categorical=[CategoricalColumn(name="c", values=["a"]), CategoricalColumn(name="d", values=["a"], buckets=3)],
    )
    row = TabularEncoder(spec).row({"x": float("inf"), "c": "new", "d": "new"})
    assert np.isnan(row[0])
    assert row[1] == UNSEEN_ID
    assert FIRST_KNOWN_ID + 1 <= row[2] < FIRST_KNOWN_ID + 4  # a column with buckets hashes rare and new alike
    assert np.isnan(TabularEncoder(spec).row({})).all()
