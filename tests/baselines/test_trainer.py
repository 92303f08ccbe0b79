"""The plain loop of the baselines: against a loop written out, and against LANISTR's own under DeepSpeed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from lanistr.baselines import Method, Pretrains
from lanistr.baselines.late_fusion import LateFusionMethod
from lanistr.baselines.medfuse import MedFuseMethod
from lanistr.baselines.pretrained import AlbefMethod, Tab2TxtMethod
from lanistr.baselines.trainer import Keeper, fit_classifier, minimise
from lanistr.batch import Batch
from lanistr.comparison.grid import Splits
from lanistr.data.loader import Collator
from lanistr.modalities.text import TextEncoder
from lanistr.training.finetune import make_task
from lanistr.training.run import train_loader
from lanistr.training.schedule import lr_at
from tests.baselines.planted import planted_gold, planted_recipe, planted_splits, publish_text

ROOT = Path(__file__).resolve().parents[2]


class Quadratic(nn.Module):
    """Two terms of a matrix (which decays) and a bias (which does not); totals over what the batch counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"cls": 1.0, "cls_text": 0.5}
        self.matrix = nn.Parameter(torch.tensor([[1.0, -2.0]]))
        self.bias = nn.Parameter(torch.tensor([3.0]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        labels_B = batch.labels_B.float()
        value = (self.matrix.sum() - labels_B).square().sum() + self.bias.square().sum() * len(labels_B)
        return {"cls": value, "cls_text": (self.bias - 1).square().sum() * batch.counts["cls_text"]}


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_the_loop_is_adamw_written_out(tmp_path: Path, micro_batch: int | None) -> None:
    recipe = planted_recipe(finetune__weight_decay=0.1, finetune__epochs=2, finetune__micro_batch=micro_batch)
    splits, config = planted_splits(tmp_path, recipe=recipe), recipe.finetune
    collator = Collator(splits.train.modalities, views=1, seed=0)
    loader = train_loader(splits.train, collator, recipe.data, config)
    total = loader.steps_per_epoch * 2
    task = Quadratic()
    minimise(task, loader, config, torch.device("cpu"))

    x, moments = np.array([1.0, -2.0, 3.0]), np.zeros((2, 3))
    (beta1, beta2), decay = config.betas, np.array([0.1, 0.1, 0.0])
    for step, batches in enumerate(loader.steps(0, total)):
        labels = np.concatenate([batch.labels_B.numpy() for batch in batches])
        slope = 2 * (x[0] + x[1] - labels.mean())
        gradient = np.array([slope, slope, 2 * x[2] + (x[2] - 1)])
        gradient *= min(1.0, config.clip / (np.sqrt((gradient**2).sum()) + 1e-6))
        moments[0] = beta1 * moments[0] + (1 - beta1) * gradient
        moments[1] = beta2 * moments[1] + (1 - beta2) * gradient**2
        m, v = moments[0] / (1 - beta1 ** (step + 1)), moments[1] / (1 - beta2 ** (step + 1))
        lr = lr_at(step, total, config.lr, config.warmup, config.final_lr)
        x = x * (1 - lr * decay) - lr * m / (np.sqrt(v) + config.eps)
    found = [*task.matrix[0].tolist(), task.bias.item()]
    np.testing.assert_allclose(found, x, rtol=1e-5)


@pytest.mark.slow
def test_the_same_as_lanistr_under_deepspeed(tmp_path: Path) -> None:
    recipe = planted_recipe(finetune__epochs=3, finetune__dropout=0.1, finetune__modality_dropout=0.2)
    gold, path, out = planted_gold(tmp_path / "gold"), tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [
        *(sys.executable, "-m", "lanistr", "compare", str(path), "--data", str(gold), "--out", str(out)),
        *("--methods", "lanistr_scratch", "--labels", "48", "--seeds", "1"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MASTER_PORT", None)  # of a training in this process, if there was one
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(out / "cells" / "lanistr_scratch-48-0.npz") as cell:
        theirs_NC = cell["probabilities"]

    splits = planted_splits(tmp_path / "again", recipe=recipe)
    assert splits.train.content_id == json.loads((gold / "manifest.json").read_text())["content_id"]
    task = make_task(recipe, splits.train.manifest, "cpu")
    ours_NC = fit_classifier(task, splits.draw(48, 0), splits.val, recipe, task.model, [])(splits.test)
    np.testing.assert_allclose(ours_NC, theirs_NC, atol=1e-4)


class Scripted(nn.Module):
    """Right about a given share of the samples at each validation."""

    alone = ()

    def __init__(self, shares: list[float]):
        super().__init__()
        self.shares, self.seen = shares, nn.Parameter(torch.zeros(()))

    def predict(self, batch: Batch) -> Tensor:
        right_B = torch.arange(batch.size) < self.shares[int(self.seen)] * 24
        return torch.nn.functional.one_hot((batch.labels_B + (~right_B).long()) % 3, 3).float()


def test_the_first_of_equally_good_weights_stay_and_patience_counts_from_them(tmp_path: Path) -> None:
    recipe = planted_recipe(finetune__patience=2, finetune__eval_every=1)
    splits = planted_splits(tmp_path, recipe=recipe)
    task = Scripted([0.25, 0.75, 0.75, 0.5, 1.0])
    keeper = Keeper(task, splits.val, recipe.finetune, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="eval_every is longer"):
        keeper.restore()
    stopped = []
    for step in range(1, 13):
        stopped.append(keeper.after_step(step))
        if step % 3 == 0:
            task.seen.data += 1
    assert stopped.index(True) == 11  # two validations without improvement
    keeper.restore()
    assert task.seen.item() == 1


@pytest.mark.parametrize("name", ["late_fusion", "medfuse", "tab2txt", "albef"])
def test_with_frozen_encoders_the_cache_changes_no_answer_and_saves_their_passes(name: str, tmp_path: Path) -> None:
    gold = planted_gold(tmp_path / "gold")
    found: dict[bool, tuple[np.ndarray, int]] = {}
    published = publish_text(tmp_path / "bert")
    for cache in (False, True):
        heads = {
            "finetune__unimodal": 1.0,
            "finetune__unimodal_on": "fused",
        }  # what Tab2Txt and ALBEF share with LANISTR
        changes = {"finetune__cache": cache, "finetune__freeze": ["text"], **heads, **published}
        recipe = planted_recipe(pretrain__max_steps=1, **changes)
        folder = tmp_path / f"{cache}"
        made: dict[str, Callable[[], Method]] = {
            "late_fusion": partial(LateFusionMethod, recipe),
            "medfuse": partial(MedFuseMethod, recipe, None),
            "tab2txt": partial(Tab2TxtMethod, recipe, gold, folder, 1),
            "albef": partial(AlbefMethod, recipe, gold, folder, 1),
        }
        method, splits = made[name](), Splits.open(recipe, gold)
        if isinstance(method, Pretrains):
            method.pretrain(0)
        with patch.object(TextEncoder, "encode", autospec=True, side_effect=TextEncoder.encode) as encode:
            answer = method.fit(splits.draw(48, 0), splits.val, 0)
        found[cache] = answer(splits.test), encode.call_count
    np.testing.assert_allclose(found[True][0], found[False][0], atol=1e-4)
    assert found[True][1] <= 4 < found[False][1]  # a pass over train and one over val, of each stage of MedFuse
