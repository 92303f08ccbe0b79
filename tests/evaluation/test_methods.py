"""Methods side by side, from what evaluation leaves of their runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from lanistr.__main__ import main
from lanistr.evaluation.evaluate import by_pattern, save_predictions
from lanistr.evaluation.methods import read_method, write_comparison
from lanistr.metrics import METRICS, accuracy

N = 120
NAMES = {1: "text", 2: "image"}


def evaluated(folder: Path, skill: float, seed: int, target: str = "class") -> Path:
    """A run folder as `launchers/evaluate.py` leaves it; skill is how often the truth is found."""
    rng = np.random.default_rng(0)
    presence, labels = rng.integers(1, 4, N), rng.integers(0, 3, N)
    rng = np.random.default_rng(seed)
    if target == "class":
        truth = labels
        guess = np.where(rng.random(N) < skill, labels, rng.integers(0, 3, N))
        outputs = np.eye(3)[guess] * 0.7 + 0.1
    else:
        truth = labels[:, None] + np.array([[0.0, 10.0]])
        outputs = truth + rng.normal(size=(N, 2)) * (1 - skill)
    folder.mkdir(parents=True)
    save_predictions(folder / "predictions-test.npz", np.arange(N).astype(np.bytes_), presence, outputs, truth)
    result = {"split": "test", "labels": 64, "target": target, "n": N}
    result |= {"patterns": by_pattern(outputs, truth, presence, NAMES, METRICS[target])}
    (folder / "metrics.json").write_text(json.dumps(result))
    return folder


@pytest.mark.parametrize("target", ["class", "regression"])
def test_report_in_three_forms_says_the_same(tmp_path: Path, target: str) -> None:
    good = [evaluated(tmp_path / f"good{s}", 0.8, s, target) for s in range(3)]
    bad = [evaluated(tmp_path / f"bad{s}", 0.3, 10 + s, target) for s in range(3)]
    out = tmp_path / "out" / "report.md"
    method = ["--method", f"ours={','.join(map(str, good))}", "--method", f"the <other>={','.join(map(str, bad))}"]
    assert main(["report", *method, "--out", str(out)]) == 0
    figures = json.loads(out.with_suffix(".json").read_text())
    ours, other = figures["methods"]
    assert ours["first_minus_this"] is None
    assert other["first_minus_this"]["p_bootstrap"] < 0.01
    assert other["first_minus_this"]["p_permutation"] < 0.01
    name = figures["metric"]
    found = ours["metrics"][name]
    expected = [METRICS[target][name](*_load(run)) for run in good]
    assert found["mean"] == pytest.approx(np.mean(expected))
    assert found["std"] == pytest.approx(np.std(expected, ddof=1))
    text, page = out.read_text(), out.with_suffix(".html").read_text()
    assert f"{found['mean']:.3f} ± {found['std']:.3f}" in text
    assert f"{found['mean']:.3f} ± {found['std']:.3f}" in page
    assert "the &lt;other&gt;" in page
    plots = 2 if target == "regression" else 3
    assert page.count("data:image/png;base64,") == plots == len(list(out.parent.glob("*.png")))
    assert not list(out.parent.glob(".*"))


def _load(run: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(run / "predictions-test.npz") as stored:
        return stored["outputs"], stored["truth"]


def test_patterns_are_those_of_the_samples(tmp_path: Path) -> None:
    method = read_method("one", [evaluated(tmp_path / "run", 0.6, 1)])
    figures = write_comparison([method], tmp_path / "report.md")
    for row in figures["patterns"]:
        mask = sum(bit for bit, name in NAMES.items() if name in row["present"])
        own = method.presence_N == mask
        assert row["n"] == own.sum()
        assert row["values"]["one"] == pytest.approx(accuracy(method.outputs[0][own], method.truth[own]))
    assert len(figures["patterns"]) == 3


def test_rare_patterns_get_no_metrics() -> None:
    presence = np.array([1] * 20 + [2] * 3)
    rows = by_pattern(np.tile([[0.4, 0.6]], (23, 1)), np.ones(23, dtype=int), presence, NAMES, METRICS["class"])
    assert [(row["present"], row["n"], bool(row["metrics"])) for row in rows] == [
        (["text"], 20, True),
        (["image"], 3, False),
    ]
    assert rows[0]["metrics"]["accuracy"] == 1
    assert rows[0]["metrics"]["auroc"] is None


def test_what_cannot_be_paired_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = evaluated(tmp_path / "one", 0.6, 1), evaluated(tmp_path / "two", 0.6, 2)
    numbers = evaluated(tmp_path / "numbers", 0.6, 1, "regression")
    out = str(tmp_path / "report.md")
    cases = {
        f"b={one},{two}": "has 2 seeds",
        f"b={numbers}": "nothing is paired",
        f"b={tmp_path / 'none'}": "run launchers/evaluate.py",
        "b": "write NAME=RUN,RUN",
    }
    for method, message in cases.items():
        assert main(["report", "--method", f"a={one}", "--method", method, "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert main(["report", "--out", out]) == 2
    assert not Path(out).exists()
