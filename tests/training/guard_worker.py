"""One rank: a loss that is not finite on rank 1 only, at every stage; then a parameter that differs on rank 1.

Then batch norms whose statistics differ are merged. ``python guard_worker.py CASES.json OUT.json``; cases as of worker.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.reader import GoldDataset
from lanistr.ops.ghost_norm import GhostBatchNorm
from lanistr.training import distributed
from lanistr.training.ds_config import fill_config
from lanistr.training.engine import Engine, start
from lanistr.training.guard import check_agreement
from lanistr.training.lifeline import end_process
from tests.model.support import make_modalities, make_pretrain
from tests.training.worker import config_of, ds_config


def run_case(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    modalities, config, rank = make_modalities(), config_of(case), distributed.rank()
    world = distributed.world_size()
    dataset, collator = GoldDataset(case["gold"], "train", modalities), Collator(modalities, views=2, seed=5)
    sizes: dict[str, Any] = {"global_batch": 8, "micro_batch": None, "ranks": world, "rank": rank, "seed": 1}
    loader = TrainLoader(dataset, collator, grouping="stratified", **sizes)
    engine = Engine(make_pretrain(modalities), fill_config(ds_config(case), "tiny", config, world), device, 0.1)
    results, weight = [], engine.weights["mlm"]
    for step, batches in enumerate(loader.steps(0, 3)):
        engine.weights["mlm"] = float("inf") if (rank, step) == (1, 1) else weight
        before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        skipped = engine.train_step(batches, 1e-2).skipped
        same = all(torch.equal(before[name], p) for name, p in engine.module.named_parameters())
        check_agreement(engine.module, step)
        results.append([skipped, same])
    name, parameter = list(engine.module.named_parameters())[5]
    if rank == 1:
        parameter.data.view(-1)[0] += 0.01
    try:
        check_agreement(engine.module, 3)
        said = "nothing"
    except ValueError as error:
        said = str(error)
    return {"steps": distributed.gather_objects(results), "name": name, "said": distributed.gather_objects(said)}


def merged_statistics() -> list[list[float]]:
    """Running mean and variance after a merge, of a norm that saw other rows, and other numbers of them, on each rank."""
    norm = GhostBatchNorm(2, 4, momentum=0.1)
    rank = distributed.rank()
    norm.running_mean.fill_(1.0 + 10 * rank)
    norm.running_var.fill_(2.0 + 20 * rank)
    norm.rows_seen.fill_(3 if rank == 0 else 9)
    unused = GhostBatchNorm(2, 4, momentum=0.1)
    unused.running_mean.fill_(7.0)
    distributed.merge_batch_norm(torch.nn.ModuleList([norm, unused]))
    return [
        norm.running_mean.tolist(),
        norm.running_var.tolist(),
        norm.rows_seen.tolist(),
        unused.running_mean.tolist(),
    ]


def main() -> None:
    device = start(threads=1)
    reports = [run_case(case, device) for case in json.loads(Path(sys.argv[1]).read_text())]
    reports.append({"merged": distributed.gather_objects(merged_statistics())})
    if distributed.rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(reports))
    distributed.shutdown()
    end_process(0)


if __name__ == "__main__":
    main()
