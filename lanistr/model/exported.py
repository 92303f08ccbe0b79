"""A model as a folder that needs neither DeepSpeed nor pickle nor the data that it was trained on.

``config.json``: sizes, task, labels, where it comes from. ``schema.json``: what each modality looks like, with the statistics
and vocabularies fitted on the train split: the transforms of raw values. ``tokenizer.json``: where the model reads text.
``model.safetensors``: float32 parameters and buffers under the names of the task, ``model.`` before those of `Lanistr`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lanistr.config import FinetuneConfig, ModelConfig, parse_strict
from lanistr.manifest import ModalitySchema, Strict, Target
from lanistr.modalities import modalities_of
from lanistr.modalities.base import Modality

CONFIG, SCHEMA, TOKENIZER, WEIGHTS = "config.json", "schema.json", "tokenizer.json", "model.safetensors"
PICKLES = ("model.bin", "model.pt", "pytorch_model.bin")
FORMAT = 1


class ExportConfig(Strict):
    """``config.json``.

    Attributes:
        format: of the folder.
        task: what the weights were trained for last.
        model: sizes; nothing in it is downloaded.
        finetune: the head of a fine-tuned model.
        labels, target: as in the manifest.
        max_chars: texts were cut to so many characters before tokenising; None = not.
        origin: run, dataset and its content id, step, versions.
    """

    format: Literal[1]
    task: Literal["pretrain", "finetune"]
    model: ModelConfig
    finetune: FinetuneConfig | None
    labels: list[str]
    target: Target
    max_chars: int | None
    origin: dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """An export as read.

    Attributes:
        folder: where it is.
        schemas, modalities: by name, in bit order; modalities in use only.
        weights: by name.
    """

    folder: Path
    config: ExportConfig
    schemas: dict[str, ModalitySchema]
    modalities: dict[str, Modality[Any, Any]]
    weights: dict[str, Tensor]


def read_export(folder: str | Path, trust: bool = False) -> Exported:
    """Read an exported model.

    Args:
        folder: made by ``python -m lanistr export``.
        trust: also take weights that are no safetensors file. They are pickles, and unpickling a hostile one runs its
            code; even then only tensors and plain values are unpickled (``weights_only``).

    Raises:
        ValueError: no export; a file that cannot be read; weights in a pickle, and no ``trust``.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"{folder}: no {CONFIG}; this is not an exported model (python -m lanistr export RUN --out DIR makes one)"
        )
    config: ExportConfig = parse_strict(ExportConfig, _read_json(folder / CONFIG), str(folder / CONFIG))
    tree = _read_json(folder / SCHEMA)
    if not isinstance(tree, dict):
        raise ValueError(f"{folder / SCHEMA}: a map from modality to schema is expected")
    schemas = {name: parse_strict(ModalitySchema, part, f"{folder / SCHEMA}: {name}") for name, part in tree.items()}
    modalities = modalities_of(schemas, config.model.modalities, str(folder))
    return Exported(folder, config, schemas, modalities, read_weights(folder, trust))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def read_weights(folder: Path, trust: bool) -> dict[str, Tensor]:
    """The weights of an export. Raises ValueError as `read_export`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (folder / WEIGHTS).is_file():
        try:
            return load_file(str(folder / WEIGHTS))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder / WEIGHTS}: not a safetensors file: {error}") from None
    pickled = next((folder / name for name in PICKLES if (folder / name).is_file()), None)
    if pickled is None:
        raise ValueError(f"{folder}: no {WEIGHTS}")
    if not trust:
        raise ValueError(
            f"{pickled}: weights in a pickle, which can run any code; convert them to safetensors, or give trust=True "
            "(--trust) if you know where they come from"
        )
    try:
        found = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or broken pickle raises anything
        raise ValueError(f"{pickled}: not plain tensors: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{pickled}: a map from names to tensors is expected")
    return found


@torch.no_grad()
def fill(module: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Copy weights into the module: every parameter and persistent buffer, no more and no less.

    Raises:
        ValueError: a name that only one of the two has, or another shape.
    """
    kept = module.state_dict().keys()
    # A parameter that several modules share (TabNet's) has one name here, and one in a file.
    targets = dict(module.named_parameters()) | {n: b for n, b in module.named_buffers() if n in kept}
    missing, surplus = sorted(targets.keys() - weights.keys()), sorted(weights.keys() - targets.keys())
    if missing or surplus:
        raise ValueError(f"{origin}: not the model's weights: lacks {missing[:3]}, and has {surplus[:3]} too many")
    for name, target in targets.items():
        if target.shape != weights[name].shape:
            raise ValueError(
                f"{origin}: {name} has shape {tuple(weights[name].shape)}, the model {tuple(target.shape)}"
            )
        target.copy_(weights[name])
