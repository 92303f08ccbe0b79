"""Validation during fine-tuning: the best weights, and when to stop."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lanistr.batch import to_device
from lanistr.config import FinetuneConfig
from lanistr.data.loader import Collator, eval_batches
from lanistr.data.reader import GoldDataset
from lanistr.metrics import METRICS, find_metric, goodness
from lanistr.tasks import Finetune
from lanistr.training import distributed
from lanistr.training.checkpoint import WEIGHTS, save_weights
from lanistr.training.durable import write_durably
from lanistr.training.engine import Engine
from lanistr.training.monitor import cut_back

logger = logging.getLogger(__name__)
EVAL_BATCH = 64
TIE = {"class": "log_loss", "multilabel": "brier", "regression": "mae"}  # decides between equal values of the metric


def predict(
    task: Finetune, dataset: GoldDataset, positions: np.ndarray, device: torch.device, workers: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and truth of the positions, in their order, on every rank.

    Returns:
        (n, classes, labels or columns) float64, see `Finetune.predict`; and the class ids (n,) int64 or the numbers
        (n, L) float32.
    """
    ranks, rank = distributed.world_size(), distributed.rank()
    collator = Collator(dataset.modalities, views=1, seed=0, alone=task.alone)
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
    truth = dataset.target if dataset.target.shape[1] else dataset.label
    return rows[: len(positions)], truth[positions]


class BestKeeper:
    """Validates every few epochs, keeps the best weights, and says when to stop.

    All metrics go to ``<run>/validation.jsonl``, the weights to ``<run>/best/weights.safetensors``, their step and metrics
    into ``best.json`` beside them.

    Args:
        engine: holds the task.
        val: the split.
        config: metric, patience and how often.
        steps_per_epoch: of training.
        run: run folder.

    Raises:
        ValueError: no labelled sample in the split, or a metric that this kind of target has not.
    """

    def __init__(self, engine: Engine, val: GoldDataset, config: FinetuneConfig, steps_per_epoch: int, run: Path):
        self.engine, self.val, self.config, self.run = engine, val, config, run
        self.target = val.manifest.target
        self.metric = find_metric(self.target, config.metric)
        self.every = config.eval_every * steps_per_epoch
        self.positions = val.labelled(None, 0)
        if not len(self.positions):
            raise ValueError(f"{val.path}: split val has no labelled sample to choose the best weights by")
        self.path = run / "validation.jsonl"
        self.rows: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        """Call once, with the steps done: a resumed run goes on with the rows up to there."""
        if distributed.rank() == 0:
            if step == 0:
                self.path.unlink(missing_ok=True)
            cut_back(self.path, step)
        distributed.barrier()
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        self.rows = [json.loads(line) for line in lines]

    def _good(self, row: dict[str, Any]) -> tuple[float, float]:
        return goodness(self.metric, row[self.metric]), goodness(TIE[self.target], row[TIE[self.target]])

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the best weights: the first of equally good ones."""
        return max(self.rows, key=self._good) if self.rows else None

    def after_step(self, step: int) -> bool:
        """Validate if it is time; True when patience has run out."""
        if step % self.every:
            return False
        distributed.merge_batch_norm(self.engine.module)
        outputs, truth = predict(self.engine.module, self.val, self.positions, self.engine.device)
        row = {"step": step, **{name: metric(outputs, truth) for name, metric in METRICS[self.target].items()}}
        self.rows.append(row)
        best = self.best
        assert best is not None
        if best is row:
            self._save(row)
        if distributed.rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            said = f"validation {self.metric} {row[self.metric]:.4f} (best {best[self.metric]:.4f})"
            logger.info("step %d: %s", step, said)
        since_best = len(self.rows) - 1 - self.rows.index(best)
        return self.config.patience is not None and since_best >= self.config.patience

    def score(self, step: int) -> float | None:
        """The metric after a step, more is better; None = not measured there."""
        return self._good(self.rows[-1])[0] if self.rows and self.rows[-1]["step"] == step else None

    def _save(self, row: dict[str, Any]) -> None:
        weights = self.engine.full_weights()
        if distributed.rank() == 0:
            save_weights(self.run / "best" / WEIGHTS, weights)
            write_durably(self.run / "best" / "best.json", json.dumps({"metric": self.metric, **row}))
