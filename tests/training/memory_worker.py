"""One rank of a test: bytes that DeepSpeed's engine really holds after a step. ``python memory_worker.py CASES.json``."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from lanistr.training import distributed
from lanistr.training.ds_config import fill_config
from lanistr.training.engine import Engine, start
from lanistr.training.lifeline import end_process
from lanistr.training.measured import bytes_of, optimizer_tensors
from tests.model.support import NAMES, RECIPE, make_batch, make_modalities, make_pretrain, random_samples


def held(case: dict[str, Any], device: torch.device) -> dict[str, int]:
    modalities = make_modalities()
    contents, masks = random_samples(modalities, [NAMES] * 4, seed=1)
    config = RECIPE.pretrain.model_copy(
        update={"global_batch": 4 * distributed.world_size(), "precision": case["precision"]}
    )
    filled = fill_config(Path(case["ds"]), "tiny", config, distributed.world_size())
    engine = Engine(make_pretrain(modalities), filled, device, 0.1)
    engine.train_step([make_batch(modalities, contents, masks)], 1e-3)
    return {
        "parameters": bytes_of(engine.module.parameters()),
        "optimizer": bytes_of(optimizer_tensors(engine)),
    }


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    device = start(threads=1)
    for case in cases:
        found = held(case, device)
        if distributed.rank() == 0:
            Path(case["out"]).write_text(json.dumps(found))
    distributed.shutdown()
    end_process(0)


if __name__ == "__main__":
    main()
