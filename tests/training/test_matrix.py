"""The matrix: ZeRO stage x precision x ranks x a modality absent on one rank; all equal a plain torch loop (contract 4).

Cases of one world size share a launch. The reference knows nothing of DeepSpeed or of ranks: one process, AdamW, the
loss of equation 3 over each global batch, and for bfloat16 float32 masters written out by hand.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.reader import GoldDataset
from lanistr.training.parameters import parameter_groups
from lanistr.training.schedule import lr_at
from tests.model.support import NAMES, RECIPE, make_modalities, make_pretrain
from tests.ranks import finish, launch
from tests.tiny_gold import write_gold

WORKER = Path(__file__).with_name("worker.py")
STEPS = 5
# Losses are about 7. bfloat16 ranks add gradients that are rounded to 8 bits each, in another order.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
pytestmark = pytest.mark.dist


@dataclass(frozen=True)
class Case:
    """``stage`` may be ``offload``: 2 with the optimizer on the CPU; ``data``: the modality absent on one rank."""

    stage: str
    precision: str
    ranks: int
    data: str
    micro: int | None = None

    def __str__(self) -> str:
        accumulated = f"/micro{self.micro}" if self.micro else ""
        return f"{self.data}/{self.stage}/{self.precision}/{self.ranks}{accumulated}"


THIN = [
    *(Case("2", "float32", 2, f"no_{name}") for name in NAMES),
    *(Case(stage, "float32", 2, "varied") for stage in ("0", "1")),
    Case("2", "float32", 2, "varied", 2),
    Case("2", "bfloat16", 2, "varied"),
    Case("0", "float32", 1, "varied"),
    Case("2", "float32", 1, "varied", 2),
]
FULL = [
    *(
        Case(stage, precision, ranks, data)
        for stage in ("0", "1", "2", "offload")
        for precision in TOLERANCE
        if (stage, precision) != ("0", "bfloat16")
        for ranks in (1, 2)
        for data in [f"no_{name}" for name in NAMES]
    ),
    *(Case(stage, precision, 4, "varied") for stage in ("1", "2", "offload") for precision in TOLERANCE),
    Case("0", "float32", 4, "varied"),
    *(Case(stage, "bfloat16", 2, "varied", 2) for stage in ("1", "2", "offload")),
    *(Case(stage, "float32", ranks, "varied", 2) for stage in ("0", "1", "2", "offload") for ranks in (1, 2)),
]


def sparse(name: str) -> Callable[[int], Sequence[str]]:
    """``name`` in one sample of 40: on two ranks it is absent on one of them, or on both."""
    return lambda i: [n for n in NAMES if n != name or i % 40 == 7]


def varied(i: int) -> list[str]:
    return [name for bit, name in enumerate(NAMES) if (i * 7 + 3) >> bit & 1]


def plain_torch(gold: Path, precision: str) -> list[float]:
    """Losses of a loop that a reader can check line by line."""
    modalities = make_modalities()
    task = make_pretrain(modalities).train()
    config = RECIPE.pretrain.model_copy(update={"lr": 1e-2, "eps": 1e-6})
    loader = TrainLoader(
        GoldDataset(gold, "train", modalities),
        Collator(modalities, views=2, seed=5),
        global_batch=8,
        micro_batch=None,
        ranks=1,
        rank=0,
        seed=1,
        grouping="stratified",
    )
    groups = parameter_groups(task, 0.1)
    if precision == "bfloat16":
        task.bfloat16()  # DeepSpeed's masters start from the rounded parameters, too
    copies = {p: p.detach().float().clone().requires_grad_() for group in groups for p in group["params"]}
    masters = [{**group, "params": [copies[p] for p in group["params"]]} for group in groups]
    optimizer = torch.optim.AdamW(masters, lr=1e-2, betas=(0.9, 0.999), eps=config.eps)
    losses = []
    for step, (batch,) in enumerate(loader.steps(0, STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, STEPS, config.lr, config.warmup, config.final_lr)
        totals = task(batch)
        loss = torch.stack([task.weights[n] * t / max(batch.counts[n], 1) for n, t in totals.items()]).sum()
        task.zero_grad()
        loss.backward()
        for parameter, master in copies.items():
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(copies.values(), 0.5)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in copies.items():
                parameter.copy_(master)
        losses.append(loss.item())
    return losses


class Matrix:
    """Runs cases, and their references."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.golds = {f"no_{n}": write_gold(folder / f"no_{n}", {"train": 40}, sparse(n)) for n in NAMES}
        self.golds["varied"] = write_gold(folder / "varied", {"train": 40}, varied)
        (folder / "zero0.json").write_text("{}")
        self.rows: dict[Case, list[dict[str, Any]]] = {}
        self.reference = cache(lambda data, precision: plain_torch(self.golds[data], precision))

    def run(self, cases: Sequence[Case]) -> None:
        for ranks in sorted({case.ranks for case in cases}):
            chosen = [case for case in cases if case.ranks == ranks and case not in self.rows]
            written = [
                {**asdict(c), "gold": str(self.golds[c.data]), "steps": STEPS, "out": str(self.folder / f"{i}.json")}
                for i, c in enumerate(chosen)
            ]
            path = self.folder / "cases.json"
            path.write_text(json.dumps(written))
            finish(launch(ranks, [str(WORKER), str(path)]))
            for case, row in zip(chosen, written, strict=True):
                self.rows[case] = json.loads(Path(row["out"]).read_text())


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def thin(matrix: Matrix) -> Matrix:
    matrix.run(THIN)
    return matrix


@pytest.fixture(scope="module")
def full(matrix: Matrix) -> Matrix:
    matrix.run(FULL)
    return matrix


def check(matrix: Matrix, case: Case) -> None:
    rows = matrix.rows[case]
    expected = matrix.reference(case.data, case.precision)
    assert [row["loss"] for row in rows] == pytest.approx(expected, abs=TOLERANCE[case.precision])
    assert not any(row["skipped"] for row in rows)
    if case.data != "varied" and case.ranks == 2:
        absent_on_one = [sum(case.data[3:] in rank for rank in row["absent"]) == 1 for row in rows]
        assert any(absent_on_one), "the data does not exercise the case"


@pytest.mark.parametrize("case", THIN, ids=str)
def test_a_step_equals_plain_torch(thin: Matrix, case: Case) -> None:
    check(thin, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_step_equals_plain_torch_in_the_whole_matrix(full: Matrix, case: Case) -> None:
    check(full, case)


def test_gradient_norms_are_the_same_on_every_stage_and_number_of_ranks(thin: Matrix) -> None:
    same = [c for c in THIN if c.data == "varied" and c.precision == "float32"]
    norms = {str(c): [row["norm"] for row in thin.rows[c]] for c in same}
    first = next(iter(norms.values()))
    assert all(norm == pytest.approx(first, rel=1e-4) for norm in norms.values()), norms


def test_gradient_norms_of_the_parts_make_up_the_norm_of_the_whole(thin: Matrix) -> None:
    for case in THIN:
        for row in thin.rows[case]:
            parts = {name: norm for name, norm in row["figures"].items() if name.startswith("grad_norm/")}
            assert parts.keys() == {f"grad_norm/{name}" for name in (*NAMES, "fusion", "heads")}
            rel = 1e-4 if case.precision == "float32" else 1e-2
            assert sum(norm**2 for norm in parts.values()) ** 0.5 == pytest.approx(row["norm"], rel=rel), case


def test_health_is_the_same_on_every_stage_number_of_ranks_and_accumulation(thin: Matrix) -> None:
    same = [c for c in THIN if c.data == "varied" and c.precision == "float32"]
    first = [row["figures"] for row in thin.rows[same[0]]]
    assert {"rank/fused", "spread/image", "std/cls", "mmm_share/text", "mmm/tabular"} <= first[0].keys()
    for case in same[1:]:
        for row, expected in zip(thin.rows[case], first, strict=True):
            assert row["figures"] == pytest.approx(expected, rel=2e-3, abs=1e-6), case
