"""Which parameters decay, and which learn more slowly."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import nn

from lanistr.baselines.pretrained import Tab2TxtMethod
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from lanistr.model.lanistr import build_model
from lanistr.training.checkpoint import WEIGHTS
from lanistr.training.finetune import finetune
from lanistr.training.parameters import parameter_groups
from lanistr.training.transfer import pretrained_weights
from tests.baselines.planted import planted_gold, planted_recipe, publish_text
from tests.model.support import NAMES, recipe_with
from tests.ranks import finish, launch
from tests.tiny_gold import write_gold
from tests.tiny_run import write_pretraining

ROOT = Path(__file__).resolve().parents[2]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.old, self.new = nn.Linear(3, 3), nn.Linear(3, 3)
        self.table = nn.Embedding(4, 3)


def test_every_parameter_is_in_one_group_with_its_decay_and_its_share() -> None:
    module = Two()
    module.new.bias.requires_grad_(False)
    names = {id(p): name for name, p in module.named_parameters()}
    found = {
        names[id(p)]: (group["weight_decay"], group["lr_share"])
        for group in parameter_groups(module, 0.1, {"old.": 0.25})
        for p in group["params"]
    }
    assert found == {
        "old.weight": (0.1, 0.25),
        "old.bias": (0.0, 0.25),
        "new.weight": (0.1, 1.0),
        "table.weight": (0.0, 1.0),
    }


def test_without_shares_there_are_the_two_groups_of_before() -> None:
    assert [(g["weight_decay"], g["lr_share"]) for g in parameter_groups(Two(), 0.1)] == [(0.1, 1.0), (0.0, 1.0)]


def test_what_was_pretrained_moves_by_its_share_of_the_rate(tmp_path: Path) -> None:
    """AdamW's first update moves a parameter by its rate, whatever the gradient."""
    gold = write_gold(tmp_path / "gold", {"train": 8, "val": 4}, lambda i: NAMES)
    source = write_pretraining(tmp_path / "source", gold)
    changes = {"lr": 0.01, "pretrained_lr": 0.1, "freeze": "none", "weight_decay": 0.0, "warmup": 0.0, "clip": 1e6}
    steps = {"global_batch": 8, "epochs": 1, "max_steps": 1}
    recipe = recipe_with(**{f"finetune__{key}": value for key, value in {**changes, **steps}.items()})
    run = tmp_path / "run"
    finetune(recipe, gold, run, ROOT / "ds_configs" / "zero2.json", source=source, labels=None, resume=None)
    before, after = load_file(pretrained_weights(source)), load_file(run / "best" / WEIGHTS)
    moved = {
        name: float((after[name] - tensor).abs().max())
        for name, tensor in before.items()
        if name in after and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    own = {name: move for name, move in moved.items() if name.startswith("model.encoders.") and ".encoder." in name}
    assert own
    assert max(own.values()) <= 0.001 * 1.01
    assert max(move for name, move in own.items() if ".text." in name) >= 0.001 * 0.9
    assert max(move for name, move in moved.items() if name not in own) >= 0.01 * 0.9


@pytest.mark.parametrize("loop", ["deepspeed", "plain"])
def test_published_weights_move_by_their_share_in_pretraining(tmp_path: Path, loop: str) -> None:
    changes = {"lr": 0.01, "pretrained_lr": 0.1, "weight_decay": 0.0, "warmup": 0.0, "clip": 1e6, "max_steps": 1}
    published = publish_text(tmp_path / "bert") | {f"pretrain__{key}": value for key, value in changes.items()}
    recipe = planted_recipe(**published | {"pretrain__freeze": []})
    gold = planted_gold(tmp_path / "gold")
    fresh = build_model(recipe.model, make_modalities(Manifest.load(gold), recipe.model.modalities), 0)
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    if loop == "deepspeed":
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe.model_dump_json())
        options = ["--recipe", str(path), "--data", str(gold), "--run", str(tmp_path / "run")]
        config = str(ROOT / "ds_configs" / "zero2.json")
        finish(launch(1, [str(ROOT / "launchers" / "pretrain.py"), "--deepspeed", config, *options]))
        after = load_file(pretrained_weights(tmp_path / "run"))
    else:
        Tab2TxtMethod(recipe, gold, tmp_path / "run", 1).pretrain(0)
        after = load_file(tmp_path / "run" / "pretrain-0.safetensors")
    moved = {
        name: float((after[f"model.{name}"] - p).abs().max()) for name, p in before.items() if f"model.{name}" in after
    }
    own = max(move for name, move in moved.items() if name.startswith("encoders.text.encoder."))
    assert 0.001 * 0.9 <= own <= 0.001 * 1.01
    assert 0.01 * 0.9 <= moved["encoders.text.projection.weight"] <= 0.01 * 1.01
