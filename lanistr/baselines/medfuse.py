"""MedFuse (Hayat, Geras and Shamout 2022): encoders trained one by one, then fused by an LSTM over what is present.

As in the paper's description and the authors' code: stage 1 trains the encoder of each modality alone, with a classifier
that is then discarded; stage 2 trains encoders, projections, the LSTM and a linear classifier end-to-end. An absent
modality is left out of the sequence. The images' own stage (14 findings of chest X-rays) needs labels that are not
there: it is skipped.

Shape suffixes: B samples, M modalities, D width of a projection, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from lanistr.baselines import Predict, Subset
from lanistr.baselines.late_fusion import Encoders, LateFusion
from lanistr.baselines.trainer import Classifier, fit_classifier, pick_device, seeded, with_seed
from lanistr.batch import Batch
from lanistr.config import Recipe

SKIPPED = "image"  # the kind whose stage 1 is on labels of its own


class MedFuse(Classifier):
    """An LSTM over the vectors of the present modalities; its last hidden state is classified.

    Args:
        encoders: one vector per modality.
        width: of these vectors and of the LSTM.
        classes: number of them.
        order: the sequence, as positions of the encoders.
    """

    def __init__(self, encoders: Encoders, width: int, classes: int, order: Sequence[int]):
        super().__init__(classes)
        self.encoders, self.order = encoders, list(order)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.classifier = nn.Linear(width, classes)

    def logits(self, batch: Batch) -> Tensor:
        """(B, C); a sample of which nothing is present is classified from zeros."""
        vectors_BMD = self.encoders(batch)[:, self.order]
        present_BM = self.encoders.present(batch)[:, self.order]
        return self.classifier(last_hidden(self.lstm, vectors_BMD, present_BM))


def last_hidden(lstm: nn.LSTM, vectors_BMD: Tensor, present_BM: Tensor) -> Tensor:
    """(B, D): the hidden state after the present vectors, in their order; zeros where there is none."""
    front_BM = (1 - present_BM).argsort(dim=1, stable=True)  # present ones first
    packed_BMD = vectors_BMD.gather(1, front_BM[..., None].expand_as(vectors_BMD))
    states_BMD, _ = lstm(packed_BMD)  # what comes after the last present vector cannot reach back
    lengths_B = present_BM.sum(1).long()
    last_B1D = (lengths_B - 1).clamp(min=0)[:, None, None].expand(-1, 1, states_BMD.shape[2])
    return states_BMD.gather(1, last_B1D)[:, 0] * (lengths_B > 0)[:, None]


@dataclass(frozen=True)
class MedFuseMethod:
    """Attributes: ``kinds`` of modalities that are used; None = all."""

    recipe: Recipe
    kinds: tuple[str, ...] | None

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        """See `Method`."""
        recipe, names = with_seed(self.recipe, seed), self._names(train)
        train, val = train.only(names), val.only(names)
        modalities = train.dataset.modalities
        with seeded(seed):
            encoders = Encoders.build(recipe, modalities, pick_device().type)
            order = _order([modalities[name].kind for name in names])
            task = MedFuse(encoders, recipe.model.fusion.width, train.classes, order)
            alone = {
                name: LateFusion(encoders.only(name), train.classes, recipe)
                for name in names
                if modalities[name].kind != SKIPPED
            }
        for name, single in alone.items():
            _train_alone(name, single, train, val, recipe)
        task.weigh(train, recipe.finetune)
        answer = fit_classifier(task, train, val, recipe, encoders, encoders.frozen)
        return lambda subset: answer(subset.only(names))

    def _names(self, subset: Subset) -> list[str]:
        modalities = subset.dataset.modalities
        return [name for name in modalities if self.kinds is None or modalities[name].kind in self.kinds]


def _order(kinds: Sequence[str]) -> list[int]:
    """The series first and the image last, as published; others between them."""
    place = {"timeseries": 0, SKIPPED: 2}
    return sorted(range(len(kinds)), key=lambda i: place.get(kinds[i], 1))


def _train_alone(name: str, task: LateFusion, train: Subset, val: Subset, recipe: Recipe) -> None:
    """Stage 1 of one modality, in place: on the samples that have it, if they can teach anything."""
    own_train, own_val = (_having(subset.only([name]), name) for subset in (train, val))
    if len(own_val) and len(np.unique(own_train.labels_N)) > 1:
        task.weigh(own_train, recipe.finetune)
        fit_classifier(task, own_train, own_val, recipe, task.encoders, task.encoders.frozen)


def _having(subset: Subset, name: str) -> Subset:
    bit = subset.dataset.index.bits[name]
    return Subset(subset.dataset, subset.positions_N[(subset.dataset.presence[subset.positions_N] & bit) > 0])
