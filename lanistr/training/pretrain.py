"""Pretraining: a recipe, a dataset and a ZeRO configuration become a run."""

import json
from pathlib import Path

from lanistr.config import Recipe
from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.reader import GoldDataset
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from lanistr.model.lanistr import build_model
from lanistr.tasks import Pretrain
from lanistr.training import distributed
from lanistr.training.engine import Engine, fill_config, start
from lanistr.training.loop import train
from lanistr.training.run import check_run, describe_run


def pretrain(recipe: Recipe, data: Path, run: Path, ds_config: Path, *, resuming: bool) -> None:
    """Pretrain on the train split of a gold dataset.

    Raises:
        ValueError: anything that a user can put right.
    """
    config = recipe.pretrain
    manifest = Manifest.load(data)
    modalities = make_modalities(manifest, recipe.model.modalities)
    resuming = check_run(run, resuming)
    rank, world, _ = distributed.world_from_environment()
    dataset = GoldDataset(data, "train", modalities, recipe.data.crc)
    loader = TrainLoader(
        dataset,
        Collator(modalities, views=2, seed=config.seed),
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        ranks=world,
        rank=rank,
        seed=config.seed,
        grouping=recipe.data.grouping,
        workers=recipe.data.workers,
    )
    device = start()
    filled = fill_config(ds_config, recipe.name, config, world, device.type == "cuda")
    model = build_model(recipe.model, modalities, config.seed, device.type, config.precision)
    task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, config.seed)
    describe_run(run, recipe, manifest, filled, {"task": "pretrain"})
    engine = Engine(task, filled, device, config.weight_decay)
    steps = train(engine, loader, config, run, resuming=resuming)
    if distributed.rank() == 0:
        (run / "summary.json").write_text(json.dumps({"task": "pretrain", "steps": steps}), encoding="utf-8")
    distributed.shutdown()
