"""Which methods a dataset gets, and what is said of the others."""

from dataclasses import replace
from pathlib import Path

import pytest

from lanistr.baselines.autogluon import AutoGluon
from lanistr.baselines.registry import METHODS, Setting, make_methods, unfit
from lanistr.comparison.table import markdown
from tests.model.support import RECIPE


def make_setting(folder: Path) -> Setting:
    return Setting(RECIPE, folder, folder / "zero2.json", folder / "pretrained", folder / "gold", 1)


def test_all_that_fit_are_made_and_the_others_are_named_with_the_reason(tmp_path: Path) -> None:
    kinds = {"text", "tabular"}
    made, reasons = make_methods(None, kinds, make_setting(tmp_path)), unfit(kinds)
    assert set(made) | set(reasons) | {"autogluon_mlp", "autogluon_transformer"} == set(METHODS)
    assert not set(made) & set(reasons)
    assert "latefusion" in made
    assert reasons["medfuse"] == "needs image and timeseries; dataset and recipe share tabular, text"
    row = {"method": "latefusion", "labels": "8", "metric": "accuracy", "dataset": "d", "seeds": 1, "seconds": 1.0}
    text = markdown([row | {"mean": 0.5, "std": 0.0, "ci95": [0, 1], "p_vs_ours": None}], {}, "lanistr", reasons)
    assert "* `medfuse` does not fit: needs image and timeseries" in text


def test_one_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method medfuse needs image and timeseries"):
        make_methods(["medfuse"], {"text"}, make_setting(tmp_path))


def test_autogluon_is_made_where_its_interpreter_is_and_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--autogluon-python PATH"):
        make_methods(["autogluon_mlp"], {"text"}, make_setting(tmp_path))
    with_it = replace(make_setting(tmp_path), autogluon=AutoGluon(tmp_path / "python"))
    assert {"autogluon_mlp", "autogluon_transformer"} <= set(make_methods(None, {"text"}, with_it))
