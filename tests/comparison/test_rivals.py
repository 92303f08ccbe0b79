"""Baselines under missing modalities, against datasets that were written without them."""

import json
from pathlib import Path

import numpy as np
import pytest

from lanistr.__main__ import main
from lanistr.baselines import Subset
from lanistr.baselines.simple import TfidfLogistic
from lanistr.data.hiding import HidingDataset
from lanistr.data.reader import GoldDataset
from lanistr.evaluation.evaluate import load_tuned
from lanistr.metrics import accuracy
from tests.evaluation.test_robustness import N, present, write_tuned
from tests.model.support import NAMES, recipe_with
from tests.tiny_gold import write_gold

pytest.importorskip("sklearn")
SIZES = {"train": 40, "val": 16, "test": N}


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gold(tmp_path_factory.mktemp("rivals") / "gold", SIZES, present)


def test_a_baseline_s_curve_ends_where_a_dataset_without_the_modality_stands(gold: Path, tmp_path: Path) -> None:
    run = write_tuned(tmp_path / "tuned", gold, recipe_with())
    options = ["--hide", "image", "--rates", "0,1", "--methods", "tfidf,majority"]
    assert main(["robustness", str(run), "--data", str(gold), "--out", str(tmp_path / "card"), *options]) == 0
    found = json.loads((tmp_path / "card" / "robustness.json").read_text())["runs"]
    assert [row["run"] for row in found] == [str(run), "tfidf", "majority"]
    assert [row["labels"] for row in found] == [8, 8, 8]
    without = write_gold(tmp_path / "gold", SIZES, lambda i: [name for name in present(i) if name != "image"])
    train = load_tuned(run, gold, "train").dataset
    val, test, other = (load_tuned(run, *where).dataset for where in ((gold, "val"), (gold, "test"), (without, "test")))
    everything = np.arange(N)
    predict = TfidfLogistic().fit(Subset(train, train.labelled(8, 0)), Subset(val, np.arange(16)), 0)
    outputs = [predict(Subset(split, everything)) for split in (test, other)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3, "the image counts"
    expected = [accuracy(output, test.label) for output in outputs]
    assert [row["value"] for row in found[1]["curves"][0]["rows"]] == pytest.approx(expected)


def test_what_was_hidden_from_the_run_is_hidden_from_the_baselines(gold: Path, tmp_path: Path) -> None:
    from lanistr.comparison.rivals import fit_rivals

    hide = dict.fromkeys(NAMES, 1.0)
    run = write_tuned(tmp_path / "blind", gold, recipe_with(finetune__hide=hide))
    (rival,) = fit_rivals(["trees"], [run], gold, tmp_path / "work", None)
    split = load_tuned(run, gold, "test").dataset
    outputs, truth = rival.answer(split, np.arange(N))
    assert np.ptp(outputs, axis=0).max() < 1e-6, "nothing could be learnt but the classes' shares"
    np.testing.assert_array_equal(truth, split.label)
    assert (rival.labels, rival.train_hidden) == (8, hide)


def test_runs_that_were_given_different_things_have_rivals_of_their_own(gold: Path, tmp_path: Path) -> None:
    from lanistr.comparison.rivals import fit_rivals

    hide = {"text": 1.0}
    runs = [
        write_tuned(tmp_path / name, gold, recipe)
        for name, recipe in [
            ("whole-0", recipe_with()),
            ("again-0", recipe_with(finetune__modality_dropout=0.5)),
            ("hidden-0", recipe_with(finetune__hide=hide)),
            ("whole-1", recipe_with(finetune__seed=1)),
        ]
    ]
    rivals = list(fit_rivals(["majority"], runs, gold, tmp_path / "work", None))
    assert [(rival.name, rival.train_hidden) for rival in rivals] == [
        ("majority as whole-0", {}),
        ("majority as hidden-0", hide),
        ("majority as whole-1", {}),
    ]


def test_a_narrowed_split_hides_what_it_hid(gold: Path) -> None:
    modalities = load_tuned_modalities(gold)
    hidden = HidingDataset(GoldDataset(gold, "test", modalities), {"text": 1.0, "image": 0.5}, 3)
    narrow = hidden.only(["text", "image"])
    assert list(narrow.modalities) == ["text", "image"]
    for i in range(N):
        mask = narrow.index.bits["text"] | narrow.index.bits["image"]
        assert narrow.fetch(i).presence == hidden.fetch(i).presence & mask
        assert narrow.read(i).contents.keys() == hidden.read(i).contents.keys() & {"text", "image"}


def load_tuned_modalities(gold: Path) -> dict:
    from lanistr.manifest import Manifest
    from lanistr.modalities import make_modalities

    return make_modalities(Manifest.load(gold), recipe_with().model.modalities)


@pytest.mark.parametrize(
    ("methods", "said"),
    [("lanistr", "give LANISTR as runs"), ("smell", "method 'smell'"), ("tfidf,lanistr_scratch", "as runs")],
)
def test_methods_that_cannot_be_are_one_line_before_the_work(
    gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], methods: str, said: str
) -> None:
    run = write_tuned(tmp_path / "tuned", gold, recipe_with())
    out = tmp_path / "card"
    assert main(["robustness", str(run), "--data", str(gold), "--out", str(out), "--methods", methods]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert said in errors[0]
    assert not out.exists()
