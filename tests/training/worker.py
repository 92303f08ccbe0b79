"""One rank of a test: runs a list of cases under DeepSpeed and writes what each step reported as JSON.

``python worker.py CASES.json``; rank 0 writes ``out`` of each case.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.reader import GoldDataset
from lanistr.training import distributed, health
from lanistr.training.ds_config import fill_config
from lanistr.training.engine import Engine, start
from lanistr.training.guard import check_agreement
from lanistr.training.lifeline import end_process
from lanistr.training.schedule import lr_at
from tests.model.support import RECIPE, make_modalities, make_pretrain

DS = Path(__file__).resolve().parents[2] / "ds_configs"


def config_of(case: dict[str, Any]) -> Any:
    return RECIPE.pretrain.model_copy(
        update={
            "global_batch": 8,
            "micro_batch": case["micro"],
            "precision": case["precision"],
            "lr": 1e-2,
            "clip": 0.5,
            "weight_decay": 0.1,
            "eps": 1e-6,  # Adam would turn the rounding of a gradient near zero into a step of another sign
        }
    )


def ds_config(case: dict[str, Any]) -> Path:
    """As shipped; stage 0 has nothing to configure, and its file is the test's."""
    if case["stage"] == "0":
        return Path(case["gold"]).with_name("zero0.json")
    return DS / f"zero{'2_offload' if case['stage'] == 'offload' else case['stage']}.json"


def run_case(case: dict[str, Any], device: Any) -> list[dict[str, Any]]:
    modalities = make_modalities()
    config = config_of(case)
    world = distributed.world_size()
    loader = TrainLoader(
        GoldDataset(case["gold"], "train", modalities),
        Collator(modalities, views=2, seed=5),
        global_batch=8,
        micro_batch=config.micro_batch,
        ranks=world,
        rank=distributed.rank(),
        seed=1,
        grouping="stratified",
    )
    filled = fill_config(ds_config(case), "tiny", config, world)
    engine = Engine(make_pretrain(modalities), filled, device, config.weight_decay)
    rows, monitor = [], health.Health(engine, every=1)
    for step, batches in enumerate(loader.steps(0, case["steps"])):
        lr = lr_at(step, case["steps"], config.lr, config.warmup, config.final_lr)
        monitor.begin(step)
        result = engine.train_step(batches, lr, monitor.before_update)
        figures = monitor.end()
        absent = [[n for n in modalities if all(b.counts[modalities[n].term] == 0 for b in batches)]]
        everyone = distributed.gather_objects(absent[0])
        check_agreement(engine.module, step)
        rows.append(
            {
                "loss": result.loss,
                "terms": result.terms,
                "norm": result.grad_norm,
                "figures": figures,
                "skipped": result.skipped,
                "absent": everyone,
            }
        )
    return rows


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    device = start(threads=1)
    health.FEWEST = 2  # the batches of these cases are small
    for case in cases:
        rows = run_case(case, device)
        if distributed.rank() == 0:
            Path(case["out"]).write_text(json.dumps(rows))
    distributed.shutdown()
    end_process(0)


if __name__ == "__main__":
    main()
