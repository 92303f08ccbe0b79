"""ZeRO on several ranks equals a plain torch loop, with each modality in turn absent on one rank (contract 4)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.reader import GoldDataset
from lanistr.training.engine import parameter_groups
from lanistr.training.schedule import lr_at
from tests.model.support import NAMES, RECIPE, make_modalities, make_pretrain
from tests.ranks import finish, launch
from tests.tiny_gold import write_gold

WORKER = Path(__file__).with_name("worker.py")
DS = Path(__file__).resolve().parents[2] / "ds_configs"
STEPS = 5
pytestmark = pytest.mark.dist


def sparse(name: str) -> Callable[[int], Sequence[str]]:
    """``name`` in one sample of 40: on two ranks it is absent on one of them, or on both."""
    return lambda i: [n for n in NAMES if n != name or i % 40 == 7]


def varied(i: int) -> list[str]:
    return [name for bit, name in enumerate(NAMES) if (i * 7 + 3) >> bit & 1]


def plain_torch(gold: Path, steps: int) -> list[float]:
    """One process, AdamW, no DeepSpeed: the loss of equation 3 over each global batch."""
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
    optimizer = torch.optim.AdamW(parameter_groups(task, 0.1), lr=1e-2, betas=(0.9, 0.999), eps=config.eps)
    losses = []
    for step, (batch,) in enumerate(loader.steps(0, steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, config.lr, config.warmup, config.final_lr)
        totals = task(batch)
        loss = torch.stack([task.weights[n] * t / max(batch.counts[n], 1) for n, t in totals.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases; those of one world size share a launch."""
    folder = tmp_path_factory.mktemp("parallel")
    golds = {f"no_{n}": write_gold(folder / f"no_{n}", {"train": 40}, sparse(n)) for n in NAMES}
    golds["varied"] = write_gold(folder / "varied", {"train": 40}, varied)
    worlds: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name in golds:
        worlds[2].append({"name": f"{name}/zero2/2", "gold": str(golds[name]), "ds": str(DS / "zero2.json")})
    varied_gold = str(golds["varied"])
    worlds[2].append({"name": "varied/zero1/2", "gold": varied_gold, "ds": str(DS / "zero1.json")})
    worlds[2].append({"name": "varied/zero2/2x2", "gold": varied_gold, "ds": str(DS / "zero2.json"), "micro": 2})
    worlds[1].append({"name": "varied/zero2/1", "gold": varied_gold, "ds": str(DS / "zero2.json")})
    worlds[1].append({"name": "varied/zero2/1x4", "gold": varied_gold, "ds": str(DS / "zero2.json"), "micro": 2})
    found: dict[str, Any] = {}
    for ranks, cases in worlds.items():
        for i, case in enumerate(cases):
            case |= {"steps": STEPS, "out": str(folder / f"{ranks}-{i}.json")}
        (folder / f"cases{ranks}.json").write_text(json.dumps(cases))
        finish(launch(ranks, [str(WORKER), str(folder / f"cases{ranks}.json")]))
        found |= {case["name"]: json.loads(Path(case["out"]).read_text()) for case in cases}
    found["plain"] = {name: plain_torch(gold, STEPS) for name, gold in golds.items()}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_zero2_on_two_ranks_equals_plain_torch_with_a_modality_absent_on_one_rank(results: dict, name: str) -> None:
    rows = results[f"no_{name}/zero2/2"]
    absent_on_one = [sum(name in rank for rank in row["absent"]) == 1 for row in rows]
    assert any(absent_on_one), "the data does not exercise the case"
    assert [row["loss"] for row in rows] == pytest.approx(results["plain"][f"no_{name}"], abs=1e-5)


@pytest.mark.parametrize("case", ["zero2/2", "zero1/2", "zero2/2x2", "zero2/1", "zero2/1x4"])
def test_ranks_and_accumulation_only_divide_the_work(results: dict, case: str) -> None:
    losses = [row["loss"] for row in results[f"varied/{case}"]]
    assert losses == pytest.approx(results["plain"]["varied"], abs=1e-5)
