"""The recipe: one configuration tree, filled by YAML and ``key=value`` overrides.

The recipe owns the data, model, objectives, batch, precision and schedule; ``ds_configs/*.json`` owns how states are
sharded. The blocks under ``model.modalities`` belong to the modalities (their ``Config``) and are validated there.
"""

import contextlib
import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from lanistr.manifest import Strict

SHARED = ("projections", "fusion")  # parts of the model that are no modality's own encoder


class DataConfig(Strict):
    """Which dataset, and how it is read.

    Attributes:
        path: gold dataset; None = given on the command line.
        mix: further datasets of the same schema, and how often per epoch each of their samples is seen (those of ``path``
            once): 0.1 = a random tenth, 2 = twice, with new masks. Pretraining only.
        workers: loader processes per rank (a thread where no image is decoded); 0 = in the training process.
        grouping: ``mixed`` = a plain permutation; ``stratified`` = every presence mask spread evenly over the steps;
            ``grouped`` = stratified, and samples of similar length in the same step.
        window: samples shuffled together, see `lanistr.data.plan.PlanOptions`; a remote dataset wants the samples of a
            few shards.
        crc: verify a member's crc32 the ``first`` time that a process reads it, ``always`` or ``never``.
        max_bad: corrupt or vanished samples that a rank replaces before the run ends with an error.
        cache, cache_gb: folder for the shards of remote datasets, and what it may hold.
    """

    path: str | None = None
    mix: dict[str, float] = {}
    workers: int = Field(default=0, ge=0)
    grouping: Literal["mixed", "stratified", "grouped"] = "grouped"
    window: int = Field(default=1 << 18, ge=1)
    crc: Literal["first", "always", "never"] = "first"
    max_bad: int = Field(default=100, ge=0)
    cache: str = "~/.cache/lanistr"
    cache_gb: float = Field(default=100.0, gt=0)


class ModalityConfig(Strict):
    """What the blocks of all modalities have.

    Attributes:
        absent_token: a learnt token stands in fusion for the modality where a sample lacks it (not in the paper, where an
            absent modality has no token).
    """

    absent_token: bool = False


class FusionConfig(Strict):
    """The multimodal encoder (paper: 6 layers, 12 heads, width 768, intermediate 3072, projections 2048).

    Attributes:
        pretrained: hub name or path of FLAVA's weights to start from (published code: facebook/flava-full); None = fresh.
        init_std: of the blocks' weights (0.02 as FLAVA; a narrower model wants more).
        zero_init: every block starts as the identity (not in the paper).
        pooler: an unused dense layer that the published checkpoint carries; only the ``official`` preset has it.
    """

    pretrained: str | None = None
    width: int = 768
    layers: int = 6
    heads: int = 12
    intermediate: int = 3072
    norm_eps: float = 1e-12
    init_std: float = Field(default=0.02, gt=0)
    zero_init: bool = False
    pooler: bool = False
    projector: list[int] = [2048, 2048, 2048]
    predictor: int = 512

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "FusionConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class ModelConfig(Strict):
    """The model.

    Attributes:
        attention: backend, see `lanistr.ops.attention`.
        compile: `torch.compile` the layers of BERT, ViT, the series encoder and fusion, one by one (a GPU feature: on a
            CPU it wins 2 % and takes 20 s to start).
        checkpoint_activations: keep only the inputs of these layers, and compute the rest again in backward: about a
            quarter more time, far less memory.
        modalities: by name, the block of each modality's ``Config``.
    """

    fusion: FusionConfig = FusionConfig()
    attention: Literal["auto", "reference", "sdpa_padded", "sdpa_bucketed", "torch_varlen", "flash_attn"] = "auto"
    compile: bool = False
    checkpoint_activations: bool = False
    modalities: dict[str, dict[str, Any]]


class ObjectiveConfig(Strict):
    """Equation 3.

    Attributes:
        weights: lambda per term (mlm, mim, mfm, mtm, mmm).
        similarity: SimMMM over all fusion ``tokens`` (mean per sample, then over samples) or the ``cls`` token only.
        cross: modalities each of which, alone, predicts the others (`lanistr.tasks.CrossModal`; weight ``cross``, else 1);
            none = off, as in the paper.
        decorrelation: weight of `lanistr.losses.decorrelation_loss` on the mean of a sample's fused tokens; 0 = off, as
            in the paper.
    """

    weights: dict[str, float] = {"mlm": 1.0, "mim": 1.0, "mfm": 0.01, "mtm": 0.1, "mmm": 0.5}
    similarity: Literal["tokens", "cls"] = "tokens"
    cross: list[str] = []
    decorrelation: float = Field(default=0.0, ge=0)


class OptimizerConfig(Strict):
    """Batch, precision, optimizer and schedule (AdamW; linear warm-up per step, then cosine to ``final_lr`` * lr).

    Attributes:
        global_batch: samples per optimizer step over all ranks.
        micro_batch: samples per rank and forward pass; None = global_batch / ranks (no accumulation).
        max_tokens: fusion tokens per optimizer step over all ranks, never exceeded: steps then hold as many samples as
            fit, and ``global_batch`` / ``micro_batch`` only say into how many forward passes a step is divided.
        pretrained_lr: learning rate of the unimodal encoders that start from published weights, or from a run, as a share
            of ``lr``; 1, as in the paper, moves them as fast as what is new.
        epochs, max_steps: the run ends at whichever comes first.
        warmup: share of all steps.
        clip: gradient norm.
        on_nonfinite: a step whose loss or gradient is not finite never changes the parameters; ``stop`` ends the run
            there, ``skip`` goes on (at most ten in a row). The samples of the step are in ``<run>/incidents``.
        check_every: steps between checks that all ranks have the same parameters (also at the start); None = never.
        health_every: steps between looks at the representation and the gradient (`lanistr.training.health`); None = never.
        peak_tflops: of one rank, for the utilisation in the log; None = measured with a matrix product at the first report.
        hang_after: seconds without progress after which a rank is taken to hang, and the run ends; longer than the
            longest validation or save.
        save_every: steps between checkpoints (one more at the end).
        keep: newest checkpoints kept.
        keep_best: keep the one that validated best, too.
        keep_hours: and one per so many hours, for ever.
    """

    global_batch: int = Field(default=128, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    lr: float = Field(default=1e-4, gt=0)
    pretrained_lr: float = Field(default=1.0, gt=0, le=1)
    final_lr: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.02, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: float = Field(default=0.05, ge=0, lt=1)
    clip: float = Field(default=4.0, gt=0)
    epochs: int = Field(default=20, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    check_every: int | None = Field(default=1000, ge=1)
    health_every: int | None = Field(default=50, ge=1)
    peak_tflops: float | None = Field(default=None, gt=0)
    hang_after: float = Field(default=1800.0, gt=0)
    save_every: int = Field(default=500, ge=1)
    log_every: int = Field(default=10, ge=1)
    keep: int = Field(default=2, ge=1)
    keep_best: bool = True
    keep_hours: float | None = Field(default=None, gt=0)


class PretrainConfig(OptimizerConfig):
    """Pretraining.

    Attributes:
        eval_every: steps between measurements of the terms on the val split (also at the first and last step); None =
            never.
        eval_samples: of the val split, at most.
        share: of the train split, drawn with ``seed``; a smaller share is part of a larger one (paper, Table 4).
        complete_only: only samples that have every modality (paper, Table 3: without non-parallel data).
        freeze: modalities whose encoders, which start from published weights, stay as they are and lose their masked loss.
        cache: compute the outputs of frozen encoders once, unmasked, and read them from disk in both views: True = into the
            run folder; a folder = all of train, for several runs.
    """

    eval_every: int | None = Field(default=1000, ge=1)
    eval_samples: int = Field(default=1024, ge=1)
    share: float = Field(default=1.0, gt=0, le=1)
    complete_only: bool = False
    freeze: list[str] = []
    cache: bool | str = False


class FinetuneConfig(OptimizerConfig):
    """Fine-tuning for what the dataset's target is: a class, several labels, or numbers.

    Attributes:
        freeze: what stays as it is, in eval mode: ``encoders`` = all unimodal encoders (paper), ``none``, or a list of
            modalities (their encoders), ``projections`` and ``fusion``.
        transfer: what comes from the pretraining run: ``all``, the unimodal ``encoders`` only (projections and fusion start
            afresh: for runs whose fusion has collapsed), or a list of modalities (their encoders), ``projections`` and
            ``fusion``.
        pooling: what the classifier sees: the fusion ``cls`` token (paper), the ``mean`` of a sample's fused tokens, or
            ``modalities``: [CLS] and the mean of each modality's fused tokens side by side (zeros where absent).
        unimodal: weight of a classifier per modality on the mean of its projected tokens, trained by a cross-entropy of
            its own over the samples that have the modality; the fused classifier then adds to their logits what no
            modality knows alone. 0 = off, as in the paper.
        unimodal_on: what these classifiers see: the mean of a modality's projected ``tokens``, or of its tokens ``fused``
            alone, which is what ``objective.cross`` teaches.
        hidden: width of the classifier MLP.
        dropout: in the classifier MLP.
        modality_dropout: chance per sample and epoch that a present modality is hidden in training.
        hide: share of the train and val samples whose modality is hidden for good, as if it were missing, by modality.
        metric: of `lanistr.metrics`, that chooses the best weights and when to stop; None = accuracy of a class, average
            precision of labels, RMSE of numbers.
        class_weights: weights of the classes in the loss (of several labels: of their positives): ``balanced`` = inverse to
            their frequency among the labels in use, mean 1; or a list.
        patience: evaluations on validation without improvement before stopping; None = never.
        eval_every: epochs between evaluations on validation.
        cache: compute the outputs of frozen encoders once and read them from disk: True = into the run folder; a folder = all
            labelled samples, for several runs.
        cache_views: augmented views of each train sample in the cache, of which training draws one; 1 = none is augmented.
    """

    freeze: Literal["encoders", "none"] | list[str] = "encoders"
    transfer: Literal["all", "encoders"] | list[str] = "all"
    pooling: Literal["cls", "mean", "modalities"] = "cls"
    unimodal: float = Field(default=0.0, ge=0)
    unimodal_on: Literal["tokens", "fused"] = "tokens"
    hidden: int = 256
    dropout: float = 0.0
    modality_dropout: float = Field(default=0.0, ge=0, lt=1)
    hide: dict[str, float] = {}
    metric: str | None = None
    class_weights: Literal["none", "balanced"] | list[float] = "none"
    patience: int | None = None
    eval_every: int = Field(default=1, ge=1)
    cache: bool | str = False
    cache_views: int = Field(default=1, ge=1)

    def frozen(self, modalities: Sequence[str]) -> list[str]:
        """The parts that ``freeze`` names. Raises ValueError for one that there is not."""
        if isinstance(self.freeze, str):
            return list(modalities) if self.freeze == "encoders" else []
        return _known_parts("freeze", self.freeze, modalities)

    def alone(self, modalities: Sequence[str]) -> tuple[str, ...]:
        """The modalities that are fused alone, too."""
        return tuple(modalities) if self.unimodal and self.unimodal_on == "fused" else ()

    def transferred(self, modalities: Sequence[str]) -> list[str] | None:
        """The parts that ``transfer`` names; None = all. Raises ValueError for one that there is not."""
        if isinstance(self.transfer, str):
            return list(modalities) if self.transfer == "encoders" else None
        return _known_parts("transfer", self.transfer, modalities)


def _known_parts(key: str, parts: list[str], modalities: Sequence[str]) -> list[str]:
    known = [*modalities, *SHARED]
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise ValueError(f"finetune.{key}: no part {unknown[0]!r}; there are {', '.join(known)}")
    return parts


class Recipe(Strict):
    """The whole tree."""

    name: str
    data: DataConfig = DataConfig()
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in files("lanistr").joinpath("recipes").iterdir())


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by name or path and apply ``key.path=value`` overrides (values are YAML).

    Raises:
        ValueError: no such recipe; an unknown key (names the nearest known one); a value out of range.
    """
    path = Path(name)
    if not path.is_file():
        path = Path(str(files("lanistr").joinpath("recipes", f"{name}.yaml")))
    if not path.is_file():
        raise ValueError(f"recipe {name!r}: no such file, and not one of {', '.join(recipe_names())}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    for override in overrides or []:
        _apply(tree, override)
    return parse_strict(Recipe, tree, str(path))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r}: write key=value, for example pretrain.lr=2e-4")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {parent!r} is a value, not a block")
    parsed = yaml.safe_load(value)
    if isinstance(parsed, str):  # YAML 1.1 reads 1e-4 as a string
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    node[last] = parsed


def parse_strict(cls: type[Any], tree: Any, source: str) -> Any:
    """Validate ``tree`` as the pydantic model ``cls``.

    Raises:
        ValueError: one line that names the source, the key, what is wrong, and the nearest known key.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] != "extra_forbidden":
            raise ValueError(f"{source}: {where}: {first['msg']} (got {first.get('input')!r})") from None
        known = _known_keys(cls, first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"{source}: unknown key {where!r}; {hint}") from None


def _known_keys(cls: type[Any], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        annotation = cls.model_fields[part].annotation if part in cls.model_fields else None
        if annotation is None or not hasattr(annotation, "model_fields"):
            return []
        cls = annotation
    return list(cls.model_fields)
