"""Fine-tuning for classification on a number of labels, from a pretraining run or from scratch."""

import json
import logging
from pathlib import Path

import numpy as np
import torch

from lanistr.batch import to_device
from lanistr.config import FinetuneConfig, Recipe
from lanistr.data.loader import Collator, eval_batches
from lanistr.data.reader import GoldDataset, load_manifest, load_tokenizer_bytes, open_split
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from lanistr.model.lanistr import build_model
from lanistr.tasks import Finetune
from lanistr.training import distributed
from lanistr.training.checkpoint import WEIGHTS, save_weights
from lanistr.training.ds_config import fill_config
from lanistr.training.engine import Engine, start
from lanistr.training.loop import train
from lanistr.training.run import Resume, check_resume, check_run, describe_checkpoint, describe_run, train_loader
from lanistr.training.transfer import pretrained_weights, refuse_untrained, transfer

logger = logging.getLogger(__name__)
EVAL_BATCH = 64


def predict(
    task: Finetune, dataset: GoldDataset, positions: np.ndarray, device: torch.device, workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and labels of the positions, in their order, on every rank.

    Returns:
        (n, classes) float64 and (n,) int64.
    """
    ranks, rank = distributed.world_size(), distributed.rank()
    collator = Collator(dataset.modalities, views=1, seed=0)
    task.eval()
    mine = [
        task.predict(to_device(batch, device)).double().cpu().numpy()
        for batch in eval_batches(
            dataset, collator, batch=EVAL_BATCH, ranks=ranks, rank=rank, workers=workers, positions=positions
        )
    ]
    task.train()
    everyone = distributed.gather_objects(mine)
    rows = np.concatenate([everyone[r][step] for step in range(len(mine)) for r in range(ranks)])
    return rows[: len(positions)], dataset.label[positions]


class BestKeeper:
    """Validates every few epochs, keeps the best weights, and says when to stop.

    The weights go to ``<run>/best/weights.safetensors``; their step and accuracy into ``best.json`` beside it.
    """

    def __init__(self, engine: Engine, val: GoldDataset, config: FinetuneConfig, steps_per_epoch: int, run: Path):
        self.engine, self.val, self.config, self.run = engine, val, config, run
        self.every = config.eval_every * steps_per_epoch
        self.positions = val.labelled(None, 0)
        self.best, self.since_best = self._saved(), 0

    def _saved(self) -> tuple[float, float]:
        path = self.run / "best" / "best.json"
        if not path.is_file():
            return (-1.0, float("-inf"))
        saved = json.loads(path.read_text(encoding="utf-8"))
        return (saved["accuracy"], -saved["loss"])

    def after_step(self, step: int) -> bool:
        """Validate if it is time; True when patience has run out."""
        if step % self.every:
            return False
        distributed.merge_batch_norm(self.engine.module)
        probabilities, labels = predict(self.engine.module, self.val, self.positions, self.engine.device)
        accuracy = float((probabilities.argmax(1) == labels).mean())
        loss = float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12)).mean())
        if (accuracy, -loss) > self.best:
            self.best, self.since_best = (accuracy, -loss), 0
            weights = self.engine.full_weights()
            if distributed.rank() == 0:
                save_weights(self.run / "best" / WEIGHTS, weights)
                best = {"step": step, "accuracy": accuracy, "loss": loss}
                (self.run / "best" / "best.json").write_text(json.dumps(best), encoding="utf-8")
        else:
            self.since_best += 1
        if distributed.rank() == 0:
            logger.info("step %d: validation accuracy %.4f (best %.4f)", step, accuracy, self.best[0])
        return self.config.patience is not None and self.since_best >= self.config.patience


def finetune(
    recipe: Recipe,
    data: Path,
    run: Path,
    ds_config: Path,
    *,
    source: Path | None,
    labels: int | None,
    resume: Resume | None,
) -> None:
    """Fine-tune on ``labels`` labelled train samples (None = all).

    Args:
        recipe: its ``finetune`` block counts.
        data: gold dataset.
        run: where the run goes.
        ds_config: ZeRO configuration.
        source: pretraining run; None = from scratch, then nothing may be frozen.
        labels: how many.
        resume: go on from the newest checkpoint, if there is one.

    Raises:
        ValueError: anything that a user can put right.
    """
    config = recipe.finetune
    if source is None and config.freeze == "encoders":
        _refuse_scratch(recipe)
    manifest = load_manifest(data, recipe.data)
    if not manifest.labels:
        raise ValueError(f"{data}: dataset {manifest.name} has no labels")
    modalities = make_modalities(manifest, recipe.model.modalities)
    resuming = check_run(run, resume)
    if source:
        pretrained_weights(source)  # fails before anything heavy starts
    rank, world, _ = distributed.world_from_environment()
    dataset = open_split(data, "train", modalities, recipe.data)
    collator = Collator(modalities, views=1, seed=config.seed, modality_dropout=config.modality_dropout)
    loader = train_loader(dataset, collator, recipe.data, config, dataset.labelled(labels, config.seed))
    val = open_split(data, "val", modalities, recipe.data)
    about = describe_checkpoint(recipe, "finetune", manifest)
    if resuming:
        check_resume(run, about, loader.state(0), resume == "force")
    device = start()
    filled = fill_config(ds_config, recipe.name, config, world)
    task = make_task(recipe, manifest, device.type, config.precision)
    report = transfer(task, source, modalities, config.transfer == "encoders") if source else None
    if report and rank == 0:
        logger.info("%s: %s", source, report)
    if config.freeze == "encoders":
        refuse_untrained(task, report)
        task.freeze()
    extra = {
        "task": "finetune",
        "from": str(source) if source else None,
        "n_labels": labels or loader.plan.samples,
    }
    describe_run(run, recipe, manifest, filled, extra, load_tokenizer_bytes(data, recipe.data, manifest))
    engine = Engine(task, filled, device, config.weight_decay)
    keeper = BestKeeper(engine, val, config, loader.steps_per_epoch, run)
    steps = train(engine, loader, config, run, resuming=resuming, about=about, after_step=keeper.after_step)
    if rank == 0:
        summary = {"task": "finetune", "steps": steps, "val_accuracy": keeper.best[0]}
        (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    distributed.shutdown()


def _refuse_scratch(recipe: Recipe) -> None:
    untrained = [name for name, block in recipe.model.modalities.items() if not block.get("pretrained")]
    if untrained:
        raise ValueError(
            "--from none with finetune.freeze=encoders would freeze encoders that were never trained: "
            f"{', '.join(untrained)}; give finetune.freeze=none, or a run"
        )


def make_task(recipe: Recipe, manifest: Manifest, device: str, precision: str = "float32") -> Finetune:
    """A fresh fine-tuning task for a dataset."""
    modalities = make_modalities(manifest, recipe.model.modalities)
    model = build_model(recipe.model, modalities, recipe.finetune.seed, device, precision)
    width, classes = recipe.model.fusion.width, len(manifest.labels)
    return Finetune(model, width, classes, recipe.finetune, recipe.finetune.seed)
