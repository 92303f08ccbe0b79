"""Tasks: Batch -> totals of named terms (contract 4).

A task returns the *sum* of each loss over what was predicted; how much that was is in ``batch.counts``, known before
forward. The engine divides by the count of the whole optimizer step, over all ranks and micro-batches.

Shape suffixes: B samples, T packed fusion rows of one view, D width.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from lanistr.batch import Batch, FusionIndex
from lanistr.config import FinetuneConfig, FusionConfig, ObjectiveConfig
from lanistr.losses import cross_modal_loss, decorrelation_loss, simsiam_loss
from lanistr.manifest import Target
from lanistr.modalities.base import Modality
from lanistr.model.fusion import SimSiamHeads
from lanistr.model.lanistr import Lanistr


class Pretrain(nn.Module):
    """Unimodal masked losses and SimMMM (paper eq. 3); a frozen encoder has no masked loss.

    Attributes:
        weights: lambda per term.
    """

    def __init__(
        self,
        model: Lanistr,
        modalities: dict[str, Modality[Any, Any]],
        fusion: FusionConfig,
        objective: ObjectiveConfig,
        seed: int,
        frozen: Sequence[str] = (),
    ):
        super().__init__()
        self.model = model
        self.similarity = objective.similarity
        self.frozen = freeze_parts(model, frozen)
        for name in frozen:
            model.encoder(name).head = nn.Identity()
        self.term_of = {name: modality.term for name, modality in modalities.items() if name not in frozen}
        self.weights = dict(objective.weights)
        if objective.decorrelation:
            self.weights["decorrelation"] = objective.decorrelation
        missing = [term for term in [*self.term_of.values(), "mmm"] if term not in self.weights]
        if missing:
            raise ValueError(f"objective.weights: no weight for {', '.join(missing)} (0 switches a term off)")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.heads = SimSiamHeads(fusion)
            self.cross = CrossModal(model, objective.cross) if objective.cross else None
        if self.cross:
            self.weights.setdefault("cross", 1.0)

    def train(self, mode: bool = True) -> "Pretrain":
        """As `nn.Module.train`, but frozen parts stay in eval mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Totals (float32 scalars) of every term, zero-weight terms included."""
        assert batch.views == 2, "pretraining needs a clean and a masked view"
        pools, hidden = self.model.pools(batch)
        fused_TD = self.model.fusion(self.model.fusion.assemble(pools, batch.fusion), batch.fusion)
        totals: dict[str, Tensor] = {}
        for name, term in self.term_of.items():
            total = self.model.encoder(name).reconstruct(hidden[name], batch.inputs[name])
            totals[term] = totals[term] + total if term in totals else total
        totals["mmm"] = self._similarity(fused_TD, batch)
        if "decorrelation" in self.weights:
            clean_BD = mean_tokens(fused_TD.chunk(2)[0], batch)
            totals["decorrelation"] = decorrelation_loss(clean_BD) * batch.counts["decorrelation"]
        if self.cross:
            totals["cross"] = self.cross(self.model, pools, hidden, batch)
        return totals

    def _similarity(self, fused_TD: Tensor, batch: Batch) -> Tensor:
        if self.similarity == "cls":
            fused_TD = fused_TD.index_select(0, batch.fusion.cls_S)
            weights = batch.weights_B
        else:
            weights = batch.fusion.token_weight_T
        z, p = self.heads(fused_TD)
        (z_clean, z_masked), (p_clean, p_masked) = z.chunk(2), p.chunk(2)
        return (simsiam_loss(z_clean, p_clean, z_masked, p_masked) * weights).sum()


class CrossModal(nn.Module):
    """Each modality alone, through the fusion encoder, predicts the mean hidden state of each other (not in the paper).

    SimMMM compares a sample with itself less a few masked units: what two modalities share is hardly needed for it. Here
    nothing else helps. A linear layer per ordered pair.
    """

    def __init__(self, model: Lanistr, names: Sequence[str]):
        super().__init__()
        unknown = [name for name in names if name not in model.encoders]
        if unknown or len(set(names)) < 2:
            raise ValueError(f"objective.cross: {list(names)}; give two or more of {', '.join(model.encoders)}")
        self.names = [name for name in model.encoders if name in names]
        projections = {name: cast(nn.Linear, model.encoder(name).projection) for name in self.names}
        self.predictors = nn.ModuleDict(
            {f"{a}_{b}": nn.Linear(projections[a].out_features, projections[b].in_features) for a, b in self._pairs()}
        )

    def _pairs(self) -> list[tuple[str, str]]:
        return list(itertools.permutations(self.names, 2))

    def forward(self, model: Lanistr, pools: list[Tensor], hidden: dict[str, Tensor], batch: Batch) -> Tensor:
        """Total over the ordered pairs of present modalities of every sample of weight > 0."""
        starts = dict(zip(model.encoders, itertools.accumulate(map(len, pools), initial=1), strict=False))  # 0 = [CLS]
        alone_BD, mean_BH, there_B = {}, {}, {}
        for name in self.names:
            alone_BD[name] = mean_alone(model, pools, batch, name)
            rows_RH = model.entering(name, hidden, batch)
            mean_BH[name], there_B[name] = self._target(rows_RH, starts[name], batch, batch.alone[name])
        losses = [
            cross_modal_loss(self.predictors[f"{a}_{b}"](alone_BD[a]), mean_BH[b], there_B[a] * there_B[b])
            for a, b in self._pairs()
        ]
        return torch.stack(losses).sum()

    def _target(self, rows_RH: Tensor, start: int, batch: Batch, index: FusionIndex) -> tuple[Tensor, Tensor]:
        """Mean of a modality's rows in each sample, and 1 where there are any and the sample counts."""
        slots = 1 + len(batch.inputs)
        weight_T = index.slot_weight_T * (index.slot_T % slots > 0)  # slot 0 is [CLS]
        sample_T = index.slot_T // slots
        rows_TH = rows_RH.detach().float().index_select(0, (index.gather_T - start).clamp(min=0))
        sums_BH = rows_TH.new_zeros(batch.size, rows_TH.shape[1]).index_add(0, sample_T, rows_TH * weight_T[:, None])
        there_B = weight_T.new_zeros(batch.size).index_add(0, sample_T, weight_T).round() * (batch.weights_B > 0)
        return sums_BH, there_B


def mean_tokens(fused_TD: Tensor, batch: Batch) -> Tensor:
    """Mean of each sample's fused tokens in one view, (B, D)."""
    return mean_of_samples(fused_TD, batch.fusion, batch.size)


def mean_of_samples(fused_TD: Tensor, index: FusionIndex, size: int) -> Tensor:
    """The same of rows that another index of the batch assembled."""
    lengths_B = index.layout.cu_seqlens.diff()[:size]
    samples_B = torch.arange(size, device=fused_TD.device)
    sample_T = torch.repeat_interleave(samples_B, lengths_B, output_size=len(fused_TD))
    weighted_TD = fused_TD.float() * index.token_weight_T[:, None]
    return weighted_TD.new_zeros(size, fused_TD.shape[1]).index_add(0, sample_T, weighted_TD)


def mean_alone(model: Lanistr, pools: list[Tensor], batch: Batch, name: str) -> Tensor:
    """Mean of [CLS] and one modality's tokens, fused without the others, (B, D); needs `Collator.alone`."""
    index = batch.alone[name]
    fused_TD = model.fusion(model.fusion.assemble(pools, index), index)
    return mean_of_samples(fused_TD, index, batch.size).to(fused_TD.dtype)


def mean_by_modality(x_TD: Tensor, batch: Batch, modalities: int) -> Tensor:
    """[CLS] and the mean of each modality's rows in one view, (B, 1 + modalities, D) float32; absent = zeros."""
    slots = batch.size * (1 + modalities)
    weighted_TD = x_TD.float() * batch.fusion.slot_weight_T[:, None]
    means = weighted_TD.new_zeros(slots, x_TD.shape[1]).index_add(0, batch.fusion.slot_T, weighted_TD)
    return means.view(batch.size, 1 + modalities, -1)


def slots_present(batch: Batch, modalities: int) -> Tensor:
    """(B, 1 + modalities) float32: 1 where the sample has tokens of the source ([CLS] first: always)."""
    present = batch.weights_B.new_zeros(batch.size * (1 + modalities))
    return present.index_fill(0, batch.fusion.slot_T, 1.0).view(batch.size, -1)


class Finetune(nn.Module):
    """An MLP on the fusion [CLS], or on means of the fused tokens, for a class, several labels, or numbers.

    Attributes:
        weights: ``cls`` 1, and ``cls_<modality>`` where each modality has a classifier of its own.
        alone: modalities that batches must hold alone, too (`Collator.alone`).
        prior: logits of a sample of which nothing is known: the shares of the labels in use, one more of each counted.
    """

    class_weights: Tensor
    prior: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self, model: Lanistr, width: int, outputs: int, config: FinetuneConfig, seed: int, target: Target = "class"
    ):
        super().__init__()
        model.drop_heads()
        self.model, self.target = model, target
        self.pooling = config.pooling
        self.weights = {"cls": 1.0}
        self.frozen: list[nn.Module] = []
        self.alone = config.alone(list(model.encoders))
        sources = 1 + len(model.encoders) if config.pooling == "modalities" else 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 2)
            self.classifier = make_classifier(width * sources, outputs, config)
            self.unimodal = nn.ModuleDict()
            if config.unimodal:
                self.unimodal.update({name: make_classifier(width, outputs, config) for name in model.encoders})
                self.weights |= {f"cls_{name}": config.unimodal for name in model.encoders}
        self.register_buffer("class_weights", torch.ones(outputs), persistent=False)
        self.register_buffer("prior", torch.zeros(outputs))  # travels with the weights
        if target == "regression":  # learnt in units of the labels' deviation, which travels with the weights
            self.register_buffer("target_mean", torch.zeros(outputs))
            self.register_buffer("target_std", torch.ones(outputs))

    @torch.no_grad()
    def fit(self, labels_N: np.ndarray, targets_NL: np.ndarray, how: Literal["none", "balanced"] | list[float]) -> None:
        """Take the prior and class weights, or mean and deviation of numbers, from the labelled samples in use.

        Raises:
            ValueError: class weights for numbers, or not one per class.
        """
        if self.target == "regression":
            if how != "none":
                raise ValueError("finetune.class_weights: the target is a regression, it has no classes")
            std_L = np.nan_to_num(np.nanstd(targets_NL, axis=0))
            self.target_mean.copy_(torch.from_numpy(np.nan_to_num(np.nanmean(targets_NL, axis=0))))
            self.target_std.copy_(torch.from_numpy(np.where(std_L > 0, std_L, 1)))
        elif how != "none":
            found = balanced_weights(labels_N, targets_NL, len(self.class_weights)) if how == "balanced" else how
            if len(found) != len(self.class_weights):
                raise ValueError(f"finetune.class_weights: {len(found)} weights for {len(self.class_weights)} classes")
            self.class_weights.copy_(torch.tensor(found))
        if self.target == "class":
            counts_C = np.bincount(labels_N, minlength=len(self.prior)) + 1
            self.prior.copy_(torch.from_numpy(np.log(counts_C / counts_C.sum())))
        elif self.target == "multilabel":
            yes_L, no_L = ((targets_NL == value).sum(0) + 1 for value in (1, 0))
            self.prior.copy_(torch.from_numpy(np.log(yes_L / no_L)))

    def freeze(self, parts: Sequence[str] | None = None) -> None:
        """Freeze parts (see `FinetuneConfig`; None = the unimodal encoders) and keep them in eval mode from now on."""
        self.frozen += freeze_parts(self.model, list(self.model.encoders) if parts is None else parts)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Finetune":
        """As `nn.Module.train`, but frozen parts stay in eval mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def _pool(self, fused_TD: Tensor, batch: Batch) -> Tensor:
        if self.pooling == "cls":
            return fused_TD.index_select(0, batch.fusion.cls_S)
        if self.pooling == "mean":
            return mean_tokens(fused_TD, batch).to(fused_TD.dtype)
        return mean_by_modality(fused_TD, batch, len(self.model.encoders)).flatten(1).to(fused_TD.dtype)

    def logits(self, batch: Batch) -> dict[str, Tensor]:
        """(B, classes) float32 per term: ``cls``, the whole model's, and of each modality with a classifier of its own.

        A modality's are zero for the samples that lack it, so that ``cls`` is the sum of what is present.
        """
        pools, _ = self.model.pools(batch)
        tokens_TD = self.model.fusion.assemble(pools, batch.fusion)
        fused_TD = self.model.fusion(tokens_TD, batch.fusion)
        logits = {"cls": self.classifier(self._pool(fused_TD, batch)).float()}
        if self.unimodal:
            means = self._own_means(pools, tokens_TD, batch)
            present_BM = slots_present(batch, len(self.unimodal))[:, 1:]
            for i, (name, classifier) in enumerate(self.unimodal.items()):
                own_BC = classifier(means[i]).float() * present_BM[:, i, None]
                logits[f"cls_{name}"] = own_BC
                # Each modality is taught by its own term alone; the fused classifier learns what is left.
                logits["cls"] = logits["cls"] + own_BC.detach()
        return logits

    def _own_means(self, pools: list[Tensor], tokens_TD: Tensor, batch: Batch) -> Sequence[Tensor]:
        """(B, D) per modality: what its own classifier sees."""
        if self.alone:
            return [mean_alone(self.model, pools, batch, name) for name in self.alone]
        return mean_by_modality(tokens_TD, batch, len(self.unimodal))[:, 1:].to(tokens_TD.dtype).unbind(1)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Total loss over labelled samples of weight > 0, per term over those that have the modality."""
        labelled_B = (batch.labels_B >= 0).float() * batch.weights_B
        totals: dict[str, Tensor] = {}
        present_BM = slots_present(batch, len(self.model.encoders))
        for i, (term, logits_BC) in enumerate(self.logits(batch).items()):
            losses_B = self._losses(logits_BC, batch)
            totals[term] = (losses_B * labelled_B * present_BM[:, i]).sum()  # source 0, [CLS], is in every sample
        return totals

    def _losses(self, logits_BL: Tensor, batch: Batch) -> Tensor:
        """(B,) cross-entropy of a class; of labels and numbers the mean over them, an unknown one counting zero."""
        if self.target == "class":
            labels_B = batch.labels_B.clamp(min=0)
            losses_B = nn.functional.cross_entropy(logits_BL, labels_B, reduction="none")
            return losses_B * self.class_weights[labels_B]
        assert batch.targets_BL is not None, "the dataset's target is a class"
        known_BL = batch.targets_BL.isfinite()
        truth_BL = batch.targets_BL.nan_to_num()
        if self.target == "multilabel":
            losses_BL = nn.functional.binary_cross_entropy_with_logits(
                logits_BL, truth_BL, reduction="none", pos_weight=self.class_weights
            )
        else:
            losses_BL = (logits_BL - (truth_BL - self.target_mean) / self.target_std).square()
        return (losses_BL * known_BL).mean(1)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """(B, outputs) float32: probabilities of the classes or labels, or numbers in the target's own unit.

        A sample without any modality is answered by the prior: [CLS] alone was never trained to say it.
        """
        known_B1 = slots_present(batch, len(self.model.encoders))[:, 1:].any(1, keepdim=True)
        logits_BL = torch.where(known_B1, self.logits(batch)["cls"], self.prior)
        if self.target == "regression":
            return logits_BL * self.target_std + self.target_mean
        return logits_BL.softmax(-1) if self.target == "class" else logits_BL.sigmoid()


def freeze_parts(model: Lanistr, parts: Sequence[str]) -> list[nn.Module]:
    """Freeze parts (see `FinetuneConfig`); returns the modules, which the task must keep in eval mode."""
    modules: list[nn.Module] = []
    for part in parts:
        if part == "fusion":
            modules.append(model.fusion)
        elif part == "projections":
            modules += [model.encoder(name).projection for name in model.encoders]
        else:
            modules.append(model.encoder(part).encoder)
    for module in modules:
        module.requires_grad_(False)
    return modules


def balanced_weights(labels_N: np.ndarray, targets_NL: np.ndarray, classes: int) -> list[float]:
    """N / (classes * n of the class); of several labels negatives / positives. One that does not occur weighs 1."""
    if targets_NL.shape[1]:
        positive, negative = (targets_NL == 1).sum(0), (targets_NL == 0).sum(0)
        return np.where((positive > 0) & (negative > 0), negative / np.maximum(positive, 1), 1.0).tolist()
    counts = np.bincount(labels_N, minlength=classes)
    return np.where(counts > 0, len(labels_N) / (classes * np.maximum(counts, 1)), 1.0).tolist()


def make_classifier(width: int, outputs: int, config: FinetuneConfig) -> nn.Sequential:
    """The MLP module (paper, section "Experiments")."""
    return nn.Sequential(
        nn.Linear(width, config.hidden),
        nn.GELU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden, outputs),
    )
