"""A fine-tuned model as one ONNX graph, for runtimes without Python: padded tensors and masks in, answers out.

Shape suffixes: B samples, L padded length, D width.
"""

import itertools
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lanistr.data.loader import Collator
from lanistr.data.samples import Sample
from lanistr.modalities.base import Modality
from lanistr.modalities.padded import PaddedModality, make_padded
from lanistr.model.exported import Exported, fill
from lanistr.model.lanistr import build_model
from lanistr.ops.transformer import Block, dense_block
from lanistr.tasks import Finetune

ONNX = "model.onnx"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
OPSET = 20


class PaddedModel(nn.Module):
    """What `Finetune.predict` gives, without packing: every modality for every sample, absent ones masked.

    Args:
        task: fine-tuned; its parameters are shared.
        modalities: of the model.

    Raises:
        ValueError: a modality without a padded form.
    """

    def __init__(self, task: Finetune, modalities: Mapping[str, Modality[Any, Any]]):
        super().__init__()
        self.task = task.eval()
        self.parts = nn.ModuleList(make_padded(m, task.model.encoder(name)) for name, m in modalities.items())

    def part(self, i: int) -> PaddedModality:
        """The i-th modality."""
        return cast(PaddedModality, self.parts[i])

    @property
    def names(self) -> list[str]:
        """Of the inputs, in the order of `forward`."""
        return [name for i in range(len(self.parts)) for name in self.part(i).names]

    def pad(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Inputs by name of decoded contents by modality; a modality that a sample lacks is absent."""
        return {
            name: array
            for i in range(len(self.parts))
            for name, array in self.part(i).pad([s.get(self.part(i).modality.name) for s in samples]).items()
        }

    def forward(self, *tensors: Tensor) -> Tensor:
        """(B, outputs): see `Finetune.predict`."""
        given = iter(tensors)
        tokens, keeps = [], []
        for i in range(len(self.parts)):
            tokens_BLD, keep_BL = self.part(i)(*itertools.islice(given, len(self.part(i).tensors)))
            tokens.append(tokens_BLD)
            keeps.append(keep_BL)
        logits_BC = self.task.classifier(self._pool(tokens, keeps))
        for (_, classifier), x_BLD, keep_BL in zip(self.task.unimodal.items(), tokens, keeps, strict=False):
            own_BD = _mean(*self._fuse([x_BLD], [keep_BL])) if self.task.alone else _mean(x_BLD, keep_BL)
            logits_BC = logits_BC + classifier(own_BD) * keep_BL.any(1, keepdim=True)
        known_B1 = torch.cat(keeps, dim=1).any(1, keepdim=True)
        logits_BC = torch.where(known_B1, logits_BC, self.task.prior)
        if self.task.target == "regression":
            return logits_BC * self.task.target_std + self.task.target_mean
        return logits_BC.softmax(-1) if self.task.target == "class" else logits_BC.sigmoid()

    def _fuse(self, tokens: list[Tensor], keeps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(B, 1 + L, D) [CLS] and these tokens fused, and which are real."""
        fusion = self.task.model.fusion
        cls_B1D = fusion.cls.expand(tokens[0].shape[0], 1, -1)
        first_B1 = torch.ones_like(keeps[0][:, :1])
        x_BLD, keep_BL = torch.cat([cls_B1D, *tokens], dim=1), torch.cat([first_B1, *keeps], dim=1)
        for block in fusion.blocks:
            x_BLD = dense_block(cast(Block, block), x_BLD, keep_BL)
        return fusion.norm(x_BLD), keep_BL

    def _pool(self, tokens: list[Tensor], keeps: list[Tensor]) -> Tensor:
        x_BLD, keep_BL = self._fuse(tokens, keeps)
        if self.task.pooling == "cls":
            return x_BLD[:, 0]
        if self.task.pooling == "mean":
            return _mean(x_BLD, keep_BL)
        sizes = [1, *(part.shape[1] for part in tokens)]
        parts = zip(x_BLD.split(sizes, dim=1), keep_BL.split(sizes, dim=1), strict=True)
        return torch.cat([_mean(part_BLD, own_BL) for part_BLD, own_BL in parts], dim=1)


def _mean(x_BLD: Tensor, keep_BL: Tensor) -> Tensor:
    """(B, D) mean of the rows that are real; zeros where there are none."""
    keep_BL1 = keep_BL[:, :, None].to(x_BLD.dtype)
    return (x_BLD * keep_BL1).sum(1) / keep_BL1.sum(1).clamp(min=1)


def export_onnx(exported: Exported, out: Path) -> float:
    """Write the graph of a fine-tuned model, after it was compared with the model.

    Inputs are what `Modality.decode` gives (numbers scaled, tokens as ids), padded, by `PaddedModel.pad`; a mask per
    modality, False where the sample lacks it. The file's metadata hold the target and the labels.

    Args:
        exported: as read by `read_export`.
        out: file.

    Returns:
        The largest difference from the model over all presence patterns.

    Raises:
        ValueError: not fine-tuned, packages missing, a modality without a padded form, or a graph that says something else.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"ONNX needs {', '.join(missing)}: install the extra 'onnx'")
    config = exported.config
    if config.finetune is None:
        raise ValueError(f"run {config.origin['run']}: ONNX is for fine-tuned models, this one was only pretrained")
    model = build_model(config.model, exported.modalities, 0)
    task = Finetune(model, config.model.fusion.width, len(config.labels), config.finetune, 0, config.target)
    fill(task, exported.weights, str(exported.folder))
    padded = PaddedModel(task, exported.modalities)
    _write(padded, out, {"target": config.target, "labels": json.dumps(config.labels)})
    return _check(padded, exported.modalities, out)


def _write(padded: PaddedModel, out: Path, metadata: Mapping[str, str]) -> None:
    """Trace with two samples, one without anything; batch and lengths stay free."""
    modalities = [padded.part(i).modality for i in range(len(padded.parts))]
    arrays = padded.pad([{m.name: m.example() for m in modalities}, {}])
    batch = torch.export.Dim("batch", min=1)
    axes: list[dict[int, Any]] = []
    for i in range(len(padded.parts)):
        part = padded.part(i)
        length = torch.export.Dim(f"{part.modality.name}_length", min=1, max=part.longest) if part.padded else None
        axes += [{0: batch} | ({1: length} if length else {}) for _ in part.tensors]
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            padded,
            tuple(torch.from_numpy(arrays[name]) for name in padded.names),
            input_names=padded.names,
            output_names=["values" if padded.task.target == "regression" else "probabilities"],
            dynamic_shapes=(tuple(axes),),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    noisy.setLevel(level)
    assert program is not None, "the exporter of torch.export returns a program"
    for node in program.model.graph.all_nodes():  # the exporter leaves its stack traces, with paths, in every node
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    program.model.metadata_props.update(metadata)
    program.save(str(out), external_data=False)


def _check(padded: PaddedModel, modalities: Mapping[str, Modality[Any, Any]], graph: Path) -> float:
    """Compare with the packed model on all presence patterns. Raises ValueError."""
    import onnxruntime

    rng = np.random.default_rng(0)
    contents = [
        {name: padded.part(i).draw(rng) for i, name in enumerate(modalities) if pattern[i]}
        for pattern in itertools.product([True, False], repeat=len(modalities))
    ]
    samples = [Sample(key=f"{i:016x}", presence=0, label=-1, contents=found) for i, found in enumerate(contents)]
    collator = Collator(modalities, views=1, seed=0, alone=padded.task.alone)
    expected = padded.task.predict(collator(samples, [1.0] * len(samples), 0)).numpy()
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, padded.pad(contents))
    apart = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
    if not apart <= TOLERANCE:
        raise ValueError(f"{graph.name}: {apart:.1e} away from the model; at most {TOLERANCE} is allowed")
    return apart
