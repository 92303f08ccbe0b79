"""Small models, random contents and batches for the tests of the model."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from lanistr.batch import Batch, make_fusion_index
from lanistr.config import Recipe
from lanistr.manifest import ModalitySchema
from lanistr.modalities import MODALITIES
from lanistr.modalities.base import Modality
from lanistr.model.lanistr import build_model
from lanistr.tasks import Pretrain
from lanistr.transforms import (
    MEMBERS,
    CategoricalColumn,
    ImageSpec,
    NumericColumn,
    SeriesSpec,
    TabularSpec,
    TextSpec,
    npy_bytes,
)

VOCAB = 50
CHANNELS = 4
SCHEMAS = {
    "text": TextSpec(vocab_size=VOCAB, max_tokens=16, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4),
    "image": ImageSpec(size=16),
    "tabular": TabularSpec(
        numeric=[NumericColumn(name="a", mean=1.0, std=2.0), NumericColumn(name="b", mean=0.0, std=1.0)],
        categorical=[CategoricalColumn(name="c", values=["x", "y", "z"])],
    ),
    "timeseries": SeriesSpec(
        variables=list("pqrs"), groups=[[0, 1], [2], [3]], mean=[0.0] * 4, std=[1.0] * 4, max_steps=12
    ),
}
RECIPE = Recipe.model_validate(
    {
        "name": "tiny",
        "model": {
            "fusion": {
                "width": 16, "layers": 2, "heads": 2, "intermediate": 32, "projector": [24, 24], "predictor": 8,
            },
            "modalities": {
                "text": {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 32, "max_tokens": 16},
                "image": {"size": 16, "patch": 8, "hidden": 16, "layers": 2, "heads": 2, "intermediate": 32},
                "tabular": {"width": 8, "steps": 2, "norm": "frozen"},
                "timeseries": {"hidden": 8, "layers": 1, "heads": 2, "intermediate": 16, "max_steps": 12},
            },
        },
        "objective": {"weights": {"mlm": 1.0, "mim": 1.0, "mfm": 1.0, "mtm": 1.0, "mmm": 0.5}},
    }
)  # fmt: skip
NAMES = tuple(SCHEMAS)


def make_modalities(recipe: Recipe = RECIPE) -> dict[str, Modality[Any, Any]]:
    """The four real modalities, tiny."""
    return {
        name: MODALITIES[name](
            name,
            recipe.model.modalities[name],
            ModalitySchema(kind=name, members=MEMBERS[name], spec=spec.model_dump()),
        )
        for name, spec in SCHEMAS.items()
    }


def recipe_with(**changes: Any) -> Recipe:
    """The tiny recipe with values at dotted keys, written with ``__`` for the dots."""
    tree = RECIPE.model_dump()
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    return Recipe.model_validate(tree)


def make_pretrain(modalities: dict[str, Modality[Any, Any]], seed: int = 0, recipe: Recipe = RECIPE) -> Pretrain:
    """A tiny pretraining task, all parameters perturbed so that nothing is accidentally zero."""
    model = build_model(recipe.model, modalities, seed)
    task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return task


def random_members(rng: np.random.Generator) -> dict[str, dict[str, bytes]]:
    """Members of a random complete sample."""
    tokens = np.array([2, *rng.integers(5, VOCAB, rng.integers(1, 12)), 3], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
    row = np.array([rng.normal(), rng.normal(), rng.integers(2, 5)], dtype=np.float32)
    row[rng.integers(0, 2)] = np.nan if rng.random() < 0.3 else 0.5
    steps = int(rng.integers(1, 12))
    observed = rng.random((steps, CHANNELS)) < 0.8
    observed[0, 0] = True
    return {
        "text": {"tok.npy": npy_bytes(tokens)},
        "image": {"jpg": buffer.getvalue()},
        "tabular": {"tab.npy": npy_bytes(row)},
        "timeseries": {
            "ts.npy": npy_bytes(rng.normal(size=(steps, CHANNELS)).astype(np.float32)),
            "tsmask.npy": npy_bytes(observed.astype(np.uint8)),
        },
    }


def random_samples(
    modalities: Mapping[str, Modality[Any, Any]], presence: Sequence[Sequence[str]], seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, np.ndarray]]]:
    """Per sample, decoded contents and corruption masks of the present modalities.

    A sample's draw does not depend on which of its modalities are present.
    """
    contents, masks = [], []
    for i, present in enumerate(presence):
        rng = np.random.default_rng([seed, i])
        members = random_members(rng)
        every = {name: modalities[name].decode(members[name]) for name in modalities}
        drawn = {name: modalities[name].corrupt(every[name], rng) for name in modalities}
        contents.append({name: every[name] for name in modalities if name in present})
        masks.append({name: drawn[name] for name in modalities if name in present})
    return contents, masks


def make_batch(
    modalities: Mapping[str, Modality[Any, Any]],
    contents: Sequence[Mapping[str, Any]],
    masks: Sequence[Mapping[str, np.ndarray]],
    dummies: Mapping[str, Any] | None = None,
) -> Batch:
    """A two-view batch; ``dummies`` replaces the modalities' own dummies."""
    inputs, counts, tokens, rows, pools = {}, {"mmm": float(len(contents))}, [], [], []
    for name, modality in modalities.items():
        present = [i for i, c in enumerate(contents) if name in c]
        if present:
            found = [contents[i][name] for i in present]
            collated = modality.collate(found, [masks[i][name] for i in present], [1.0] * len(present))
        else:
            dummy = (dummies or {}).get(name, modality.dummy())
            mask = modality.corrupt(dummy, np.random.default_rng(0))
            collated = modality.collate([dummy], [mask], [0.0])
        inputs[name] = collated.inputs
        counts[modality.term] = collated.count
        pools.append(int(collated.token_counts.sum()))
        tokens.append(collated.token_counts if present else np.zeros(0, dtype=np.int64))
        rows.append(np.array(present, dtype=np.int64))
    size = len(contents)
    return Batch(
        keys=tuple(f"{i:016x}" for i in range(size)),
        views=2,
        labels_B=torch.zeros(size, dtype=torch.int64),
        weights_B=torch.ones(size),
        presence_B=torch.zeros(size, dtype=torch.int64),
        inputs=inputs,
        fusion=make_fusion_index(tokens, rows, pools, np.ones(size), 2, [m.absent_token for m in modalities.values()]),
        counts=counts,
    )


def total_loss(task: Pretrain, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Equation 3 for one batch on one rank, and the terms."""
    totals = task(batch)
    terms = {name: total / max(batch.counts[name], 1) for name, total in totals.items()}
    loss = torch.stack([task.weights[name] * term for name, term in terms.items()]).sum()
    return loss, terms
