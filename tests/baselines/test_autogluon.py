"""The exchange with AutoGluon, with a stand-in for its interpreter; AutoGluon itself is not installed here."""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lanistr.baselines import Subset
from lanistr.baselines.autogluon import AutoGluon, AutoGluonMethod, write_samples
from lanistr.baselines.autogluon_runner import hyperparameters
from lanistr.comparison.grid import Splits
from lanistr.metrics import accuracy
from tests.baselines.planted import CHANCE, planted_splits

STAND_IN = '''
"""Puts a `pandas` and an `autogluon.multimodal` in place that need neither, and runs the runner."""
import json, runpy, sys, types
from pathlib import Path
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

class Frame:
    def __init__(self, columns, values):
        self.columns, self.values = columns, values
    def to_numpy(self):
        return self.values

def features(table):
    image = [np.asarray(Image.open(path)).mean() / 70 if path else np.nan for path in table["image"].to_pylist()]
    word = [int("high" in text) - int("low" in text) for text in table["text"].to_pylist()]
    return np.column_stack([image, np.array(table["tabular/a"].to_pylist()), word])

class MultiModalPredictor:
    """Nearest class mean, of known cells."""
    def __init__(self, label, problem_type, path, verbosity):
        self.label, self.path = label, Path(path)
    def fit(self, train_data, tuning_data, hyperparameters, column_types, seed):
        assert set(column_types) == set(train_data.column_names) - {self.label}
        labels = np.array(train_data[self.label].to_pylist())
        assert set(tuning_data[self.label].to_pylist()) <= set(labels.tolist())
        x = features(train_data)
        means = {int(c): np.nanmean(x[labels == c], axis=0).tolist() for c in np.unique(labels)}
        self.path.mkdir()
        (self.path / "fitted.json").write_text(json.dumps({"means": means, "names": hyperparameters["model.names"]}))
    @classmethod
    def load(cls, path):
        loaded = cls("", "", path, 1)
        loaded.means = json.loads((Path(path) / "fitted.json").read_text())["means"]
        return loaded
    def predict_proba(self, data, as_pandas, as_multiclass):
        assert "label" not in data.column_names
        x = features(data)
        far = np.stack([np.nansum((x - np.array(mean)) ** 2, axis=1) for mean in self.means.values()], axis=1)
        weights = np.exp(-far)
        return Frame(list(self.means), weights / weights.sum(1, keepdims=True))

pandas = types.ModuleType("pandas")
pandas.read_parquet, pandas.__version__ = pq.read_table, "0"
multimodal = types.ModuleType("autogluon.multimodal")
multimodal.MultiModalPredictor = MultiModalPredictor
sys.modules |= {"pandas": pandas, "autogluon": types.ModuleType("autogluon"), "autogluon.multimodal": multimodal}
isolated, *sys.argv = sys.argv[1:]
assert isolated == "-I"
runpy.run_path(sys.argv[0], run_name="__main__")
'''


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "stand_in.py"}" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def splits(tmp_path: Path) -> Splits:
    return planted_splits(tmp_path / "gold")


def make_method(python: Path, work: Path) -> AutoGluonMethod:
    return AutoGluonMethod(AutoGluon(python), work, "mlp")


def test_what_the_other_interpreter_answers_comes_back_sample_by_sample(
    tmp_path: Path, interpreter: Path, splits: Splits
) -> None:
    predict = make_method(interpreter, tmp_path / "work").fit(splits.draw(72, 1), splits.val, 1)
    found_NC = predict(splits.test)
    assert accuracy(found_NC, splits.test.labels_N) > CHANCE + 0.3
    some = Subset(splits.test.dataset, splits.test.positions_N[5:20])
    np.testing.assert_allclose(predict(some), found_NC[5:20])
    assert len(list((tmp_path / "work").iterdir())) == 1
    del predict
    assert not list((tmp_path / "work").iterdir())  # the exchange goes with its predictor


def test_a_class_without_a_label_is_never_asked_for_and_has_probability_0(
    tmp_path: Path, interpreter: Path, splits: Splits
) -> None:
    train = splits.draw(24, 0)
    two = Subset(train.dataset, train.positions_N[train.labels_N != 1])
    found_NC = make_method(interpreter, tmp_path / "work").fit(two, splits.val, 0)(splits.test)
    assert found_NC.shape == (48, 3)
    assert (found_NC[:, 1] == 0).all()
    np.testing.assert_allclose(found_NC.sum(1), 1)


def test_samples_are_written_as_they_are_with_holes_where_nothing_is(tmp_path: Path, splits: Splits) -> None:
    kinds = write_samples(splits.test, tmp_path, "test", labelled=True)
    assert kinds == {
        "text": "text",
        "image": "image_path",
        "tabular/a": "numerical",
        "tabular/b": "numerical",
        "tabular/c": "categorical",
    }
    rows = pq.read_table(tmp_path / "test.parquet").to_pylist()
    assert [row["label"] for row in rows] == splits.test.labels_N.tolist()
    for position, row in zip(splits.test.positions_N.tolist(), rows, strict=True):
        contents = splits.test.dataset.read(position).contents
        assert (row["text"] == "") == ("text" not in contents)
        assert (row["image"] is None) == ("image" not in contents)
        if row["image"]:
            np.testing.assert_array_equal(np.asarray(Image.open(row["image"])), contents["image"])
        assert row["tabular/c"] == ["x", "y", "z"][contents["tabular"].categories_C[0] - 2]
        assert row["tabular/a"] == pytest.approx(contents["tabular"].numeric_R[0])


def test_only_encoders_of_columns_that_are_there_are_asked_for() -> None:
    job = {"columns": {"text": "text", "t/a": "numerical", "t/c": "categorical"}, "hyperparameters": {"optim.lr": 1e-3}}
    assert hyperparameters({**job, "fusion": "mlp"}) == {
        "model.names": ["hf_text", "numerical_mlp", "categorical_mlp", "fusion_mlp"],
        "optim.lr": 1e-3,
    }
    names = hyperparameters({**job, "fusion": "transformer"})["model.names"]
    assert names == ["hf_text", "ft_transformer", "fusion_transformer"]


def test_an_interpreter_that_is_not_there_or_lacks_autogluon_is_one_line(tmp_path: Path, splits: Splits) -> None:
    with pytest.raises(ValueError, match=r"--autogluon-python .*nowhere: No such file"):
        make_method(tmp_path / "nowhere", tmp_path / "work").fit(splits.draw(24, 0), splits.val, 0)
    lacking = tmp_path / "lacking"
    lacking.write_text(f'#!/bin/sh\nshift; exec "{sys.executable}" -S -E "$@"\n')
    lacking.chmod(0o755)
    with pytest.raises(ValueError, match=r"AutoGluon \(fit, exit code 1\): (Module|Import).*Error"):
        make_method(lacking, tmp_path / "work").fit(splits.draw(24, 0), splits.val, 0)


@pytest.mark.parametrize(("text", "message"), [("{", "Expecting"), ("[1]", "must be an object, is list")])
def test_hyperparameters_that_are_none_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "h.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        AutoGluon(Path("python"), tmp_path / "h.json").hyperparameters()
