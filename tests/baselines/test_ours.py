"""LANISTR's own arms: what stays frozen where there is no pretraining run."""

import pytest

from lanistr.baselines.ours import _published
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
    assert _published(recipe_with(finetune__freeze=freeze, model__modalities__text=text)) == kept
