import json
from pathlib import Path
from typing import Any

import pytest

from lanistr.evaluation.report import write_report


def write_run(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def tuned(folder: Path, accuracy: float) -> Path:
    folder.mkdir()
    metric = {"value": accuracy, "ci95": [accuracy - 0.04, accuracy + 0.04]}
    result = {"n": 578, "labels": "all", "metrics": dict.fromkeys(("accuracy", "macro_f1", "auroc"), metric)}
    (folder / "metrics.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def pretrain(tmp_path: Path) -> Path:
    folder = tmp_path / "pretrain"
    write_run(
        folder, "metrics.jsonl", [{"step": s, "mlm": 6 - s / 100, "mfm": 1 + s / 100} for s in range(10, 210, 10)]
    )
    write_run(folder, "validation.jsonl", [{"step": s, "mlm": 7 - s / 50, "mfm": 99 - s / 4} for s in (0, 100, 200)])
    return folder


def test_report_says_which_terms_fell_and_what_held_out_samples_say(pretrain: Path, tmp_path: Path) -> None:
    text = write_report(pretrain, [tuned(tmp_path / "tuned", 0.6)], None, tmp_path / "report.md")
    assert "| text (MLM) | 5.8500 | 4.0500 | fell | 5.0000 -> 3.0000 |" in text
    assert "| tabular (MFM) | 1.1500 | 2.9500 | did not fall | 74.0000 -> 49.0000 |" in text
    assert "held out, step 100, 200" in text
    assert (tmp_path / "pretrain_losses.png").stat().st_size > 5000
    assert (tmp_path / "report.md").read_text() == text


def test_report_without_validation_has_no_held_out_figures(pretrain: Path, tmp_path: Path) -> None:
    (pretrain / "validation.jsonl").unlink()
    text = write_report(pretrain, [tuned(tmp_path / "tuned", 0.6)], None, tmp_path / "report.md")
    assert "| text (MLM) | 5.8500 | 4.0500 | fell | - |" in text


@pytest.mark.parametrize("accuracy, verdict", [(0.61, "beats"), (0.58, "does not beat")])
def test_report_compares_with_the_best_single_modality(
    pretrain: Path, tmp_path: Path, accuracy: float, verdict: str
) -> None:
    bayes = {"text": 0.568, "image": 0.584, "text+image": 0.584}
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"bayes_accuracy": bayes, "bayes_accuracy_with_missing": 0.8}))
    text = write_report(pretrain, [tuned(tmp_path / "tuned", accuracy)], truth, tmp_path / "report.md")
    assert f"({accuracy:.3f}) {verdict} the best single modality (image, 0.584)" in text
