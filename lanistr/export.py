"""A run -> a folder with all that prediction needs; see `lanistr.model.exported`."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lanistr.config import ModelConfig, Recipe, load_recipe
from lanistr.data.reader import load_manifest, load_tokenizer_bytes
from lanistr.manifest import ModalitySchema
from lanistr.modalities import modalities_of
from lanistr.model.exported import CONFIG, FORMAT, SCHEMA, TOKENIZER, WEIGHTS, ExportConfig, read_export
from lanistr.model.lanistr import Lanistr
from lanistr.training import transfer
from lanistr.training.checkpoint import WEIGHTS as RUN_WEIGHTS
from lanistr.training.run import TOKENIZER as RUN_TOKENIZER
from lanistr.training.run import read_run


def export_run(run: Path, out: Path, data: Path | None = None, onnx: bool = False) -> Path:
    """Export the best weights of a fine-tuning run, or the newest of a pretraining run, as float32.

    The folder appears whole, after the model was built from it once, or not at all.

    Args:
        run: run folder.
        out: new folder.
        data: gold dataset with the tokenizer, for a run that does not keep it (made before runs did).
        onnx: also write ``model.onnx``, see `lanistr.onnx.export_onnx`.

    Raises:
        ValueError: no run, no weights, no tokenizer, or ``out`` exists; as `lanistr.onnx.export_onnx`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there already; give another --out")
    identity = read_run(run)
    recipe = load_recipe(str(run / "recipe.yaml"))
    schemas = _read_schemas(run)
    tokenizer = _tokenizer(run, recipe, identity, data) if any(s.kind == "text" for s in schemas.values()) else None
    weights, step = _weights(run, identity["task"])
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        config = _config(run, recipe, schemas, identity, step)
        (temporary / CONFIG).write_text(config.model_dump_json(indent=1) + "\n", encoding="utf-8")
        dumped = {name: schema.model_dump() for name, schema in schemas.items()}
        (temporary / SCHEMA).write_text(json.dumps(dumped, indent=1) + "\n", encoding="utf-8")
        if tokenizer:
            (temporary / TOKENIZER).write_bytes(tokenizer)
        save_file(weights, str(temporary / WEIGHTS), metadata={"format": "pt"})
        Lanistr.from_pretrained(temporary)
        if onnx:
            from lanistr.onnx import ONNX, export_onnx

            export_onnx(read_export(temporary), temporary / ONNX)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _config(
    run: Path, recipe: Recipe, schemas: dict[str, ModalitySchema], identity: dict[str, Any], step: int
) -> ExportConfig:
    modalities = modalities_of(schemas, recipe.model.modalities, str(run))
    tuned = identity["task"] == "finetune"
    origin = {key: identity.get(key) for key in ("dataset", "content_id", "from", "n_labels", "versions")}
    return ExportConfig(
        format=FORMAT,
        task=identity["task"],
        model=_portable(recipe.model, {name: modality.portable() for name, modality in modalities.items()}),
        finetune=recipe.finetune if tuned else None,
        labels=identity["labels"] if tuned else [],
        target=identity.get("target", "class"),
        max_chars=int(limit) if (limit := identity.get("fit", {}).get("max_chars")) else None,
        origin={"run": run.name, "step": step, **{key: value for key, value in origin.items() if value is not None}},
    )


def _portable(model: ModelConfig, modalities: dict[str, dict[str, Any]]) -> ModelConfig:
    """Without what depends on the machine, or would be downloaded."""
    fusion = model.fusion.model_copy(update={"pretrained": None})
    here = {"attention": "auto", "compile": False, "checkpoint_activations": False}
    return model.model_copy(update={"fusion": fusion, "modalities": modalities, **here})


def _read_schemas(run: Path) -> dict[str, ModalitySchema]:
    path = run / transfer.SCHEMA
    if not path.is_file():
        raise ValueError(f"{run}: no {transfer.SCHEMA}; the run was made before runs kept their schema")
    tree = json.loads(path.read_text(encoding="utf-8"))
    return {name: ModalitySchema.model_validate(schema) for name, schema in tree.items()}


def _weights(run: Path, task: str) -> tuple[dict[str, Any], int]:
    """The tensors, and the step that they are of."""
    if task == "finetune":
        path = run / "best" / RUN_WEIGHTS
        if not path.is_file():
            raise ValueError(f"{run}: no best weights; fine-tuning has not been validated yet")
        step = json.loads((run / "best" / "best.json").read_text(encoding="utf-8"))["step"]
    else:
        path = transfer.pretrained_weights(run)
        step = json.loads((path.parent / "meta.json").read_text(encoding="utf-8"))["step"]
    weights = load_file(str(path))
    return {name: tensor for name, tensor in weights.items() if not name.startswith("heads.")}, step


def _tokenizer(run: Path, recipe: Recipe, identity: dict[str, Any], data: Path | None) -> bytes | None:
    """The tokenizer file; None where the dataset had texts as tokens and named no tokenizer."""
    kept = run / RUN_TOKENIZER
    if kept.is_file():
        found = kept.read_bytes()
        if hashlib.sha256(found).hexdigest() != identity["tokenizer"]:
            raise ValueError(f"{kept}: not the tokenizer that the run was trained with")
        return found
    if "tokenizer" in identity and identity["tokenizer"] is None:
        return None
    if data is None:
        raise ValueError(f"{run} keeps no tokenizer: give --data GOLD, the dataset that it was trained on")
    manifest = load_manifest(data, recipe.data)
    if manifest.content_id != identity["content_id"]:
        raise ValueError(f"{data}: not the dataset that {run} was trained on")
    return load_tokenizer_bytes(data, recipe.data, manifest)
