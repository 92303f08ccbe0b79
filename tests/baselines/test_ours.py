"""LANISTR's own arms: what stays frozen where there is no pretraining run, and what counts as one."""

from pathlib import Path

import pytest

from lanistr.baselines import ours
from lanistr.baselines.ours import _without_run
from lanistr.config import Recipe
from tests.model.support import RECIPE, recipe_with


@pytest.mark.parametrize(
    ("freeze", "published", "kept"),
    [
        ("encoders", None, []),
        ("none", "a/bert", []),
        ("encoders", "a/bert", ["text"]),
        (["text", "tabular", "fusion"], "a/bert", ["text"]),
        (["tabular"], "a/bert", []),
    ],
)
def test_without_a_run_only_published_encoders_stay_frozen(
    freeze: str | list[str], published: str | None, kept: list[str]
) -> None:
    text = {**RECIPE.model.modalities["text"], "pretrained": published}
    for cache in (False, True, "folder"):
        recipe = recipe_with(finetune__freeze=freeze, finetune__cache=cache, model__modalities__text=text)
        # With nothing frozen there is nothing to cache, which `finetune` refuses.
        assert _without_run(recipe) == {"freeze": kept, "cache": cache if kept else False}


def test_a_pretraining_that_a_signal_ended_is_no_start_and_goes_on_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def stopped(recipe: Recipe, data: Path, run: Path, ds_config: Path, *, resume: str | None) -> bool:
        asked.append(resume)
        return len(asked) > 1

    monkeypatch.setattr(ours, "pretrain", stopped)
    monkeypatch.setattr(ours, "_join", lambda: None)
    source = ours.Pretraining(RECIPE, tmp_path / "gold", tmp_path, 1, Path("zero2.json"))
    with pytest.raises(ValueError, match=r"pretrain-0: stopped by a signal, saved; the same command goes on"):
        source.run(0)
    assert source.run(0) == tmp_path / "pretrain-0"
    assert asked == ["auto", "auto"]
