"""One plain torch loop for every neural baseline: AdamW, warm-up and cosine, early stopping on validation.

What is trained is read by the same loader and collator, and follows the same blocks of the recipe, as LANISTR under
DeepSpeed; one process, float32. Contract 4 holds: a task returns sums, the counts come from the batches of a step.

Shape suffixes: B samples, C classes.
"""

import contextlib
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from lanistr.baselines import Predict, Subset
from lanistr.batch import Batch, to_device
from lanistr.config import DataConfig, FinetuneConfig, OptimizerConfig, Recipe
from lanistr.data.loader import Collator, TrainLoader, eval_batches
from lanistr.metrics import METRICS, find_metric, goodness
from lanistr.tasks import balanced_weights
from lanistr.training.best import EVAL_BATCH, TIE
from lanistr.training.engine import parameter_groups
from lanistr.training.features import Encodes, cache_features
from lanistr.training.loop import total_steps
from lanistr.training.run import train_loader
from lanistr.training.schedule import lr_at
from lanistr.training.transfer import pretrained_encoders


class Task(Protocol):
    """What is minimised: a module whose call gives the total of each loss term."""

    weights: dict[str, float]

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Totals, to be divided by ``batch.counts``."""
        ...


class Answers(Protocol):
    """A classification task.

    Attributes:
        alone: see `Collator.alone`.
    """

    alone: tuple[str, ...]

    def predict(self, batch: Batch) -> Tensor:
        """(B, C) probabilities."""
        ...


class Classifier(nn.Module, ABC):
    """A model with logits, its cross-entropy, and its probabilities.

    Args:
        classes: number of them.
    """

    class_weights: Tensor
    alone = ()

    def __init__(self, classes: int):
        super().__init__()
        self.weights = {"cls": 1.0}
        self.register_buffer("class_weights", torch.ones(classes), persistent=False)

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """(B, C)."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy summed over the labelled samples of weight > 0."""
        labelled_B = (batch.labels_B >= 0).float() * batch.weights_B
        labels_B = batch.labels_B.clamp(min=0)
        losses_B = nn.functional.cross_entropy(self.logits(batch).float(), labels_B, reduction="none")
        return {"cls": (losses_B * self.class_weights[labels_B] * labelled_B).sum()}

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """See `Answers`."""
        return self.logits(batch).float().softmax(-1)

    def weigh(self, train: Subset, config: FinetuneConfig) -> None:
        """Take the recipe's class weights. Raises ValueError where there is not one per class."""
        if config.class_weights == "none":
            return
        nothing = np.zeros((len(train), 0))
        balanced = config.class_weights == "balanced"
        found = balanced_weights(train.labels_N, nothing, train.classes) if balanced else config.class_weights
        if len(found) != train.classes:
            raise ValueError(f"finetune.class_weights: {len(found)} weights for {train.classes} classes")
        self.class_weights.copy_(torch.tensor(found))


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block that draws from torch's generator as if the seed had just been set, and leaves it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe, fine-tuned with another seed."""
    return recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"seed": seed})})


def minimise(
    task: nn.Module,
    loader: TrainLoader,
    config: OptimizerConfig,
    device: torch.device,
    after_step: Callable[[int], bool] | None = None,
) -> None:
    """Train to the end of the schedule.

    Args:
        task: a `Task`, on the device.
        loader: of this process.
        config: schedule, optimizer, seed of dropout.
        device: of the task.
        after_step: called with the number of steps done; True ends the training.

    Raises:
        ValueError: a gradient that is not finite.
    """
    shares = dict.fromkeys(pretrained_encoders(task), config.pretrained_lr)
    groups = parameter_groups(task, config.weight_decay, shares)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = total_steps(loader, config)
    task.train()
    for step, micro_batches in enumerate(loader.steps(0, total, device)):
        torch.manual_seed(hash((config.seed, step, 0)))
        for group in optimizer.param_groups:
            group["lr"] = group["lr_share"] * lr_at(step, total, config.lr, config.warmup, config.final_lr)
        optimizer.zero_grad()
        _backward(task, micro_batches, device)
        norm = float(nn.utils.clip_grad_norm_(parameters, config.clip))
        if not math.isfinite(norm):
            raise ValueError(f"step {step}: gradient norm {norm}; a smaller learning rate?")
        optimizer.step()
        if after_step and after_step(step + 1):
            break


def _backward(task: nn.Module, micro_batches: Sequence[Batch], device: torch.device) -> None:
    """Gradient of the weighted sum of the terms, each a mean over all micro-batches (contract 4)."""
    weights: dict[str, float] = task.weights  # pyright: ignore[reportAssignmentType]
    counts = {name: sum(batch.counts.get(name, 0.0) for batch in micro_batches) for name in weights}
    for batch in micro_batches:
        totals: dict[str, Tensor] = task(to_device(batch, device))
        loss = torch.stack([weights[name] * total / max(counts[name], 1) for name, total in totals.items()]).sum()
        loss.backward()


class Keeper:
    """Validates every few epochs and keeps the best weights in memory, as `lanistr.training.best.BestKeeper` on disk.

    Args:
        task: `Answers`, on the device.
        val: labelled samples.
        config: metric, patience and how often.
        steps_per_epoch: of training.
        device: of the task.
    """

    def __init__(
        self, task: nn.Module, val: Subset, config: FinetuneConfig, steps_per_epoch: int, device: torch.device
    ):
        self.task, self.val, self.device = task, val, device
        self.every, self.patience = config.eval_every * steps_per_epoch, config.patience
        self.names = [find_metric("class", config.metric), TIE["class"]]
        self.best: tuple[float, ...] | None = None
        self.weights: dict[str, Tensor] = {}
        self.since = 0

    def after_step(self, step: int) -> bool:
        """Validate if it is time; True when patience has run out."""
        if step % self.every:
            return False
        outputs_NC = predict(self.task, self.val, self.device)
        found = tuple(goodness(name, METRICS["class"][name](outputs_NC, self.val.labels_N)) for name in self.names)
        self.since += 1
        if self.best is None or found > self.best:
            self.best, self.since = found, 0
            self.weights = {name: tensor.clone() for name, tensor in self.task.state_dict().items()}
        return self.patience is not None and self.since >= self.patience

    def restore(self) -> None:
        """Put the best weights back. Raises ValueError where training ended before the first validation."""
        if self.best is None:
            raise ValueError("training never validated; finetune.eval_every is longer than the run")
        self.task.load_state_dict(self.weights)


def predict(task: nn.Module, subset: Subset, device: torch.device) -> np.ndarray:
    """(N, C) float64 probabilities of the samples of a subset, in their order."""
    collator = Collator(subset.dataset.modalities, views=1, seed=0, alone=cast(Answers, task).alone)
    batches = eval_batches(
        subset.dataset, collator, batch=EVAL_BATCH, ranks=1, rank=0, positions=subset.positions_N
    )  # fmt: skip
    training = task.training
    task.eval()
    rows = [task.predict(to_device(batch, device)).double().cpu().numpy() for batch in batches]  # pyright: ignore
    task.train(training)
    return np.concatenate(rows)[: len(subset)]


def fit_classifier(
    task: nn.Module, train: Subset, val: Subset, recipe: Recipe, encoders: Encodes, frozen: Sequence[str]
) -> Predict:
    """Train on labelled samples as the recipe's ``finetune`` block says; the best weights on validation answer.

    Args:
        task: a `Task` that `Answers`.
        train: fewer samples than a global batch are one batch.
        val: the same modalities.
        recipe: its seed orders the samples; with ``finetune.cache`` frozen encoders run once per sample.
        encoders: of the task.
        frozen: names of those that are not trained.

    Raises:
        ValueError: as `minimise` and `Keeper` do.
    """
    config = recipe.finetune
    config = config.model_copy(update={"global_batch": min(config.global_batch, len(train))})
    if config.micro_batch and config.global_batch % config.micro_batch:
        config = config.model_copy(update={"micro_batch": None})
    device = pick_device()
    task.to(device)
    with tempfile.TemporaryDirectory() as folder:
        if config.cache and any(name in frozen for name in encoders.encoders):
            train, val = _cached(encoders, frozen, train, val, recipe, Path(folder))
        _train(task, train, val, config, recipe.data, device)
    return lambda subset: predict(task, subset, device)


def _train(
    task: nn.Module, train: Subset, val: Subset, config: FinetuneConfig, data: DataConfig, device: torch.device
) -> None:
    alone = cast(Answers, task).alone
    collator = Collator(train.dataset.modalities, 1, config.seed, config.modality_dropout, alone)
    loader = train_loader(train.dataset, collator, data, config, train.positions_N)
    keeper = Keeper(task, val, config, loader.steps_per_epoch, device)
    minimise(task, loader, config, device, keeper.after_step)
    keeper.restore()


def _cached(
    encoders: Encodes, frozen: Sequence[str], train: Subset, val: Subset, recipe: Recipe, folder: Path
) -> tuple[Subset, Subset]:
    """The same samples, with the outputs of the frozen encoders in the place of their inputs."""
    config = recipe.finetune.model_copy(update={"cache": True, "precision": "float32"})
    splits = {"train": train.dataset, "val": val.dataset}
    wanted = {"train": train.positions_N, "val": val.positions_N}
    found = cache_features(encoders, config, frozen, splits, wanted, folder, pick_device(), recipe.data.workers)
    return Subset(found["train"], train.positions_N), Subset(found["val"], val.positions_N)
