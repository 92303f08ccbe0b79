"""One rank: one step of a whole recipe at its published size, batch 2 per rank, rank 1 without an image.

``python full_size_worker.py RECIPE OUT.json``; rank 0 writes what the step reported.
"""

import dataclasses
import json
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lanistr.config import load_recipe
from lanistr.data.loader import Collator
from lanistr.data.reader import Sample
from lanistr.modalities import MODALITIES
from lanistr.model.lanistr import build_model
from lanistr.tasks import Pretrain
from lanistr.training import distributed
from lanistr.training.ds_config import fill_config
from lanistr.training.engine import Engine, start
from lanistr.training.guard import check_agreement
from lanistr.training.lifeline import end_process

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    device = start(threads=1)
    overrides = ["pretrain.global_batch=4", "pretrain.micro_batch=2"]
    if sys.argv[1] == "amazon_pretrain":  # the samples are equal: batch norm would divide by nothing
        overrides.append("model.modalities.tabular.norm=frozen")
    recipe = load_recipe(sys.argv[1], overrides)
    modalities = {
        name: MODALITIES[name](
            name, {k: v for k, v in block.items() if k != "pretrained"}, MODALITIES[name].paper_schema()
        )
        for name, block in recipe.model.modalities.items()
    }
    config = recipe.pretrain
    model = build_model(recipe.model, modalities, 0, "cpu", config.precision)
    task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, 0)
    filled = fill_config(ROOT / "ds_configs" / "zero2.json", recipe.name, config, distributed.world_size())
    engine = Engine(task, filled, device, config.weight_decay)
    before = {name: p.detach().float().norm().item() for name, p in engine.module.named_parameters()}
    rank = distributed.rank()
    names = [name for name in modalities if (name, rank) != ("image", 1)]
    contents = {name: modalities[name].example() for name in names}
    samples = [Sample(key=f"{rank}{i}", presence=0, label=-1, contents=contents) for i in range(2)]
    result = engine.train_step([Collator(modalities, views=2, seed=0)(samples, [1.0, 1.0], epoch=0)], config.lr)
    check_agreement(engine.module, 1)
    changed = sum(before[name] != p.detach().float().norm().item() for name, p in engine.module.named_parameters())
    peaks = distributed.gather_objects(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    if rank == 0:
        report = dataclasses.asdict(result) | {"parameters": sum(p.numel() for p in task.parameters())}
        report |= {"peak_mib": peaks, "changed": changed, "tensors": len(before)}
        Path(sys.argv[2]).write_text(json.dumps(report))
    distributed.shutdown()
    end_process(0)


if __name__ == "__main__":
    main()
