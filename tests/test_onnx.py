"""The padded path, and the graph made of it, answer as the packed model does, for every presence pattern."""

import importlib.util
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lanistr.__main__ import main
from lanistr.config import FinetuneConfig, load_recipe
from lanistr.data.loader import Collator
from lanistr.data.samples import Sample
from lanistr.export import export_run
from lanistr.manifest import Manifest, Target
from lanistr.modalities import make_modalities
from lanistr.model.lanistr import build_model
from lanistr.onnx import ONNX, PaddedModel
from lanistr.predict import Predictor
from lanistr.tasks import Finetune
from tests.model.support import NAMES, RECIPE, random_samples, recipe_with
from tests.model.support import make_modalities as tiny_modalities
from tests.test_export import finetuning, pretraining
from tests.tiny_gold import write_gold

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript or onnxruntime (extra 'onnx') is not installed",
)
PATTERNS = [list(itertools.compress(NAMES, kept)) for kept in itertools.product([1, 0], repeat=len(NAMES))]


def samples_of(contents: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(key=f"{i:016x}", presence=0, label=-1, contents=c) for i, c in enumerate(contents)]


def fill_absent(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Other finite values wherever a mask is False."""
    changed = {name: array.copy() for name, array in arrays.items()}
    for name in NAMES:
        absent = ~arrays[f"{name}_mask"]
        for key in (key for key in arrays if key.startswith(f"{name}_") and not key.endswith("_mask")):
            hidden = changed[key][absent]
            garbage = rng.integers(0, 5, hidden.shape) if hidden.dtype.kind in "iu" else rng.normal(size=hidden.shape)
            changed[key][absent] = garbage.astype(hidden.dtype)
    return changed


@pytest.mark.parametrize(
    ("config", "target"),
    [
        ({"pooling": "cls"}, "class"),
        ({"pooling": "mean", "unimodal": 1.0}, "class"),
        ({"pooling": "mean", "unimodal": 1.0, "unimodal_on": "fused"}, "class"),
        ({"pooling": "modalities"}, "multilabel"),
        ({"pooling": "modalities", "unimodal": 0.5}, "regression"),
    ],
)
@pytest.mark.parametrize(("text", "columns"), [("all", True), ("cls", False)])
def test_padded_and_packed_agree_for_all_patterns_and_absent_contents_are_ignored(
    config: dict[str, Any], target: Target, text: str, columns: bool
) -> None:
    recipe = recipe_with(model__modalities__text__fusion_tokens=text, model__modalities__tabular__column_tokens=columns)
    modalities = tiny_modalities(recipe)
    task = Finetune(build_model(recipe.model, modalities, 0), 16, 3, FinetuneConfig(**config), 0, target).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        if target == "regression":
            task.target_mean += 3
            task.target_std *= 2
        task.prior += torch.randn(3, generator=generator)
    contents, _ = random_samples(modalities, PATTERNS * 2, seed=4)
    collator = Collator(modalities, views=1, seed=0, alone=task.alone)
    expected = task.predict(collator(samples_of(contents), [1.0] * len(contents), 0))
    assert expected.std(0).min() > 1e-3, "samples are told apart"
    model = PaddedModel(task, modalities)
    arrays = model.pad(contents)
    assert list(arrays) == model.names

    def run(given: dict[str, np.ndarray]) -> torch.Tensor:
        with torch.no_grad():
            return model(*(torch.from_numpy(given[name]) for name in model.names))

    torch.testing.assert_close(run(arrays), expected, atol=1e-5, rtol=1e-5)
    other = run(fill_absent(arrays, np.random.default_rng(1)))
    torch.testing.assert_close(other, run(arrays), atol=0, rtol=0)


@needs_onnx
def test_the_graph_answers_as_the_model_for_every_presence_pattern_batch_and_length(tmp_path: Path) -> None:
    import onnxruntime

    gold = write_gold(tmp_path / "gold", {"train": 32}, lambda i: PATTERNS[i % 15])
    run, task = finetuning(tmp_path, gold)
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--onnx"]) == 0
    session: Any = onnxruntime.InferenceSession(tmp_path / "out" / ONNX, providers=["CPUExecutionProvider"])
    assert str(Path(__file__).parents[1]).encode() not in (tmp_path / "out" / ONNX).read_bytes(), (
        "no paths of this machine"
    )
    meta = session.get_modelmeta().custom_metadata_map
    assert (json.loads(meta["labels"]), meta["target"]) == (["low", "middle", "high"], "class")
    modalities = make_modalities(Manifest.load(gold), RECIPE.model.modalities)
    model = PaddedModel(task, modalities)
    contents, _ = random_samples(modalities, PATTERNS, seed=7)
    expected = task.eval().predict(Collator(modalities, views=1, seed=0)(samples_of(contents), [1.0] * 16, 0)).numpy()
    arrays = model.pad(contents)
    (together,) = session.run(["probabilities"], arrays)
    np.testing.assert_allclose(together, expected, atol=1e-5)
    for i, one in enumerate(contents):  # other lengths, a batch of one
        (alone,) = session.run(["probabilities"], model.pad([one]))
        np.testing.assert_allclose(alone[0], expected[i], atol=1e-5)
    (garbage,) = session.run(["probabilities"], fill_absent(arrays, np.random.default_rng(2)))
    np.testing.assert_array_equal(garbage, together)
    (tmp_path / "out" / "tokenizer.json").unlink()  # of the tiny dataset: an empty one
    predictor = Predictor.from_pretrained(tmp_path / "out")
    answers, dataset = predictor.predict_gold(gold, "train"), predictor.open(gold, "train")
    (of_gold,) = session.run(None, model.pad([dataset.read(i).contents for i in range(dataset.n)]))
    for (_, answer), row in zip(answers, of_gold, strict=True):
        assert list(answer.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-5)


def test_learnt_tokens_have_no_padded_form() -> None:
    recipe = recipe_with(model__modalities__image__absent_token=True)
    modalities = tiny_modalities(recipe)
    task = Finetune(build_model(recipe.model, modalities, 0), 16, 3, FinetuneConfig(), 0)
    with pytest.raises(ValueError, match="image: absent_token has no padded form"):
        PaddedModel(task, modalities)


@needs_onnx
def test_what_has_no_graph_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gold = write_gold(tmp_path / "gold", {"train": 16}, lambda i: PATTERNS[i % 15], items={"image": 2})
    runs = {"was only pretrained": pretraining(tmp_path, gold)[0], "takes one": finetuning(tmp_path, gold)[0]}
    for said, run in runs.items():
        assert main(["export", str(run), "--out", str(tmp_path / "out"), "--onnx"]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr("lanistr.onnx.find_spec", lambda name: None if name == "onnxscript" else object())
    assert main(["export", str(runs["takes one"]), "--out", str(tmp_path / "out"), "--onnx"]) == 2
    assert capsys.readouterr().err == "error: ONNX needs onnxscript: install the extra 'onnx'\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gold", "pre", "tuned"]


@needs_onnx
@pytest.mark.slow
def test_the_demo_s_own_model_is_exported_within_tolerance(tmp_path: Path) -> None:
    from etl import recipe as recipes
    from etl.build import build
    from etl.sources import synthetic
    from tests.test_predict import make_run

    synthetic.generate(tmp_path / "raw", samples=240)
    gold = build(recipes.load("demo"), tmp_path / "raw", tmp_path / "lake")
    make_run(tmp_path / "run", gold, load_recipe("demo"))
    out = export_run(tmp_path / "run", tmp_path / "out", onnx=True)  # compares all 16 patterns itself
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(out / ONNX, providers=["CPUExecutionProvider"])
    predictor = Predictor.from_pretrained(out)
    assert predictor.task is not None
    dataset = predictor.open(gold, "test")
    assert len(set(dataset.presence.tolist())) >= 4
    padded = PaddedModel(predictor.task, predictor.modalities)
    (found,) = session.run(None, padded.pad([dataset.read(i).contents for i in range(dataset.n)]))
    for (_, answer), row in zip(predictor.predict_gold(gold, "test"), found, strict=True):
        assert list(answer.probabilities.values()) == pytest.approx(row.tolist(), abs=1e-4)
