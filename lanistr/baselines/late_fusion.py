"""LateFusion, the paper's simplest baseline: an encoder and a projection per modality, one MLP on all of them.

Paper, section "Baselines": modality-specific encoders, a projection layer for each, all embeddings concatenated, a
classifier head; everything trained end-to-end on the labelled data, from pretrained BERT and ViT where the recipe
names them. A published encoder that the recipe's pretraining leaves as it is stays so here.

Shape suffixes: B samples, M modalities, D width of a projection, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lanistr.baselines import Predict, Subset
from lanistr.baselines.trainer import Classifier, fit_classifier, pick_device, seeded, with_seed
from lanistr.batch import Batch
from lanistr.config import Recipe
from lanistr.modalities.base import Modality, ModalityEncoder
from lanistr.modalities.encoded import Encoded
from lanistr.ops.attention import resolve_backend
from lanistr.tasks import make_classifier, mean_by_modality, slots_present
from lanistr.training.pretrain import published


class Encoders(nn.Module):
    """Encoders, each with its projection, and no fusion: a vector per modality of a sample.

    Args:
        encoders: by name; those of all modalities in use.
        frozen: names of those that are not trained; their projections are.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], frozen: Sequence[str] = ()):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.frozen = [name for name in self.encoders if name in frozen]
        for name in self.frozen:
            self.encoder(name).encoder.requires_grad_(False)

    @classmethod
    def build(cls, recipe: Recipe, modalities: Mapping[str, Modality[Any, Any]], device: str) -> "Encoders":
        """Fresh ones of the recipe's sizes, for that kind of device, without the heads of pretraining."""
        config = recipe.model
        backend = resolve_backend(config.attention, device)
        built = {name: modality.build(config.fusion.width, backend) for name, modality in modalities.items()}
        for encoder in built.values():
            encoder.head = nn.Identity()
        return cls(built, published(recipe, [name for name in built if name in recipe.pretrain.freeze]))

    def encoder(self, name: str) -> ModalityEncoder[Any]:
        """The encoder of one modality."""
        return cast(ModalityEncoder[Any], self.encoders[name])

    def only(self, name: str) -> "Encoders":
        """The same encoder, alone."""
        return Encoders({name: self.encoders[name]}, self.frozen)

    def train(self, mode: bool = True) -> "Encoders":
        """As `nn.Module.train`, but frozen encoders stay in eval mode."""
        super().train(mode)
        for name in self.frozen:
            self.encoder(name).encoder.eval()
        return self

    def forward(self, batch: Batch) -> Tensor:
        """(B, M, D) float32: the mean of a modality's projected tokens; zeros where it is absent."""
        pools = []
        for name in self.encoders:
            encoder, inputs = self.encoder(name), batch.inputs[name]
            if isinstance(inputs, Encoded):
                pools.append(encoder.projection(inputs.rows_RH))
            else:
                pools.append(encoder.project(encoder.encode(inputs), inputs))
        nothing_1D = pools[0].new_zeros(1, pools[0].shape[1])  # stands where LANISTR has its [CLS]
        # Behind the pools, what LANISTR may have learnt for absent modalities (`absent_token`): here nothing, too.
        pool_TD = torch.cat([nothing_1D, *pools, nothing_1D.expand(len(pools), -1)])
        tokens_TD = pool_TD.index_select(0, batch.fusion.gather_T)
        return mean_by_modality(tokens_TD, batch, len(pools))[:, 1:]

    def present(self, batch: Batch) -> Tensor:
        """(B, M) float32: 1 where a sample has the modality."""
        return slots_present(batch, len(self.encoders))[:, 1:]


class LateFusion(Classifier):
    """Concatenation and an MLP."""

    def __init__(self, encoders: Encoders, classes: int, recipe: Recipe):
        super().__init__(classes)
        self.encoders = encoders
        width = recipe.model.fusion.width * len(encoders.encoders)
        self.classifier = make_classifier(width, classes, recipe.finetune)

    def logits(self, batch: Batch) -> Tensor:
        """(B, C)."""
        return self.classifier(self.encoders(batch).flatten(1))


@dataclass(frozen=True)
class LateFusionMethod:
    """Trained on all labelled samples; an absent modality is a vector of zeros."""

    recipe: Recipe

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        """See `Method`."""
        recipe = with_seed(self.recipe, seed)
        with seeded(seed):
            encoders = Encoders.build(recipe, train.dataset.modalities, pick_device().type)
            task = LateFusion(encoders, train.classes, recipe)
        task.weigh(train, recipe.finetune)
        return fit_classifier(task, train, val, recipe, encoders, encoders.frozen)
