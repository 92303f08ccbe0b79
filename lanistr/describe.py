"""Parameters, FLOPs and tokens per part, without weights or data (built and run on the meta device)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lanistr.batch import to_device
from lanistr.config import Recipe
from lanistr.data.loader import Collator
from lanistr.data.samples import Sample
from lanistr.manifest import Manifest, ModalitySchema
from lanistr.modalities import MODALITIES
from lanistr.training.flops import meta_pretrain

PUBLISHED_TOTAL = 277.16e6  # Table 5, MIMIC-IV
CROSS = "cross-modal predictors"


def count_parts(recipe: Recipe, manifest: Manifest | None = None) -> dict[str, int]:
    """Parameters of each part of the pretraining model, in the order of the forward pass.

    Args:
        recipe: sizes; ``pretrained`` names are not loaded: the sizes written in the recipe count.
        manifest: a dataset's vocabulary and columns; None = the paper's.
    """
    task, modalities = meta_pretrain(recipe, schemas_of(recipe, manifest))
    model = task.model
    parts: dict[str, int] = {}
    for name, modality in modalities.items():
        encoder = model.encoder(name)
        parts[f"{name} encoder"] = _count(encoder.encoder)
        parts[f"{name} head ({modality.term})"] = _count(encoder.head)
        parts[f"{name} projection"] = _count(encoder.projection)
    parts["fusion encoder"] = _count(model.fusion) + _count(model.absent)
    parts["SimMMM projector"] = _count(task.heads.projector)
    parts["SimMMM predictor"] = _count(task.heads.predictor)
    if task.cross:
        parts[CROSS] = _count(task.cross)
    assert sum(parts.values()) == _count(task), "a part is missing from the count"
    return parts


@dataclass(frozen=True)
class Work:
    """What one part does for one sample in a pretraining step.

    Attributes:
        tokens: rows of both views that it processes; 0 where rows mean nothing.
        flops: floating-point operations forward (backward is about twice as many).
    """

    tokens: int
    flops: int


def count_work(recipe: Recipe, manifest: Manifest | None = None) -> dict[str, Work]:
    """Work of each part for a complete sample of the largest size, both views, by torch's own counter.

    Args:
        recipe: sizes.
        manifest: a dataset's schema; None = the paper's.
    """
    task, modalities = meta_pretrain(recipe, schemas_of(recipe, manifest))
    contents = {name: modality.example() for name, modality in modalities.items()}
    sample = Sample(key="example", presence=0, label=-1, contents=contents)
    collator = Collator(modalities, views=2, seed=0, alone=tuple(recipe.objective.cross))
    batch = to_device(collator([sample], [1.0], epoch=0), "meta")
    parts: dict[str, Work] = {}
    for name, modality in modalities.items():
        encoder, inputs = task.model.encoder(name), batch.inputs[name]
        hidden, flops = _run(lambda e=encoder, i=inputs: e.encode(i))
        parts[f"{name} encoder"] = Work(len(hidden), flops)
        _, flops = _run(lambda e=encoder, h=hidden, i=inputs: e.reconstruct(h, i))
        parts[f"{name} head ({modality.term})"] = Work(0, flops)
        tokens, flops = _run(lambda e=encoder, h=hidden, i=inputs: e.project(h, i))
        parts[f"{name} projection"] = Work(len(tokens), flops)
    with FlopCounterMode(display=False) as counter:
        task(batch)
    rows = len(batch.fusion.gather_T)
    compared = rows if recipe.objective.similarity == "tokens" else len(batch.fusion.cls_S)
    for part, module, tokens in (
        ("fusion encoder", "model.fusion", rows),
        ("SimMMM projector", "heads.projector", compared),
        ("SimMMM predictor", "heads.predictor", compared),
    ):
        parts[part] = Work(tokens, sum(counter.get_flop_counts()[f"Pretrain.{module}"].values()))
    if task.cross:
        linears = [f"Pretrain.cross.predictors.{pair}" for pair in task.cross.predictors]
        parts[CROSS] = Work(0, sum(sum(counter.get_flop_counts()[linear].values()) for linear in linears))
    return parts


def _run(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    with FlopCounterMode(display=False) as counter:
        result = function()
    return result, counter.get_total_flops()


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def schemas_of(recipe: Recipe, manifest: Manifest | None) -> dict[str, ModalitySchema]:
    """A dataset's, or the paper's."""
    if manifest:
        return manifest.modalities
    return {name: MODALITIES[name].paper_schema() for name in recipe.model.modalities if name in MODALITIES}


def describe(recipe: Recipe, official: Recipe, manifest: Manifest | None = None) -> str:
    """A table of the parts (parameters, tokens, FLOPs), and their reconciliation with the published model."""
    ours = count_parts(recipe, manifest)
    work = count_work(recipe, manifest)
    published = count_parts(official)
    lines = [
        f"recipe {recipe.name}: a complete sample of the largest size in one pretraining step, both views",
        "",
        f"  {'part':<28}{'parameters':>14}{'million':>10}{'tokens':>8}{'GFLOP forward':>15}",
    ]
    for part, n in ours.items():
        tokens = work[part].tokens or ""
        lines.append(f"  {part:<28}{n:>14,}{n / 1e6:>10.2f}{tokens:>8}{work[part].flops / 1e9:>15.3f}")
    flops = sum(w.flops for w in work.values())
    lines += [
        f"  {'total':<28}{sum(ours.values()):>14,}{sum(ours.values()) / 1e6:>10.2f}{'':>8}{flops / 1e9:>15.3f}",
        "",
    ]
    total = sum(published.values())
    lines += [
        f"against preset official ({total / 1e6:.2f} M; the paper's Table 5 says {PUBLISHED_TOTAL / 1e6:.2f} M)",
        "",
        f"  {'part':<28}{'official':>14}{'ours':>14}{'difference':>14}",
    ]
    for part in [*published, *(p for p in ours if p not in published)]:
        a, b = published.get(part, 0), ours.get(part, 0)
        lines.append(f"  {part:<28}{a:>14,}{b:>14,}{b - a:>+14,}")
    lines.append(f"  {'total':<28}{total:>14,}{sum(ours.values()):>14,}{sum(ours.values()) - total:>+14,}")
    lines += ["", *_explain(recipe, official)]
    return "\n".join(lines)


def _explain(recipe: Recipe, official: Recipe) -> list[str]:
    """Which settings make the difference, one line each."""
    lines = []
    ours, theirs = recipe.model.fusion.model_dump(), official.model.fusion.model_dump()
    lines += [f"  fusion.{key}: official {theirs[key]}, ours {ours[key]}" for key in ours if ours[key] != theirs[key]]
    names = list(dict.fromkeys([*official.model.modalities, *recipe.model.modalities]))
    for name in names:
        a, b = official.model.modalities.get(name), recipe.model.modalities.get(name)
        if a is None or b is None:
            lines.append(f"  {name}: only in {'ours' if a is None else 'official'}")
            continue
        for key in dict.fromkeys([*a, *b]):
            if key != "pretrained" and a.get(key) != b.get(key):
                lines.append(f"  {name}.{key}: official {a.get(key, 'default')}, ours {b.get(key, 'default')}")
    return lines and ["settings that differ:", *lines]
