"""The grid of a comparison: each cell once, the same draws for all, nothing mixed with another comparison."""

import re
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from lanistr.baselines import Predict, Subset
from lanistr.comparison.cells import Answer, Cell, CellStore
from lanistr.comparison.grid import Splits, run_grid
from lanistr.comparison.table import Truth, make_rows, markdown
from lanistr.metrics import accuracy
from lanistr.training import distributed
from tests.model.support import NAMES, RECIPE
from tests.tiny_gold import write_gold


class Recorder:
    """A method that is right about the share ``right`` of the test samples, and remembers what it was given."""

    def __init__(self, right: float = 1.0, fail_at: int | None = None):
        self.right, self.fail_at = right, fail_at
        self.pretrained: list[int] = []
        self.drawn: list[tuple[int, tuple[int, ...]]] = []

    def pretrain(self, seed: int) -> None:
        self.pretrained.append(seed)

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        assert (val.dataset.split, train.dataset.split) == ("val", "train")
        if seed == self.fail_at:
            raise ValueError("no luck")
        self.drawn.append((seed, tuple(train.positions_N.tolist())))
        return lambda subset: np.eye(3)[(subset.labels_N + (np.arange(len(subset)) >= self.right * len(subset))) % 3]


@pytest.fixture
def splits(tmp_path: Path) -> Splits:
    gold = write_gold(tmp_path / "gold", {"train": 40, "val": 6, "test": 20}, lambda i: NAMES)
    return Splits.open(RECIPE, gold)


def test_every_method_gets_the_same_draws_and_a_finished_cell_is_never_run_again(
    tmp_path: Path, splits: Splits
) -> None:
    methods = {"a": Recorder(), "b": Recorder(0.5)}
    store = CellStore(tmp_path / "out", {"data": 1})
    cells = run_grid(methods, [6, None], 2, splits, store, accuracy)
    assert len(cells) == 8
    assert methods["a"].drawn == methods["b"].drawn
    assert [len(positions) for _, positions in methods["a"].drawn] == [6, 40, 6, 40]
    assert methods["a"].drawn[0] != methods["a"].drawn[2]
    again = {"a": Recorder(), "b": Recorder()}
    run_grid(again, [6, None], 3, splits, CellStore(tmp_path / "out", {"data": 1}), accuracy)
    assert [seed for seed, _ in again["a"].drawn] == [2, 2]
    assert again["a"].pretrained == [2, 2]


def test_a_method_that_fails_names_the_cell_and_keeps_what_is_done(tmp_path: Path, splits: Splits) -> None:
    store = CellStore(tmp_path / "out", {})
    with pytest.raises(ValueError, match="cell a-6-1: no luck"):
        run_grid({"a": Recorder(fail_at=1)}, [6], 2, splits, store, accuracy)
    assert store.load(Cell("a", 6, 0)) is not None
    assert store.load(Cell("a", 6, 1)) is None


def test_more_labels_than_there_are_are_refused_before_anything_runs(tmp_path: Path, splits: Splits) -> None:
    method = Recorder()
    with pytest.raises(ValueError, match="41 labels asked for"):
        run_grid({"a": method}, [6, 41], 1, splits, CellStore(tmp_path / "out", {}), accuracy)
    assert not method.drawn


def test_a_cell_that_another_process_works_on_is_left_to_it(tmp_path: Path, splits: Splits) -> None:
    store, method = CellStore(tmp_path / "out", {}), Recorder()
    with FileLock(tmp_path / "out" / "cells" / ".a-6-0.lock"):
        run_grid({"a": method}, [6], 2, splits, store, accuracy)
    assert [seed for seed, _ in method.drawn] == [1]


def test_cells_of_another_comparison_are_refused(tmp_path: Path) -> None:
    CellStore(tmp_path, {"recipe": {"finetune": {"lr": 0.1}}})
    CellStore(tmp_path, {"recipe": {"finetune": {"lr": 0.1}}})
    with pytest.raises(ValueError, match=re.escape("recipe.finetune.lr was 0.1, is 0.2; give another --out")):
        CellStore(tmp_path, {"recipe": {"finetune": {"lr": 0.2}}})


def test_half_a_cell_is_no_cell(tmp_path: Path) -> None:
    store, cell = CellStore(tmp_path, {}), Cell("a", None, 0)
    (tmp_path / "cells" / f".{cell.name}.npz.1.tmp").write_bytes(b"half")
    assert store.load(cell) is None
    store.save(cell, Answer(np.array([[0.25, 0.75]]), 1.5))
    found = store.load(cell)
    assert found is not None
    np.testing.assert_array_equal(found.probabilities_NC, [[0.25, 0.75]])
    assert found.seconds == 1.5


def test_rows_pair_the_seeds_that_both_have(tmp_path: Path) -> None:
    store, truth = CellStore(tmp_path, {}), np.zeros(200, dtype=np.int64)
    shares = {("ours", 0): 1.0, ("ours", 1): 0.9, ("rival", 0): 0.5, ("rival", 1): 0.4, ("rival", 2): 0.0}
    cells = [Cell(name, 8, seed) for name, seed in shares]
    for cell, share in zip(cells, shares.values(), strict=True):
        store.save(cell, Answer(np.eye(2)[(np.arange(200) >= 200 * share).astype(int)], 2.0))
    ours, rival = make_rows(cells, store, Truth(truth, np.arange(200)), ["accuracy"], "ours", "toy")
    assert (ours["mean"], ours["seeds"], ours["p_vs_ours"]) == (pytest.approx(0.95), 2, None)
    assert (rival["mean"], rival["seeds"]) == (pytest.approx(0.3), 3)
    assert rival["ours_minus_this"]["mean"] == pytest.approx(0.5)  # over the two seeds that ours has
    assert rival["ours_minus_this"]["pairs"] == 2
    assert rival["p_vs_ours"] < 0.05
    text = markdown([ours, rival], {"rival": "one line"}, "ours")
    assert "| rival | 0.300 ± 0.265" in text
    assert "* `rival`: one line" in text


def test_samples_of_one_group_are_one_witness(tmp_path: Path) -> None:
    """Repeating every sample four times says nothing new: with groups the interval is that of the samples alone."""
    store, rng = CellStore(tmp_path, {}), np.random.default_rng(0)
    alone = np.eye(2)[rng.integers(0, 2, 100)]
    cells = [Cell("once", 8, 0), Cell("four_times", 8, 0)]
    for cell, repeats in zip(cells, (1, 4), strict=True):
        store.save(cell, Answer(np.repeat(alone, repeats, axis=0), 1.0))

    def interval(cell: Cell, groups_N: np.ndarray) -> list[float]:
        truth = Truth(np.zeros(len(groups_N), dtype=np.int64), groups_N)
        return make_rows([cell], store, truth, ["accuracy", "macro_f1"], cell.method, "toy")[0]["ci95"]

    honest = interval(cells[0], np.arange(100))
    assert interval(cells[1], np.repeat(np.arange(100), 4)) == honest
    low, high = interval(cells[1], np.arange(400))
    assert high - low < 0.7 * (honest[1] - honest[0])


def test_each_metric_has_its_table(tmp_path: Path) -> None:
    store, cell = CellStore(tmp_path, {}), Cell("ours", 8, 0)
    store.save(cell, Answer(np.eye(2)[[0, 0, 0, 1]], 1.0))
    rows = make_rows([cell], store, Truth(np.zeros(4, int), np.arange(4)), ["accuracy", "macro_f1"], "ours", "toy")
    assert [(row["metric"], row["mean"]) for row in rows] == [("accuracy", 0.75), ("macro_f1", pytest.approx(3 / 7))]
    text = markdown(rows, {}, "ours")
    assert text.index("Test accuracy on toy") < text.index("| ours | 0.750") < text.index("Test macro_f1 on toy")
    assert "| ours | 0.429" in text


@pytest.mark.parametrize("joined", [False, True])
def test_a_world_that_the_caller_joined_is_the_callers_to_leave(
    joined: bool, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    monkeypatch.setattr(distributed, "is_joined", lambda: joined)
    monkeypatch.setattr(distributed, "shutdown", lambda: left.append(True))
    run_grid({"a": Recorder()}, [6], 1, splits, CellStore(tmp_path / "out", {}), accuracy)
    assert left == ([] if joined else [True])
