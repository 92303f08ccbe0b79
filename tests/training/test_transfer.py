"""What fine-tuning takes over from pretraining, also on other columns, categories and channels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lanistr.config import FinetuneConfig, Recipe
from lanistr.manifest import ModalitySchema
from lanistr.modalities import MODALITIES
from lanistr.modalities.base import Modality
from lanistr.model.lanistr import build_model
from lanistr.tasks import Finetune
from lanistr.training.checkpoint import WEIGHTS, named_tensors, save_weights
from lanistr.training.transfer import refuse_untrained, transfer
from lanistr.transforms import MEMBERS, npy_bytes
from tests.model.support import NAMES, RECIPE, SCHEMAS, make_modalities, make_pretrain, recipe_with

OTHER_TABLE = {
    "kind": "tabular",
    "numeric": [{"name": "b", "mean": 0.0, "std": 1.0}, {"name": "new", "mean": 0.0, "std": 1.0}, {"name": "a", "mean": 1.0, "std": 2.0}],
    "categorical": [{"name": "d", "values": ["p"]}, {"name": "c", "values": ["w", "z", "x", "y"]}],
}  # fmt: skip


def modalities_with(name: str, spec: dict[str, Any], recipe: Recipe = RECIPE) -> dict[str, Modality[Any, Any]]:
    schema = ModalitySchema(kind=name, members=MEMBERS[name], spec=spec)
    return {**make_modalities(recipe), name: MODALITIES[name](name, recipe.model.modalities[name], schema)}


def pretraining_run(folder: Path, recipe: Recipe = RECIPE) -> tuple[Path, Any]:
    """A run folder with a checkpoint, written by hand."""
    task = make_pretrain(make_modalities(recipe), seed=3, recipe=recipe)
    with torch.no_grad():
        for name, buffer in task.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += torch.rand(buffer.shape)
    checkpoint = folder / "checkpoints" / "step-00000001"
    save_weights(checkpoint / WEIGHTS, {n: t.detach().clone() for n, t in named_tensors(task).items()})
    (checkpoint / "meta.json").write_text(json.dumps({"step": 1, "world": 1, "loader": {}}))
    schemas = {n: {"kind": n, "members": MEMBERS[n], "spec": s.model_dump()} for n, s in SCHEMAS.items()}
    (folder / "schema.json").write_text(json.dumps(schemas))
    return folder, task


def fresh(modalities: dict[str, Modality[Any, Any]], recipe: Recipe = RECIPE) -> Finetune:
    model = build_model(recipe.model, modalities, seed=9)
    return Finetune(model, recipe.model.fusion.width, 3, FinetuneConfig(), seed=9).eval()


def test_everything_but_the_classifier_is_carried_over(tmp_path: Path) -> None:
    run, pretrained = pretraining_run(tmp_path)
    tuned = fresh(make_modalities())
    report = transfer(tuned, run, make_modalities())
    stored = named_tensors(pretrained)
    for name, tensor in named_tensors(tuned).items():
        if not name.startswith("classifier.") and name != "prior":  # what the labels will say
            assert torch.equal(tensor, stored[name]), name
    assert {name.split(".")[0] for name in report.new} == {"classifier", "prior"}
    assert all(".head." in name or name.startswith("heads.") for name in report.left_out)
    assert "new: classifier" in str(report)


@pytest.mark.parametrize("column_tokens", [False, True])
def test_columns_and_categories_in_another_order_give_the_same_tokens(column_tokens: bool, tmp_path: Path) -> None:
    recipe = recipe_with(model__modalities__tabular__column_tokens=column_tokens)
    run, pretrained = pretraining_run(tmp_path, recipe)
    spec = SCHEMAS["tabular"].model_dump()
    shuffled = {
        **spec,
        "numeric": spec["numeric"][::-1],
        "categorical": [{"name": "c", "values": ["z", "new", "x", "y"]}],
    }
    modalities = modalities_with("tabular", shuffled, recipe)
    tuned = fresh(modalities, recipe)
    report = transfer(tuned, run, modalities)
    here = modalities["tabular"].decode({"tab.npy": npy_bytes(np.array([0.5, 2.0, 4], dtype=np.float32))})  # b, a, x
    original = make_modalities(recipe)["tabular"]
    there = original.decode({"tab.npy": npy_bytes(np.array([2.0, 0.5, 2], dtype=np.float32))})
    ours = tuned.model.encoder("tabular").encode(modalities["tabular"].collate([here], None, [1.0]).inputs)
    expected = pretrained.eval().model.encoder("tabular").encode(original.collate([there], None, [1.0]).inputs)
    if column_tokens:
        expected = expected[[0, 1, 3, 2, 4]]  # two steps, then b, a, c
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert report.notes == ["tabular: 5 embedding rows by name, 1 new, 0 gone (value/new)"]


def test_other_columns_are_matched_by_name_and_the_rest_is_reported(tmp_path: Path) -> None:
    run, pretrained = pretraining_run(tmp_path)
    modalities = modalities_with("tabular", OTHER_TABLE)
    tuned = fresh(modalities)
    untouched = named_tensors(fresh(modalities))
    report = transfer(tuned, run, modalities)
    table = "model.encoders.tabular.encoder.embedding.weight"
    own, stored = named_tensors(tuned)[table], named_tensors(pretrained)[table]
    assert torch.equal(own[3:5], stored[:2])  # missing, unseen of column c, after the three rows of column d
    assert torch.equal(own[6:], stored[[4, 2, 3]])  # z, x, y
    assert torch.equal(own[[0, 1, 2, 5]], untouched[table][[0, 1, 2, 5]])  # column d and value w: fresh
    assert any("3 columns by name, 2 new, 0 gone (number/new, category/d)" in note for note in report.notes)


def test_channels_are_matched_by_name(tmp_path: Path) -> None:
    run, pretrained = pretraining_run(tmp_path)
    spec = {**SCHEMAS["timeseries"].model_dump(), "variables": ["s", "new", "p"], "groups": [[0], [1], [2]]}
    spec |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    modalities = modalities_with("timeseries", spec)
    tuned = fresh(modalities)
    report = transfer(tuned, run, modalities)
    weight = "model.encoders.timeseries.encoder.input.weight"
    own, stored = named_tensors(tuned)[weight], named_tensors(pretrained)[weight]
    assert torch.equal(own[:, [0, 2]], stored[:, [3, 0]])
    assert report.notes == ["timeseries: 2 channels by name, 1 new, 2 gone (new, q, r)"]


def test_an_encoder_that_was_never_trained_is_not_frozen(tmp_path: Path) -> None:
    run, _ = pretraining_run(tmp_path)
    tuned = fresh(make_modalities())
    with pytest.raises(ValueError, match="would freeze text, image, tabular, timeseries, which was never trained"):
        refuse_untrained(tuned, None, ["text", "image", "tabular", "timeseries"])
    refuse_untrained(tuned, transfer(tuned, run, make_modalities()), [*make_modalities(), "projections", "fusion"])
    encoders = transfer(tuned, run, make_modalities(), FinetuneConfig(transfer="encoders").transferred(NAMES))
    with pytest.raises(ValueError, match="would freeze fusion"):
        refuse_untrained(tuned, encoders, ["text", "fusion"])


def test_only_the_named_parts_come_from_the_run(tmp_path: Path) -> None:
    run, pretrained = pretraining_run(tmp_path)
    tuned, untouched = fresh(make_modalities()), named_tensors(fresh(make_modalities()))
    config = FinetuneConfig(transfer=["image", "projections"])
    transfer(tuned, run, make_modalities(), config.transferred(NAMES))
    stored = named_tensors(pretrained)
    for name, tensor in named_tensors(tuned).items():
        carried = name.startswith("model.encoders.image.encoder.") or ".projection." in name
        assert torch.equal(tensor, stored[name] if carried else untouched[name]), name


def test_a_part_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"finetune\.transfer: no part 'video'; there are text, image, tabular"):
        FinetuneConfig(transfer=["video"]).transferred(NAMES)
