"""`etl stats` against counting the members of the tars by hand."""

import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from etl.__main__ import main
from etl.build import build
from etl.stats import _numbers, stats, table
from etl.summary import Numbers
from tests.etl.test_build import recipe_of, write_raw


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats")
    return build(recipe_of(), write_raw(folder / "raw"), folder / "lake")


def test_patterns_and_labels_are_those_of_the_tars(gold: Path) -> None:
    members: dict[str, set[str]] = {}
    labels: Counter[str] = Counter()
    for path in gold.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                members.setdefault(key, set()).add(kind)
    kinds = {"text": "tok.npy", "image": "jpg", "tabular": "tab.npy", "timeseries": "ts.npy"}
    patterns = Counter(tuple("x" if kind in found else "." for kind in kinds.values()) for found in members.values())
    printed = [line.split() for line in stats(gold).splitlines() if line.startswith("pattern")]
    assert {tuple(row[1:5]): int(row[5]) for row in printed} == patterns
    for line in stats(gold).splitlines():
        if line.startswith(("yes ", "no ")):
            labels[line.split()[0]] += sum(int(cell) for cell in line.split()[1::2])
    assert sum(labels.values()) == len(members) == 120
    assert labels["no"] == 40


def test_a_long_tail_is_pointed_out() -> None:
    even, tail = np.linspace(-1, 1, 500), np.random.default_rng(0).lognormal(0, 3, 500)
    quiet = _numbers(
        [Numbers("even", even, 0.0), Numbers("nothing", np.zeros(0), 1.0), Numbers("same", np.ones(9), 0.0)]
    )
    assert "quantile" not in quiet
    told = _numbers([Numbers("even", even, 0.0), Numbers("price", tail, 0.0)])
    cells = {line.split()[0]: line.split()[-1] for line in told.splitlines()}
    assert float(cells["even"]) == 0
    assert float(cells["price"]) == pytest.approx(scipy.stats.skew(tail), abs=0.06)
    assert "numbers: quantile" in told.splitlines()[-1]


def test_lineage_names_every_raw_file(gold: Path) -> None:
    printed = stats(gold)
    for parent in json.loads((gold / "manifest.json").read_text())["parents"]:
        assert parent["file"] in printed
        assert parent["sha256"][:16] in printed


def test_a_missing_index_or_manifest_is_one_line(
    gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "manifest.json").write_bytes((gold / "manifest.json").read_bytes())
    assert main(["stats", str(copy)]) == 2
    assert "missing, but the manifest names it" in capsys.readouterr().err


def test_columns_are_aligned() -> None:
    assert table(["a", "n"], [["long", "1"], ["b", "20"]]) == "a      n\n----  --\nlong   1\nb     20"
