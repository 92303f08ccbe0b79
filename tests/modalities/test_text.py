"""Text corruption: what is predicted, and what stands in its place."""

from typing import Any

import numpy as np
import pytest
import torch

from lanistr.modalities.padded import PaddedText
from lanistr.modalities.text import KEPT, TextModality
from lanistr.transforms import TextSpec

SPEC = TextSpec(vocab_size=1000, max_tokens=512, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4)
IDS = np.concatenate([[2], np.full(20_000, 500), [3]])


def corrupt(**config: Any) -> np.ndarray:
    schema = TextModality.paper_schema().model_copy(update={"spec": SPEC.model_dump()})
    modality = TextModality("text", {"max_tokens": 30_000, **config}, schema)
    return modality.corrupt(IDS, np.random.default_rng(0))


@pytest.mark.parametrize("ratio", [0.15, 0.3])
def test_published_corruption_is_always_the_mask_token_at_the_given_rate(ratio: float) -> None:
    replaced = corrupt(mask_ratio=ratio)
    assert set(replaced.tolist()) == {KEPT, SPEC.mask_id}
    assert abs((replaced == SPEC.mask_id).mean() - ratio) < 0.01
    assert replaced[0] == replaced[-1] == KEPT


def test_bert_corruption_is_eighty_ten_ten() -> None:
    replaced = corrupt(corruption="bert")
    predicted = replaced[replaced != KEPT]
    assert abs(len(predicted) / len(IDS) - 0.15) < 0.01
    assert abs((predicted == SPEC.mask_id).mean() - 0.8) < 0.03
    assert abs((predicted == 500).mean() - 0.1) < 0.03
    others = predicted[(predicted != SPEC.mask_id) & (predicted != 500)]
    assert others.min() >= 0
    assert others.max() < SPEC.vocab_size
    assert len(np.unique(others)) > 100


def test_content_without_a_maskable_token_predicts_nothing() -> None:
    schema = TextModality.paper_schema().model_copy(update={"spec": SPEC.model_dump()})
    modality = TextModality("text", {}, schema)
    assert (modality.corrupt(np.array([2, 3]), np.random.default_rng(0)) == KEPT).all()


def test_the_mean_of_a_texts_tokens_may_enter_fusion_in_their_place() -> None:
    config = {"hidden": 8, "layers": 1, "heads": 2, "intermediate": 16, "max_tokens": 16, "fusion_tokens": "mean"}
    schema = TextModality.paper_schema().model_copy(update={"spec": SPEC.model_dump()})
    made = TextModality("text", config, schema)
    texts, masks = [np.array([2, 7, 9, 3]), np.array([2, 8, 3])], [np.full(4, KEPT), np.array([KEPT, 4, KEPT])]
    collated = made.collate(texts, masks, [1.0, 1.0])
    encoder = made.build(4, "reference")
    hidden_TH = torch.arange(28.0).view(14, 2)
    of_both_views = torch.stack([hidden_TH[a:b].mean(0) for a, b in ((0, 4), (4, 7), (7, 11), (11, 14))])
    torch.testing.assert_close(encoder.entering(hidden_TH, collated.inputs), of_both_views)
    np.testing.assert_array_equal(collated.token_counts, [1, 1])


def test_the_mean_is_the_same_over_padded_texts() -> None:
    config = {"hidden": 8, "layers": 1, "heads": 2, "intermediate": 16, "max_tokens": 16, "fusion_tokens": "mean"}
    schema = TextModality.paper_schema().model_copy(update={"spec": SPEC.model_dump()})
    made = TextModality("text", config, schema)
    texts = [np.array([2, 7, 9, 3]), np.array([2, 8, 3])]
    encoder = made.build(4, "reference").eval()
    inputs = made.collate(texts, None, [1.0, 1.0]).inputs
    padded = PaddedText(made, encoder).eval()
    ids, mask = (torch.from_numpy(array) for array in padded.stack(texts))
    with torch.no_grad():
        tokens_BLD, real_BL = padded(ids, mask)
        torch.testing.assert_close(tokens_BLD[:, 0], encoder.project(encoder.encode(inputs), inputs))
    assert real_BL.tolist() == [[True], [True]]
