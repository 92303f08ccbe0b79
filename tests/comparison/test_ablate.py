"""An arm of an ablation differs from the whole in one thing, and the data that it may see is what it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lanistr.baselines.frozen import FrozenLanistr
from lanistr.baselines.ours import Pretraining
from lanistr.comparison.ablate import choose, make_arms, make_method
from lanistr.config import PretrainConfig
from lanistr.data.reader import GoldDataset
from lanistr.training import pretrain
from lanistr.training.pretrain import choose_samples
from tests.model.support import NAMES, RECIPE, make_modalities, make_pretrain, recipe_with
from tests.tiny_gold import write_gold

TERMS = {name: modality.term for name, modality in make_modalities().items()}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {name: leaf for key, node in tree.items() for name, leaf in flatten(node, f"{prefix}.{key}").items()}


def test_an_arm_changes_one_thing() -> None:
    arms = make_arms(RECIPE, TERMS)
    whole = flatten(arms["full"][1].model_dump())
    changed = {}
    for name, (_, recipe) in arms.items():
        own = flatten(recipe.model_dump())
        changed[name] = {key for key in own.keys() | whole.keys() if own.get(key) != whole.get(key)}
    for name in NAMES:
        assert changed[f"without_{name}"]
        assert all(key.startswith(f".model.modalities.{name}.") for key in changed[f"without_{name}"])
    for term in [*TERMS.values(), "mmm"]:
        assert changed[f"without_{term}"] == {f".objective.weights.{term}"}
    assert changed["without_nonparallel"] == {".pretrain.complete_only"}
    assert changed["unlabelled_50"] == {".pretrain.share"}
    assert changed["full"] == changed["unlabelled_0"] == set()


def test_each_loss_that_is_learnt_has_an_arm_and_each_extension_too() -> None:
    recipe = recipe_with(objective__cross=["text", "image"], objective__decorrelation=0.5, pretrain__freeze=["text"])
    arms = make_arms(recipe, TERMS)
    assert f"without_{TERMS['text']}" not in arms
    assert f"without_{TERMS['image']}" in arms
    assert arms["without_cross"][1].objective == recipe.objective.model_copy(update={"cross": []})
    assert arms["without_decorrelation"][1].objective == recipe.objective.model_copy(update={"decorrelation": 0.0})
    assert not {"without_cross", "without_decorrelation"} & make_arms(RECIPE, TERMS).keys()


def test_a_modality_that_is_left_out_predicts_nothing_and_is_not_predicted() -> None:
    recipe = recipe_with(objective__cross=["text", "image", "tabular"])
    arms = make_arms(recipe, TERMS)
    assert arms["without_image"][1].objective.cross == ["text", "tabular"]
    two = recipe_with(objective__cross=["text", "image"])
    assert make_arms(two, TERMS)["without_image"][1].objective.cross == []


def test_without_the_frozen_modality_nothing_is_frozen_or_cached() -> None:
    recipe = recipe_with(pretrain__freeze=["text"], pretrain__cache="features")
    arms = make_arms(recipe, TERMS)
    assert (arms["without_text"][1].pretrain.freeze, arms["without_text"][1].pretrain.cache) == ([], False)
    assert arms["without_image"][1].pretrain == recipe.pretrain


def test_a_shared_cache_serves_every_share_of_train_and_one_in_the_run_holds_what_is_used(tmp_path: Path) -> None:
    gold = write_gold(tmp_path / "gold", {"train": 40, "val": 18}, lambda i: list(NAMES))
    for cache, held in ((str(tmp_path / "shared"), 40), (True, 20)):
        recipe = recipe_with(pretrain__share=0.5, pretrain__cache=cache, pretrain__freeze=["text"])
        train, val = (GoldDataset(gold, split, make_modalities()) for split in ("train", "val"))
        positions = choose_samples(train, recipe.pretrain)
        task = make_pretrain(train.modalities, recipe=recipe)
        cached, _ = pretrain._cached(task, recipe, train, val, positions, tmp_path, torch.device("cpu"))
        assert positions is not None
        assert cached.read(int(positions[-1])).contents
        folder = tmp_path / ("features" if cache is True else "shared")
        assert len(np.load(folder / "train-00000-positions.npy")) == held


def test_a_frozen_arm_is_a_logistic_regression_on_a_run_of_its_own(tmp_path: Path) -> None:
    whole, scratch = (
        make_method(name, RECIPE, tmp_path, tmp_path, 3, tmp_path, frozen=True) for name in ("full", "unlabelled_0")
    )
    assert isinstance(whole, FrozenLanistr)
    assert isinstance(whole.source, Pretraining)
    assert whole.source.folder == tmp_path / "runs" / "full"
    assert isinstance(scratch, FrozenLanistr)
    assert scratch.source is None


def test_a_loss_that_is_off_is_no_arm_and_an_unknown_arm_is_refused() -> None:
    weights = {**RECIPE.objective.weights, "mmm": 0.0}
    objective = RECIPE.objective.model_copy(update={"weights": weights})
    arms = make_arms(RECIPE.model_copy(update={"objective": objective}), TERMS)
    assert "without_mmm" not in arms
    assert list(choose(arms, ["full", "without_mlm"])) == ["full", "without_mlm"]
    with pytest.raises(ValueError, match="arm 'without_mmm': there are full"):
        choose(arms, ["without_mmm"])


def test_a_smaller_share_is_part_of_a_larger_one_and_complete_means_every_modality(tmp_path: Path) -> None:
    gold = write_gold(tmp_path, {"train": 40}, lambda i: NAMES if i % 4 == 0 else NAMES[: i % 4])
    dataset = GoldDataset(gold, "train", make_modalities())
    assert choose_samples(dataset, PretrainConfig()) is None
    shares = [choose_samples(dataset, PretrainConfig(share=share)) for share in (0.25, 0.5, 0.75)]
    assert [len(positions) for positions in shares if positions is not None] == [10, 20, 30]
    sets = [set(np.asarray(positions).tolist()) for positions in shares]
    assert sets[0] < sets[1] < sets[2]
    complete = choose_samples(dataset, PretrainConfig(complete_only=True))
    assert complete is not None
    np.testing.assert_array_equal(complete, np.arange(0, 40, 4))
    two = {name: modality for name, modality in make_modalities().items() if name in NAMES[:2]}
    complete = choose_samples(GoldDataset(gold, "train", two), PretrainConfig(complete_only=True))
    assert complete is not None
    assert len(complete) == 30  # of the modalities in use
    with pytest.raises(ValueError, match="no sample of train is left"):
        choose_samples(dataset, PretrainConfig(share=0.001))
