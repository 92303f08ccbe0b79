"""Parameter counts per part, without weights or data (built on the meta device)."""

from collections.abc import Mapping

import torch
from torch import nn

from lanistr.config import Recipe
from lanistr.manifest import Manifest, ModalitySchema
from lanistr.modalities import MODALITIES
from lanistr.model.lanistr import Lanistr
from lanistr.tasks import Pretrain

PUBLISHED_TOTAL = 277.16e6  # Table 5, MIMIC-IV


def count_parts(recipe: Recipe, manifest: Manifest | None = None) -> dict[str, int]:
    """Parameters of each part of the pretraining model, in the order of the forward pass.

    Args:
        recipe: sizes; ``pretrained`` names are not loaded: the sizes written in the recipe count.
        manifest: a dataset's vocabulary and columns; None = the paper's.
    """
    schemas = manifest.modalities if manifest else _paper_schemas(recipe)
    modalities = {
        name: MODALITIES[schemas[name].kind](name, {**config, **_without_weights(config)}, schemas[name])
        for name, config in recipe.model.modalities.items()
        if name in schemas
    }
    with torch.device("meta"):
        model = Lanistr(recipe.model, modalities, backend="reference")
        task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, seed=0)
    parts: dict[str, int] = {}
    for name, modality in modalities.items():
        encoder = model.encoder(name)
        parts[f"{name} encoder"] = _count(encoder.encoder)
        parts[f"{name} head ({modality.term})"] = _count(encoder.head)
        parts[f"{name} projection"] = _count(encoder.projection)
    parts["fusion encoder"] = _count(model.fusion)
    parts["SimMMM projector"] = _count(task.heads.projector)
    parts["SimMMM predictor"] = _count(task.heads.predictor)
    assert sum(parts.values()) == _count(task), "a part is missing from the count"
    return parts


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _without_weights(config: Mapping[str, object]) -> dict[str, None]:
    return {"pretrained": None} if "pretrained" in config else {}


def _paper_schemas(recipe: Recipe) -> dict[str, ModalitySchema]:
    return {name: MODALITIES[name].paper_schema() for name in recipe.model.modalities if name in MODALITIES}


def describe(recipe: Recipe, official: Recipe, manifest: Manifest | None = None) -> str:
    """A table of the parts, and their reconciliation with the published model line by line."""
    ours = count_parts(recipe, manifest)
    published = count_parts(official)
    lines = [f"recipe {recipe.name}: parameters per part", ""]
    lines += [f"  {part:<28}{n:>14,}  {n / 1e6:8.2f} M" for part, n in ours.items()]
    lines += [f"  {'total':<28}{sum(ours.values()):>14,}  {sum(ours.values()) / 1e6:8.2f} M", ""]
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
