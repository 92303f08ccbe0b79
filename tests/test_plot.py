"""Curves of runs: what is written, and that it is whole in itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lanistr.__main__ import main
from lanistr.plot import smooth


def write_run(folder: Path, steps: int, scale: float) -> Path:
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {
            "step": s, "loss": scale * 9 / s, "mlm": scale * 6 / s, "mtm": None, "lr": 1e-3, "grad_norm": 2.0, "samples": 32,
            "seconds": 0.5, "samples_per_s": 64.0, "tokens_per_s": 999.0, "data_wait": 0.01, "memory_mib": 900.0,
            "present/text": 1.0, **({"rank/fused": 9.0, "spread/fused": 0.2} if s % 5 == 0 else {}),
        }
        for s in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    (folder / "validation.jsonl").write_text('{"step": 0, "mlm": 7.0}\n{"step": 10, "mlm": 1.0}\n')
    return folder


def test_several_runs_become_png_files_and_one_page_without_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / "a<b", 100, 1.0), write_run(tmp_path / "other", 20, 2.0)]
    out = tmp_path / "plots"
    assert main(["plot", *map(str, runs), "--out", str(out)]) == 0
    assert "index.html: loss.png, throughput.png, health.png" in capsys.readouterr().out
    for name in ("loss", "throughput", "health"):
        with Image.open(out / f"{name}.png") as image:
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20, "not blank"
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=.(?!data:)", page), "self-contained"
    assert "a&lt;b" in page
    assert "a<b" not in page
    assert "3,200" in page, "samples seen"


def test_what_is_no_run_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "plots")]) == 2
    assert "no metrics.jsonl with rows" in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()


def test_a_running_median_ignores_a_spike_and_keeps_a_ramp() -> None:
    assert smooth([1, 1, 99, 1, 1], 3) == [1, 1, 1, 1, 1]
    assert smooth(list(range(9)), 3)[1:-1] == list(range(1, 8))
