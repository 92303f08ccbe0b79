"""`python -m lanistr describe`: parameters, tokens and FLOPs per part."""

import pytest
import torch

from lanistr.__main__ import main
from lanistr.config import load_recipe, recipe_names
from lanistr.describe import count_parts, count_work
from lanistr.modalities import MODALITIES
from lanistr.model.lanistr import Lanistr
from lanistr.tasks import Finetune
from tests.model.support import recipe_with


def test_flops_of_the_transformers_equal_the_textbook_formula() -> None:
    recipe = load_recipe("demo")
    work = count_work(recipe)
    text = recipe.model.modalities["text"]
    tokens, width, inner = text["max_tokens"], text["hidden"], text["intermediate"]
    layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    assert work["text encoder"].flops == 2 * text["layers"] * layer  # two views
    assert work["text encoder"].tokens == 2 * tokens
    assert work["text projection"].flops == 2 * tokens * 2 * width * recipe.model.fusion.width
    rows = work["fusion encoder"].tokens // 2
    image_tokens = 1 + (64 // 16) ** 2
    assert rows == 1 + tokens + image_tokens + 3 + min(52, 48)  # the paper's series has 48 steps
    d, i = recipe.model.fusion.width, recipe.model.fusion.intermediate
    assert work["fusion encoder"].flops == 2 * 2 * (2 * rows * (4 * d * d + 2 * d * i) + 4 * rows**2 * d)


def test_cls_only_fusion_and_cls_similarity_cost_what_they_say() -> None:
    work = count_work(recipe_with(model__modalities__text__fusion_tokens="cls", objective__similarity="cls"))
    assert work["text projection"].tokens == 2
    assert work["SimMMM projector"].tokens == 2


def test_modalities_that_predict_each_other_cost_fusion_more_passes() -> None:
    plain, cross = count_work(recipe_with()), count_work(recipe_with(objective__cross=["text", "tabular"]))
    assert cross["fusion encoder"].flops > plain["fusion encoder"].flops
    assert cross["text encoder"] == plain["text encoder"]
    assert cross["cross-modal predictors"].flops == 2 * 16 * (8 + 16)  # of one sample, a linear layer each way
    assert "cross-modal predictors" not in plain


def test_official_preset_reconciles_with_table_5_part_by_part() -> None:
    parts = count_parts(load_recipe("official"))
    millions = {part: round(n / 1e6, 2) for part, n in parts.items()}
    assert millions["text encoder"] == 109.48
    assert millions["image encoder"] == 86.39
    assert millions["fusion encoder"] == 43.12
    assert millions["text head (mlm)"] == 24.06
    assert millions["SimMMM projector"] == 9.97
    assert millions["SimMMM predictor"] == 2.10
    assert round(sum(parts.values()) / 1e6, 2) == 277.16


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_ships_is_described(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "--recipe", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"recipe {name}: ")
    assert "GFLOP forward" in out


def test_command_prints_parameters_tokens_and_flops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "--recipe", "demo"]) == 0
    out = capsys.readouterr().out
    assert "GFLOP forward" in out
    assert "tokens" in out
    assert "277.16 M" in out
    assert main(["describe", "--recipe", "no_such_recipe"]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mimic_finetune", "amazon_finetune_fashion"])
def test_fine_tuning_trains_about_fifteen_percent_of_the_pretraining_total(name: str) -> None:
    """Paper, section "Fine-tuning LANISTR": unimodal encoders frozen, the multimodal encoder and the classifier trained."""
    recipe = load_recipe(name)
    pretraining = sum(count_parts(load_recipe(name.split("_")[0] + "_pretrain")).values())
    blocks = {n: {k: v for k, v in b.items() if k != "pretrained"} for n, b in recipe.model.modalities.items()}
    with torch.device("meta"):
        modalities = {n: MODALITIES[n](n, block, MODALITIES[n].paper_schema()) for n, block in blocks.items()}
        model = Lanistr(recipe.model, modalities, backend="reference")
        task = Finetune(model, recipe.model.fusion.width, 5, recipe.finetune, seed=0)
    task.freeze()
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    assert 0.14 < trained / pretraining < 0.17, trained / pretraining
