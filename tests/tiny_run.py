"""A pretraining run on the tiny dataset, never trained: what launchers and evaluation read of one."""

import json
from pathlib import Path

import yaml

from lanistr.config import Recipe
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from lanistr.training.checkpoint import WEIGHTS, named_tensors, save_weights
from lanistr.training.transfer import save_schema
from tests.model.support import RECIPE, make_pretrain


def write_pretraining(run: Path, gold: Path, recipe: Recipe = RECIPE) -> Path:
    """Random weights as the checkpoint of step 7."""
    manifest = Manifest.load(gold)
    task = make_pretrain(make_modalities(manifest, recipe.model.modalities), seed=3, recipe=recipe)
    checkpoint = run / "checkpoints" / "step-00000007"
    save_weights(checkpoint / WEIGHTS, {n: t.detach().clone() for n, t in named_tensors(task).items()})
    (checkpoint / "meta.json").write_text(json.dumps({"step": 7, "loader": {}, "files": {}}))
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    save_schema(run, manifest)
    identity = {"task": "pretrain", "labels": manifest.labels, "dataset": manifest.name}
    (run / "run.json").write_text(json.dumps({**identity, "content_id": manifest.content_id}))
    return run
