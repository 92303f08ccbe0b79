"""The grid: every method on the same draws of labels, one cell after the other."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np

from lanistr.baselines import Method, Pretrains, Subset
from lanistr.comparison.cells import Answer, Cell, CellStore
from lanistr.config import Recipe
from lanistr.data.reader import GoldDataset, load_manifest, open_split
from lanistr.metrics import Metric
from lanistr.modalities import make_modalities
from lanistr.training import distributed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """The labelled samples that every method sees."""

    train: GoldDataset
    val: Subset
    test: Subset

    @classmethod
    def open(cls, recipe: Recipe, data: Path) -> "Splits":
        """All labelled samples of val and test, with the modalities that dataset and recipe share.

        Raises:
            ValueError: no such dataset; one whose target is no class; a split without labels.
        """
        manifest = load_manifest(data, recipe.data)
        if manifest.target != "class" or not manifest.labels:
            kind = manifest.target if manifest.labels else "absent"
            raise ValueError(f"{data}: comparisons are of classes, the target of {manifest.name} is {kind}")
        modalities = make_modalities(manifest, recipe.model.modalities)
        train, val, test = (open_split(data, split, modalities, recipe.data) for split in ("train", "val", "test"))
        held_out = [Subset(split, split.labelled(None, 0)) for split in (val, test)]
        for subset in held_out:
            if not len(subset):
                raise ValueError(f"{data}: split {subset.dataset.split!r} has no labelled samples")
        return cls(train, *held_out)

    def draw(self, labels: int | None, seed: int) -> Subset:
        """Train samples whose labels a cell may use. Raises ValueError for more than there are."""
        return Subset(self.train, self.train.labelled(labels, seed))


def answer(cell: Cell, method: Method, splits: Splits) -> Answer:
    """Train and predict."""
    if isinstance(method, Pretrains):
        method.pretrain(cell.seed)
    train = splits.draw(cell.labels, cell.seed)
    begin = time.perf_counter()
    predict = method.fit(train, splits.val, cell.seed)
    probabilities_NC = predict(splits.test)
    seconds = time.perf_counter() - begin
    assert probabilities_NC.shape == (len(splits.test), splits.test.classes), probabilities_NC.shape
    if not np.isfinite(probabilities_NC).all():
        raise ValueError("probabilities that are not finite; a smaller learning rate?")
    return Answer(probabilities_NC, seconds)


def run_grid(
    methods: Mapping[str, Method],
    labels: Sequence[int | None],
    seeds: int,
    splits: Splits,
    store: CellStore,
    metric: Metric,
    table_only: bool = False,
) -> list[Cell]:
    """Answer every cell that is not answered yet.

    Cells that another process works on are left to it: several processes may share a store.

    Args:
        methods: by name.
        labels: counts, None = all.
        seeds: 0 to seeds - 1.
        splits: of the dataset.
        store: keeps the answers.
        metric: for the log.
        table_only: answer none.

    Returns:
        All cells of the grid.

    Raises:
        ValueError: more labels than there are; what a method raises, with the cell's name.
    """
    for count in labels:
        splits.draw(count, 0)
    cells = [Cell(name, count, seed) for seed in range(seeds) for count in labels for name in methods]
    todo = [cell for cell in cells if store.load(cell) is None]
    if table_only:
        return cells
    logger.info("%d cells, %d of them done before", len(cells), len(cells) - len(todo))
    begin, joined = time.perf_counter(), distributed.is_joined()
    try:
        for done, cell in enumerate(todo, 1):
            with store.claim(cell) as mine:
                if not mine:
                    continue
                try:
                    found = answer(cell, methods[cell.method], splits)
                except ValueError as error:
                    raise ValueError(f"cell {cell.name}: {error}") from None
                store.save(cell, found)
            left = timedelta(seconds=round((time.perf_counter() - begin) / done * (len(todo) - done)))
            value = metric(found.probabilities_NC, splits.test.labels_N)
            logger.info(
                "%d/%d  %-28s %.4f  %6.1f s  about %s left", done, len(todo), cell.name, value, found.seconds, left
            )
    finally:
        if not joined:
            distributed.shutdown()  # what trainings of this grid have joined
    return cells
