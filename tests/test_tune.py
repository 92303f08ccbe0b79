"""The grid: each cell once, whatever stops it, and the best by the metric's own direction."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lanistr.config import Recipe, load_recipe
from lanistr.tune import cell_name, grid, table, tune
from tests.model.support import RECIPE


def fake_run(calls: list[str], metric: str = "accuracy", fail_at: int | None = None) -> Any:
    """Writes what a finished run leaves; the value depends on the settings."""

    def run(recipe: Recipe, folder: Path, resuming: bool) -> None:
        calls.append(f"{folder.name}{' (resumed)' if resuming else ''}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        if fail_at is not None and len(calls) == fail_at:
            raise ValueError("killed")
        config = recipe.finetune
        value = round(1 - abs(config.lr - 2e-3) * 100 - config.weight_decay, 4)
        best = {metric: value, "step": 7}
        (folder / "summary.json").write_text(json.dumps({"metric": metric, "best": best}))

    return run


CELLS = grid({"lr": [1e-3, 2e-3, 5e-3], "batch": [], "decay": [0.0, 0.1], "freeze": []})


def test_every_combination_is_run_and_the_best_becomes_a_recipe(tmp_path: Path) -> None:
    calls: list[str] = []
    found = tune(RECIPE, CELLS, tmp_path, fake_run(calls))
    assert len(calls) == 6
    assert found["best"]["cell"] == {"lr": 2e-3, "decay": 0.0}
    best = load_recipe(str(tmp_path / "best.yaml")).finetune
    assert (best.lr, best.weight_decay, best.hidden) == (2e-3, 0.0, RECIPE.finetune.hidden)
    assert "lr=0.002,decay=0.0" in table(found).splitlines()[1]


def test_less_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    found = tune(RECIPE, CELLS, tmp_path, fake_run([], "rmse"))
    assert found["best"]["cell"] == {"lr": 5e-3, "decay": 0.1}


def test_a_stopped_grid_goes_on_and_a_larger_one_takes_over_its_cells(tmp_path: Path) -> None:
    first: list[str] = []
    with pytest.raises(ValueError, match="killed"):
        tune(RECIPE, CELLS, tmp_path, fake_run(first, fail_at=3))
    assert len(json.loads((tmp_path / "tune.json").read_text())["cells"]) == 2
    again: list[str] = []
    tune(RECIPE, CELLS, tmp_path, fake_run(again))
    assert again == [cell_name(cell) for cell in CELLS[2:]]
    more: list[str] = []
    wider = grid({"lr": [1e-3, 2e-3, 5e-3], "decay": [0.0, 0.1, 0.2]})
    assert len(tune(RECIPE, wider, tmp_path, fake_run(more))["cells"]) == 9
    assert more == ["lr=0.001,decay=0.2", "lr=0.002,decay=0.2", "lr=0.005,decay=0.2"]


def test_cells_of_another_recipe_are_refused(tmp_path: Path) -> None:
    tune(RECIPE, CELLS[:1], tmp_path, fake_run([]))
    tree = RECIPE.model_dump()
    tree["finetune"]["hidden"] = 99
    with pytest.raises(ValueError, match="is of another recipe"):
        tune(Recipe.model_validate(tree), CELLS[:1], tmp_path, fake_run([]))


def test_parts_to_freeze_are_a_dimension_and_no_dimension_is_an_error(tmp_path: Path) -> None:
    cells = grid({"freeze": ["none", ["text", "fusion"]]})
    assert [cell_name(cell) for cell in cells] == ["freeze=none", "freeze=text+fusion"]
    with pytest.raises(ValueError, match="nothing to tune"):
        tune(RECIPE, grid({"lr": []}), tmp_path, fake_run([]))
