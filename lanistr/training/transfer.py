"""From pretraining to fine-tuning: everything is carried over, TabNet and its embeddings included."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from lanistr.manifest import Manifest, ModalitySchema
from lanistr.modalities.base import Modality, ModalityEncoder
from lanistr.modalities.loading import LoadReport
from lanistr.tasks import Finetune
from lanistr.training.checkpoint import WEIGHTS, copy_weights, find_latest, named_tensors

SCHEMA = "schema.json"


def save_schema(run: Path, manifest: Manifest) -> None:
    """Keep what the tensors of the run stand for beside them."""
    schemas = {name: schema.model_dump() for name, schema in manifest.modalities.items()}
    (run / SCHEMA).write_text(json.dumps(schemas), encoding="utf-8")


def pretrained_weights(source: Path) -> Path:
    """The newest weights of a run. Raises ValueError where there are none."""
    found = find_latest(source)
    if found is None:
        raise ValueError(f"--from {source}: no complete checkpoint there; give a pretraining run, or none")
    return found.folder / WEIGHTS


def transfer(
    task: Finetune, source: Path, modalities: dict[str, Modality[Any, Any]], parts: Sequence[str] | None = None
) -> LoadReport:
    """Fill the task from a pretraining run, also one on other columns, categories or channels.

    Args:
        task: to fill.
        source: run folder.
        modalities: of the new dataset.
        parts: of the model, see `FinetuneConfig.transferred`; the others stay fresh. None = all.

    Raises:
        ValueError: no checkpoint; sizes that differ elsewhere than in columns, categories or channels.
    """
    path = pretrained_weights(source)
    stored = load_file(str(path))
    prefixes = {name: f"model.encoders.{name}.encoder." for name in task.model.encoders}
    if parts is not None:
        wanted = part_prefixes(task, parts)
        stored = {name: tensor for name, tensor in stored.items() if name.startswith(wanted)}
    schemas = json.loads((source / SCHEMA).read_text(encoding="utf-8")) if (source / SCHEMA).is_file() else {}
    notes: list[str] = []
    for name in prefixes.keys() & schemas.keys():
        prefix = prefixes[name]
        part = {n.removeprefix(prefix): stored.pop(n) for n in list(stored) if n.startswith(prefix)}
        if not part:
            continue
        own = named_tensors(task.model.encoder(name).encoder)
        adapted, found = modalities[name].adapt(part, own, ModalitySchema.model_validate(schemas[name]))
        stored |= {prefix + n: tensor for n, tensor in adapted.items()}
        notes += found
    return copy_weights(task, stored, str(path), sorted(notes))


def part_prefixes(task: Finetune, parts: Sequence[str]) -> tuple[str, ...]:
    """How the names of the parts' tensors begin: modalities (their encoders), ``projections`` and ``fusion``."""
    names = list(task.model.encoders)
    shared = {"projections": [f"model.encoders.{name}.projection." for name in names], "fusion": ["model.fusion."]}
    return tuple(prefix for part in parts for prefix in shared.get(part, [f"model.encoders.{part}.encoder."]))


def pretrained_encoders(task: nn.Module, report: LoadReport | None = None) -> list[str]:
    """Prefixes of the parameters of the unimodal encoders that start from a run or from published weights."""
    loaded = report.loaded if report else []
    encoders = {f"{name}.encoder.": m for name, m in task.named_modules() if isinstance(m, ModalityEncoder)}
    return [prefix for prefix, e in encoders.items() if e.pretrained or any(n.startswith(prefix) for n in loaded)]


def refuse_untrained(task: Finetune, report: LoadReport | None, parts: Sequence[str]) -> None:
    """Raises ValueError where freezing would keep a part at its random start for ever."""
    loaded = report.loaded if report else []
    untrained = [
        part
        for part in parts
        if not (part in task.model.encoders and task.model.encoder(part).pretrained)
        and not all(any(n.startswith(prefix) for n in loaded) for prefix in part_prefixes(task, [part]))
    ]
    if untrained:
        raise ValueError(
            f"finetune.freeze would freeze {', '.join(untrained)}, which was never trained: give --from a run "
            "that has it, model.modalities.<name>.pretrained, or finetune.freeze=none"
        )
