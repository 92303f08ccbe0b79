"""Is the representation alive, and where does the gradient go? Measured in an ordinary training step, every few steps.

Nothing runs twice: hooks that exist for one step only read what the forward pass computes anyway. Embeddings are taken
before the fusion encoder's last layer norm: a norm after them would hide a collapse (batch norm gives a collapsed
embedding a standard deviation of 1).

Shape suffixes: N samples of all ranks, B samples of a micro-batch, K sources ([CLS] and the modalities), R packed fusion
rows of one view, D width.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lanistr.batch import Batch
from lanistr.losses import simsiam_loss
from lanistr.tasks import mean_by_modality, mean_tokens, slots_present
from lanistr.training import distributed
from lanistr.training.engine import Engine

FEWEST = 16  # samples: a rank of fewer says nothing


def effective_rank(x_ND: np.ndarray) -> float:
    """How many directions the samples really use: exp of the entropy of the centred matrix's normalised singular values.

    ``exp(-sum(p * log(p)))`` with ``p = s / sum(s)`` (Roy and Vetterli 2007, "The effective rank"). Between 1 and
    min(N - 1, D), so it is comparable at one number of samples only; 0 where all rows are equal. RankMe (Garrido et al.
    2023) is the same without centring: there a large mean hides everything else.
    """
    centred_ND = x_ND - x_ND.mean(0, dtype=np.float64)
    small_first = centred_ND if len(centred_ND) <= centred_ND.shape[1] else centred_ND.T
    squares = np.linalg.eigvalsh(small_first @ small_first.T).clip(min=0)
    singular = np.sqrt(squares)
    if not singular.sum():
        return 0.0
    p = singular[singular > 0] / singular.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def mean_std(x_ND: np.ndarray) -> float:
    """Standard deviation over the samples, mean over the features."""
    return float(x_ND.std(0, ddof=1, dtype=np.float64).mean())


def spread(x_ND: np.ndarray) -> float:
    """Share of the embeddings' mean squared length that differs between samples, in [0, 1]; 0 = all are the same.

    The standard deviation without its unit: a residual stream may grow while its samples become one.
    """
    x_ND = x_ND.astype(np.float64)
    return float(x_ND.var(0).sum() / max(np.square(x_ND).sum(1).mean(), 1e-300))


def gradient_parts(task: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters by part: each modality (encoder, projection, reconstruction), fusion, and the task's heads."""
    parts: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            path = name.split(".")
            part = "heads" if path[0] != "model" else path[2] if path[1] == "encoders" else "fusion"
            parts[part].append(parameter)
    return dict(parts)


def gradient_norms(parts: Mapping[str, Sequence[nn.Parameter]], engine: Engine) -> dict[str, float]:
    """Norm of each part's gradient, over all ranks and before clipping.

    Call it as ``before_update`` of `Engine.train_step`, on every rank: one all-reduce of a number per part.
    """
    norms = [torch.stack([_held_gradient(p).float().norm() for p in part]).norm() for part in parts.values()]
    squares = torch.stack(norms).double().square().tolist()
    if engine.stage > 0:  # each rank holds a piece
        squares = distributed.all_reduce_sum(squares, engine.device)
    return {name: square**0.5 for name, square in zip(parts, squares, strict=True)}


def _held_gradient(parameter: Any) -> Tensor:
    """The piece of a parameter's reduced gradient that this rank holds, flat."""
    if not hasattr(parameter, "_hp_mapping"):  # stage 0: all of it
        return torch.zeros(1) if parameter.grad is None else parameter.grad.flatten()
    fragment = parameter._hp_mapping
    if fragment is None:
        return torch.zeros(1, device=parameter.device)
    held = fragment.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    if held.numel() == parameter.numel():  # some configurations keep the whole of it; only the own piece counts
        own = fragment.lp_fragment_address
        return held.narrow(0, own.start, own.numel)
    return held


class Probe:
    """Hooks on a task for one step; collects embeddings and similarities of this rank's micro-batches."""

    def __init__(self, task: Any):
        self.task = task
        self.sources = ["cls", *task.model.encoders]
        self.fused_ND: list[Tensor] = []
        self.means_NKD: list[Tensor] = []
        self.present_NK: list[Tensor] = []
        self.similarity_K = torch.zeros(len(self.sources), dtype=torch.float64)
        self.weight_K = torch.zeros(len(self.sources), dtype=torch.float64)
        self.batch: Batch | None = None
        self.fused = False
        self.hooks = [
            task.register_forward_pre_hook(self._note_batch),
            task.model.fusion.norm.register_forward_pre_hook(self._note_fused),
        ]
        if getattr(task, "similarity", None) == "tokens":
            self.hooks.append(task.heads.register_forward_hook(self._note_similarity))

    def remove(self) -> None:
        """Leave the task as it was."""
        for hook in self.hooks:
            hook.remove()

    def _note_batch(self, _: nn.Module, arguments: tuple[Batch]) -> None:
        self.batch, self.fused = arguments[0], False

    @torch.no_grad()
    def _note_fused(self, _: nn.Module, arguments: tuple[Tensor]) -> None:
        assert self.batch is not None
        if self.fused:
            return  # the whole samples come first, then modalities alone
        self.fused = True
        clean_RD, modalities = arguments[0].detach().chunk(self.batch.views)[0], len(self.sources) - 1
        self.fused_ND.append(mean_tokens(clean_RD, self.batch).cpu())
        self.means_NKD.append(mean_by_modality(clean_RD, self.batch, modalities).cpu())
        self.present_NK.append(slots_present(self.batch, modalities).cpu())

    @torch.no_grad()
    def _note_similarity(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
        assert self.batch is not None
        (z_clean, z_masked), (p_clean, p_masked) = (x.detach().chunk(2) for x in output)
        weight_R = self.batch.fusion.token_weight_T.double()
        loss_R = simsiam_loss(z_clean, p_clean, z_masked, p_masked).double() * weight_R
        source_R = self.batch.fusion.slot_T % len(self.sources)
        zeros_K = weight_R.new_zeros(len(self.sources))
        self.similarity_K += zeros_K.index_add(0, source_R, loss_R).cpu()
        self.weight_K += zeros_K.index_add(0, source_R, weight_R).cpu()

    def gather(self) -> dict[str, np.ndarray]:
        """What all ranks collected. Every rank must call it."""
        own = {
            "fused": torch.cat(self.fused_ND).numpy(),
            "means": torch.cat(self.means_NKD).numpy(),
            "present": torch.cat(self.present_NK).numpy() > 0,
            "similarity": self.similarity_K.numpy(),
            "weight": self.weight_K.numpy(),
        }
        everyone = distributed.gather_objects(own)
        joined = {name: np.concatenate([rank[name] for rank in everyone]) for name in ("fused", "means", "present")}
        return joined | {name: np.sum([rank[name] for rank in everyone], axis=0) for name in ("similarity", "weight")}


def embedding_figures(found: Mapping[str, np.ndarray], sources: Sequence[str]) -> dict[str, float]:
    """``rank/``, ``std/`` and ``spread/`` of the fused embedding, [CLS] and each modality that enough samples have."""
    matrices = {"fused": found["fused"]}
    matrices |= {name: found["means"][found["present"][:, k], k] for k, name in enumerate(sources)}
    figures = {}
    for name, x_ND in matrices.items():
        if len(x_ND) >= FEWEST:
            figures |= {f"rank/{name}": effective_rank(x_ND), f"std/{name}": mean_std(x_ND)}
            figures[f"spread/{name}"] = spread(x_ND)
    return figures


def similarity_figures(found: Mapping[str, np.ndarray], sources: Sequence[str]) -> dict[str, float]:
    """SimMMM by source: ``mmm_share/``, how much of its average lies on the source's tokens, and ``mmm/``, its mean there.

    The sum of their products is the term ``mmm``.
    """
    total = found["weight"].sum()
    figures = {}
    for name, similarity, weight in zip(sources, found["similarity"], found["weight"], strict=True):
        if weight > 0:
            figures |= {f"mmm/{name}": float(similarity / weight), f"mmm_share/{name}": float(weight / total)}
    return figures


class Health:
    """Measures one step in ``every``, and the first. Every rank must call every method in every step.

    Args:
        engine: holds the task.
        every: steps between measurements; None = never.
    """

    def __init__(self, engine: Engine, every: int | None):
        self.engine, self.every = engine, every
        self.parts = gradient_parts(engine.module) if every else {}
        self.probe: Probe | None = None
        self.norms: dict[str, float] = {}
        self.seconds = 0.0

    def begin(self, step: int) -> None:
        """Before step ``step`` (0-based)."""
        self.seconds = 0.0
        if self.every and (step == 0 or (step + 1) % self.every == 0):
            self.probe = Probe(self.engine.module)

    def before_update(self) -> None:
        """Between the last backward pass of the step and the update."""
        if self.probe:
            started = time.perf_counter()
            self.norms = gradient_norms(self.parts, self.engine)
            self.seconds = time.perf_counter() - started

    def end(self) -> dict[str, float]:
        """After the step: what was measured; empty if it was not its turn (and but for the norms on other ranks than 0)."""
        if self.probe is None:
            return {}
        started = time.perf_counter()
        probe, self.probe = self.probe, None
        probe.remove()
        found = probe.gather()
        figures = {f"grad_norm/{name}": norm for name, norm in self.norms.items()}
        if distributed.rank() == 0:
            figures["health_samples"] = float(len(found["fused"]))
            figures |= embedding_figures(found, probe.sources) | similarity_figures(found, probe.sources)
        self.seconds += time.perf_counter() - started
        return figures


class CollapseWatch:
    """Notices that embeddings lose their directions, or all become the same, and says what to do about it.

    An embedding is taken to collapse where its spread is below a twentieth, or its effective rank below a quarter, of the
    largest of the run (or the rank below 2), in two measurements in a row: so at most ``2 * every`` steps after it fell.
    Measured (DECISIONS.md): a collapse to a point keeps standard deviation and rank, while the spread falls from .27 to
    .002; a collapse to a line takes the rank from 32 to between 9 and 2.
    """

    RANK, SPREAD, LEAST, PATIENCE = 0.25, 0.05, 2.0, 2

    def __init__(self, earlier: Sequence[Mapping[str, Any]] = ()):
        self.best: dict[str, tuple[float, int]] = {}
        self.strikes: dict[str, int] = defaultdict(int)
        self.said: set[str] = set()
        for row in earlier:
            self.note(row["step"], row)

    def note(self, step: int, row: Mapping[str, Any]) -> str | None:
        """Note the figures of a step; returns advice the first time that an embedding has collapsed."""
        collapsed = []
        for name in [key.partition("/")[2] for key in row if key.startswith("rank/")]:
            if self._fell(f"rank/{name}", step, row, self.RANK, self.LEAST) or self._fell(
                f"spread/{name}", step, row, self.SPREAD, 0.0
            ):
                self.strikes[name] += 1
            else:
                self.strikes[name] = 0
            if self.strikes[name] == self.PATIENCE and name not in self.said:
                self.said.add(name)
                collapsed.append(name)
        return self._advice(collapsed, row) if collapsed else None

    def _fell(self, key: str, step: int, row: Mapping[str, Any], share: float, least: float) -> bool:
        value = cast(float, row[key])
        best, _ = self.best.get(key, (0.0, 0))
        if value > best:
            self.best[key] = (value, step)
        return value < max(share * best, least)

    def _advice(self, names: Sequence[str], row: Mapping[str, Any]) -> str:
        said = []
        for name in names:
            (rank, _), (spread_then, at) = self.best[f"rank/{name}"], self.best[f"spread/{name}"]
            said.append(
                f"{name}: spread {row[f'spread/{name}']:.1%} (was {spread_then:.1%} at step {at}), effective rank "
                f"{row[f'rank/{name}']:.1f} (was {rank:.1f})"
            )
        return (
            f"embeddings collapse: {'; '.join(said)}; stop, and start anew with objective.decorrelation=0.01, a smaller "
            "objective.weights.mmm or a lower lr"
        )
