"""Baselines that learn from unlabelled samples first, by the plain loop: LANISTR on Tab2Txt, and ALBEF.

Each pretrains once per seed, as the recipe's ``pretrain`` block says; the weights are kept as one file and fine-tuned as
its ``finetune`` block says. Encoders that the recipe freezes stay as they were published and have no masked loss of their
own; with ``pretrain.cache`` they run once per sample, for all seeds.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor, nn

from lanistr.baselines import Predict, Subset
from lanistr.baselines.albef import AlbefConfig, AlbefPretrain, PairCollator
from lanistr.baselines.tab2txt import TableAsText, View
from lanistr.baselines.trainer import fit_classifier, minimise, pick_device, seeded, with_seed
from lanistr.config import ObjectiveConfig, PretrainConfig, Recipe
from lanistr.data.loader import Collator
from lanistr.data.reader import GoldDataset, load_manifest
from lanistr.model.lanistr import Lanistr, build_model
from lanistr.tasks import Finetune, Pretrain
from lanistr.training.checkpoint import copy_weights, named_tensors, save_weights
from lanistr.training.features import cache_features
from lanistr.training.pretrain import choose_samples, published
from lanistr.training.run import train_loader
from lanistr.training.transfer import part_prefixes


class Made(NamedTuple):
    """What is pretrained, and on what.

    Attributes:
        task: with ``model`` in it.
        positions: samples that it uses; None = all.
        config: schedule.
    """

    task: nn.Module
    model: Lanistr
    collator: Collator
    positions: np.ndarray | None
    config: PretrainConfig


@dataclass(frozen=True)
class PretrainedMethod(ABC):
    """Pretraining and fine-tuning of a `Lanistr` by the plain loop.

    Attributes:
        recipe: of the comparison.
        data: what is pretrained on.
        folder: the weights of pretraining go here.
        seeds: number of pretrainings; fine-tuning with seed s starts from number s modulo ``seeds``.
    """

    recipe: Recipe
    data: Path
    folder: Path
    seeds: int

    @cached_property
    @abstractmethod
    def view(self) -> View:
        """How the method sees a dataset."""

    @abstractmethod
    def make(self, recipe: Recipe, dataset: GoldDataset) -> "Made":
        """The task of the recipe's ``pretrain`` block, whose ``freeze`` names modalities of the dataset only."""

    def tuned(self, recipe: Recipe) -> Recipe:
        """The recipe that fine-tuning follows."""
        return recipe

    def pretrain(self, seed: int) -> None:
        """See `Pretrains`."""
        self._weights(seed)

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        """See `Method`."""
        manifest = train.dataset.manifest
        if load_manifest(self.data, self.recipe.data).tokenizer != manifest.tokenizer:
            raise ValueError(
                f"{self.data} and {train.dataset.path} have different tokenizers; build one `fit_from` the other"
            )
        recipe = self.tuned(with_seed(self.view.model_recipe(manifest), seed))
        train, val = self.view.of(train), self.view.of(val)
        task = self._task(recipe, train, self._weights(seed))
        frozen = recipe.finetune.frozen(list(train.dataset.modalities))
        answer = fit_classifier(task, train, val, recipe, task.model, frozen)
        return lambda subset: answer(self.view.of(subset))

    def _task(self, recipe: Recipe, train: Subset, weights: dict[str, Tensor]) -> Finetune:
        config, modalities = recipe.finetune, train.dataset.modalities
        model = build_model(recipe.model, dict(modalities), config.seed, pick_device().type)
        task = Finetune(model, recipe.model.fusion.width, train.classes, config, config.seed)
        parts = config.transferred(list(modalities))
        kept = {n: w for n, w in weights.items() if parts is None or n.startswith(part_prefixes(task, parts))}
        copy_weights(task, kept, str(self.data), [])
        for name in modalities:  # what was pretrained learns at its share of the rate
            encoder = model.encoder(name)
            encoder.pretrained |= any(n.startswith(f"model.encoders.{name}.encoder.") for n in kept)
        task.fit(train.labels_N, train.dataset.target[train.positions_N], config.class_weights)
        task.freeze(config.frozen(list(modalities)))
        return task

    def _weights(self, seed: int) -> dict[str, Tensor]:
        """Of the pretraining for a seed, made when it is first asked for."""
        number = seed % self.seeds
        path = self.folder / f"pretrain-{number}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                model = self._pretrained(number)
                save_weights(path, {f"model.{n}": t.detach().cpu().clone() for n, t in named_tensors(model).items()})
        return load_file(str(path))

    def _pretrained(self, number: int) -> Lanistr:
        if self.recipe.data.mix:
            raise ValueError("data.mix: this method pretrains on one dataset")
        dataset, device = self.view.open(self.data, "train"), pick_device()
        recipe = self.view.model_recipe(dataset.manifest)
        frozen = published(recipe, [name for name in recipe.pretrain.freeze if name in dataset.modalities])
        config = recipe.pretrain.model_copy(update={"seed": number, "freeze": frozen})
        with seeded(number):
            task, model, collator, positions, config = self.make(
                recipe.model_copy(update={"pretrain": config}), dataset
            )
        task.to(device)
        if config.cache and frozen:
            dataset = self._cached(model, config, dataset, positions)
            collator = replace(collator, modalities=dataset.modalities)
        loader = train_loader(dataset, collator, recipe.data, config, positions)
        minimise(task, loader, config, device)
        return model

    def _cached(
        self, model: Lanistr, config: PretrainConfig, dataset: GoldDataset, positions: np.ndarray | None
    ) -> GoldDataset:
        """With the outputs of the frozen encoders in the place of their inputs; kept for seeds with the same samples."""
        wanted = np.arange(dataset.n) if positions is None else positions
        folder = self.folder / f"features-{hashlib.sha256(wanted.tobytes()).hexdigest()[:8]}"
        config = config.model_copy(update={"cache": str(folder), "precision": "float32"})
        found = cache_features(
            model, config, config.freeze, {"train": dataset}, {"train": wanted}, folder, pick_device(),
            self.recipe.data.workers,
        )  # fmt: skip
        return found["train"]


class Tab2TxtMethod(PretrainedMethod):
    """LANISTR with the tables as words before the text, and no tabular encoder."""

    @cached_property
    def view(self) -> View:
        """All modalities, the tables as words."""
        return View(self.recipe, None, tables=True).widened(self.data)

    def make(self, recipe: Recipe, dataset: GoldDataset) -> Made:
        """LANISTR's own pretraining."""
        config, objective = recipe.pretrain, self._objective(recipe, dataset)
        model = build_model(recipe.model, dict(dataset.modalities), config.seed, pick_device().type)
        task = Pretrain(model, dict(dataset.modalities), recipe.model.fusion, objective, config.seed, config.freeze)
        collator = Collator(dataset.modalities, views=2, seed=config.seed, alone=tuple(objective.cross))
        return Made(task, model, collator, choose_samples(dataset, config), config)

    @staticmethod
    def _objective(recipe: Recipe, dataset: GoldDataset) -> ObjectiveConfig:
        """The recipe's: the tables, which are no modality here, predict nothing and are not predicted."""
        crossing = [name for name in recipe.objective.cross if name in dataset.modalities]
        return recipe.objective.model_copy(update={"cross": crossing if len(crossing) > 1 else []})


@dataclass(frozen=True)
class AlbefMethod(PretrainedMethod):
    """ALBEF on images and texts. Attributes: ``tables`` = before the text stand the tables as words."""

    tables: bool = False
    albef: ClassVar[AlbefConfig] = AlbefConfig()

    @cached_property
    def view(self) -> View:
        """The first text and the first image."""
        return View(self.recipe, ("text", "image"), self.tables, single=True).widened(self.data)

    def make(self, recipe: Recipe, dataset: GoldDataset) -> Made:
        """Over all samples that have a text; where the text is frozen, over those that have an image, too.

        Without masked language modelling the others teach nothing. As many steps of as many samples are taken all the
        same, so that contrast has its negatives: over the pairs again and again.
        """
        config, names = recipe.pretrain, {m.kind: name for name, m in dataset.modalities.items()}
        if names.keys() != {"text", "image"}:
            raise ValueError(f"{self.data}: ALBEF pretrains on text and image; there is {', '.join(names)}")
        bits = dataset.index.bits
        spelt = [bits[table.name] for table in dataset.tables] if isinstance(dataset, TableAsText) else []
        has_text_N = (dataset.presence & sum(spelt, bits[names["text"]])) > 0
        has_image_N = (dataset.presence & bits[names["image"]]) > 0
        chosen_N = choose_samples(dataset, config)
        positions_N = np.arange(dataset.n) if chosen_N is None else chosen_N
        positions_N = positions_N[has_text_N[positions_N]]
        pairs = int(has_image_N[positions_N].sum())
        if pairs < 2:
            raise ValueError(f"{self.data}: ALBEF needs image-text pairs; there are {pairs}")
        masked, steps = names["text"] not in config.freeze, max(1, len(positions_N) // config.global_batch)
        if not masked:
            positions_N = positions_N[has_image_N[positions_N]]
            batch, total = min(config.global_batch, pairs), steps * config.epochs
            again = {"max_steps": min(total, config.max_steps or total), "epochs": math.ceil(total / (pairs // batch))}
            config = config.model_copy(update={"global_batch": batch, "micro_batch": None, "max_tokens": None} | again)
        task = AlbefPretrain(
            recipe.model, dataset.modalities, self.albef, pairs, steps, bits, pick_device().type, config.freeze
        )
        collator = PairCollator(
            dataset.modalities, views=1 + masked, seed=config.seed, text=names["text"], image=names["image"]
        )
        return Made(task, task.model, collator, positions_N, config)

    def tuned(self, recipe: Recipe) -> Recipe:
        """What pretraining trains is trained, as published; the recipe says what of the fusion encoder is classified."""
        frozen = [name for name in recipe.pretrain.freeze if name in recipe.model.modalities]
        changes = {"freeze": frozen, "transfer": "all", "unimodal": 0.0}
        return recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update=changes)})
