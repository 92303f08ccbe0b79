"""LANISTR as it comes out of pretraining, nothing trained any more: logistic regression on what it says of a sample.

Shape suffixes: N samples, F features, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from lanistr.baselines import Predict, Subset
from lanistr.baselines.features import cardinalities, features_of, labelled_rows
from lanistr.baselines.ours import Pretraining
from lanistr.baselines.simple import Dense, probabilities
from lanistr.config import Recipe
from lanistr.data.hiding import HidingDataset
from lanistr.data.reader import GoldDataset
from lanistr.metrics import log_loss
from lanistr.model.lanistr import Lanistr

STRENGTHS = (3.0, 10.0, 30.0)  # of scikit-learn's C; blocks are chosen with the middle one
ADDED = 0.5  # scale of all blocks but the first


@dataclass(frozen=True)
class FrozenLanistr:
    """Logistic regression on embeddings beside a table's own columns.

    The embeddings: the mean hidden state of each modality's encoder, the mean of the fused tokens, and the same of each
    modality alone. Which of these blocks count, and the penalty, are chosen on validation, by log loss: accuracy on a few
    hundred samples cannot tell that many candidates apart.

    Attributes:
        recipe: of the model.
        source: the pretraining runs; None = as the recipe starts it (published weights where it names some).
    """

    recipe: Recipe
    source: Pretraining | Path | None

    def pretrain(self, seed: int) -> None:
        """See `Pretrains`."""
        if isinstance(self.source, Pretraining):
            self.source.run(seed)

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        """See `Method`."""
        run = self.source.run(seed) if isinstance(self.source, Pretraining) else self.source
        names = tuple(name for name in train.dataset.modalities if name in self.recipe.model.modalities)
        model = _load(self.recipe.model_dump_json(), _narrow(train.dataset, names), run)
        tables = any(train.dataset.modalities[name].kind == "tabular" for name in names)
        dense = Dense(features_of(train), cardinalities(train.dataset), ("table",)) if tables else None

        units = {
            name: Unit.of(block_ND) for name, block_ND in embed_labelled(model, _narrow(train.dataset, names)).items()
        }

        def blocks(subset: Subset) -> Mapping[str, np.ndarray]:
            embedded, rows_N = embed_labelled(model, _narrow(subset.dataset, names)), labelled_rows(subset)
            found = {name: units[name](block_ND[rows_N]) for name, block_ND in embedded.items()}
            return found | ({"columns": dense(features_of(subset))} if dense else {})

        return best_of_blocks(blocks, train, val)


def best_of_blocks(blocks: Callable[[Subset], Mapping[str, np.ndarray]], train: Subset, val: Subset) -> Predict:
    """Logistic regression on some of the blocks of features.

    Validation adds the block that lowers the log loss most, as long as one does, and then chooses the penalty.

    Args:
        blocks: (N, F) by name, of a subset.
        train, val: subsets.
    """
    if len(np.unique(train.labels_N)) < 2:
        raise ValueError(f"{len(train)} labels are all of one class: nothing to learn from")
    found = {id(subset): blocks(subset) for subset in (train, val)}

    def fit(scales: Mapping[str, float], strengths: Sequence[float]) -> _Fitted:
        joined = [_join(found[id(subset)], scales) for subset in (train, val)]
        return _fit(joined[0], joined[1], scales, strengths, train, val)

    best: _Fitted | None = None
    while True:
        scales = best.scales if best else {}
        left = [name for name in found[id(train)] if name not in scales]
        tried = [fit({**scales, name: ADDED if scales else 1.0}, STRENGTHS[1:2]) for name in left]
        better = min(tried, key=lambda fitted: fitted.loss, default=None)
        if better is None or (best and better.loss >= best.loss):
            break
        best = better
    assert best is not None, "there is a block"
    chosen = fit(best.scales, STRENGTHS)
    return lambda subset: chosen.answer(_join(blocks(subset), chosen.scales))


@dataclass(frozen=True)
class _Fitted:
    """A model: its blocks and their scales, its log loss on validation, and what it answers."""

    scales: Mapping[str, float]
    loss: float
    answer: Callable[[np.ndarray], np.ndarray]


def _join(blocks: Mapping[str, np.ndarray], scales: Mapping[str, float]) -> np.ndarray:
    return np.concatenate([scale * blocks[name] for name, scale in scales.items()], axis=1)


def _fit(
    train_NF: np.ndarray,
    val_NF: np.ndarray,
    scales: Mapping[str, float],
    strengths: Sequence[float],
    train: Subset,
    val: Subset,
) -> _Fitted:
    """With the best of the penalties."""
    from sklearn.linear_model import LogisticRegression

    # A quadratic penalty does not see a rotation, and few samples span few directions.
    _, _, axes_KF = np.linalg.svd(train_NF, full_matrices=False)
    models = [LogisticRegression(C=c, max_iter=2000).fit(train_NF @ axes_KF.T, train.labels_N) for c in strengths]
    losses = [log_loss(probabilities(m, val_NF @ axes_KF.T, val.classes), val.labels_N) for m in models]
    best = models[int(np.argmin(losses))]
    return _Fitted(scales, min(losses), lambda data_NF: probabilities(best, data_NF @ axes_KF.T, train.classes))


@lru_cache(maxsize=12)
def _narrow(dataset: GoldDataset, names: tuple[str, ...]) -> GoldDataset:
    """Without the other modalities; always the same one, so that caches find it."""
    return Subset(dataset, np.zeros(0, dtype=np.int64)).only(names).dataset


@lru_cache(maxsize=4)
def _load(recipe: str, train: GoldDataset, run: Path | None) -> Lanistr:
    """The pretrained model of a run, or a fresh one (always the same: what it says is nearly all published weights')."""
    from lanistr.training.finetune import make_task
    from lanistr.training.transfer import transfer

    parsed = Recipe.model_validate_json(recipe)
    task = make_task(parsed, train.manifest, "cpu")
    if run:
        transfer(task, run, train.modalities)
    return task.model.eval()


@lru_cache(maxsize=12)  # three splits of each model
def embed_labelled(model: Lanistr, dataset: GoldDataset) -> dict[str, np.ndarray]:
    """(N, D) per block of all labelled samples of a split; NaN where a modality is absent."""
    from lanistr.evaluation.embed import embed

    positions_N, names = dataset.labelled(None, 0), list(model.encoders)
    whole = embed(model, dataset, positions_N)
    found = {**whole.modalities, "fused": whole.fused_ND}
    for name in names:
        others = {other: 1.0 for other in names if other != name}
        alone = embed(model, HidingDataset(dataset, others, 0), positions_N).fused_ND
        found[f"{name}_alone"] = np.where(whole.present[name][:, None], alone, np.nan)
    return found


@dataclass(frozen=True)
class Unit:
    """Standardises a block by samples of train.

    Attributes:
        mean_D: of the rows.
        length: root mean square of the rows less the mean.
    """

    mean_D: np.ndarray
    length: float

    @classmethod
    def of(cls, block_ND: np.ndarray) -> "Unit":
        """As these rows are; those of NaN do not count."""
        present_ND = block_ND[~np.isnan(block_ND).any(1)].astype(np.float64)
        mean_D = present_ND.mean(0) if len(present_ND) else np.zeros(block_ND.shape[1])
        length = float(np.sqrt(((present_ND - mean_D) ** 2).sum(1).mean())) if len(present_ND) else 0.0
        return cls(mean_D, length or 1.0)

    def __call__(self, block_ND: np.ndarray) -> np.ndarray:
        """Rows less the mean, of length 1 on average; zeros for rows of NaN."""
        return np.nan_to_num((block_ND - self.mean_D) / self.length).astype(np.float32)
