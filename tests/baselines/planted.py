"""A gold dataset in which every modality shows the class by itself, most of the time."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer

from lanistr.comparison.grid import Splits
from lanistr.config import Recipe
from lanistr.transforms import npy_bytes
from tests.model.support import CHANNELS, NAMES, VOCAB, make_modalities, recipe_with
from tests.tiny_gold import CLASSES, write_gold

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "low", "middle", "high", "a", "b", "c", "x", "y", "z", ":", ",", ".",
    "-", "unseen", "bucket", *"0123456789", *(f"##{digit}" for digit in "0123456789"),
]  # fmt: skip
SPLIT_SIZES = {"train": 96, "val": 24, "test": 48}
CHANCE = 1 / len(CLASSES)


def make_tokenizer() -> Tokenizer:
    """A word per class and what it takes to spell the table; as many ids as the tiny schema says."""
    words = [*WORDS, *(f"[unused{i}]" for i in range(VOCAB - len(WORDS)))]
    tokenizer: Any = Tokenizer(WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


def planted_members(i: int, rng: np.random.Generator) -> dict[str, dict[str, bytes]]:
    """Of a sample of class ``i % 3``: every modality shows it, one time in ten another one."""
    text, image, table, series = (
        i % len(CLASSES) if rng.random() < 0.9 else int(rng.integers(len(CLASSES))) for _ in range(4)
    )
    filler = rng.integers(20, 40, 2)
    buffer = io.BytesIO()
    pixels = np.clip(rng.normal(60 + 70 * image, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    row = np.array([2 * table + rng.normal(0, 0.3), rng.normal(), 2 + rng.integers(3)], dtype=np.float32)
    steps = int(rng.integers(2, 6))
    values = rng.normal(series - 1, 0.3, (steps, CHANNELS)).astype(np.float32)
    return {
        "text": {"tok.npy": npy_bytes(np.array([2, *filler, 5 + text, 3], dtype=np.uint16))},
        "image": {"jpg": buffer.getvalue()},
        "tabular": {"tab.npy": npy_bytes(row)},
        "timeseries": {"ts.npy": npy_bytes(values), "tsmask.npy": npy_bytes(np.ones(values.shape, dtype=np.uint8))},
    }


def some(i: int) -> Sequence[str]:
    """A third of the samples lack the image, some others text or series."""
    return [name for j, name in enumerate(("image", "text", "timeseries")) if (i + j) % 4 or i % 2] + ["tabular"]


def planted_recipe(**changes: Any) -> Recipe:
    """The tiny recipe, with schedules that learn the planted dataset in a second or two."""
    schedule = {"lr": 5e-3, "warmup": 0.1, "clip": 1.0, "weight_decay": 0.0}
    shared = {f"finetune__{k}": v for k, v in (schedule | {"global_batch": 16, "epochs": 8, "freeze": "none"}).items()}
    pre = {f"pretrain__{k}": v for k, v in (schedule | {"global_batch": 16, "epochs": 2, "eval_every": None}).items()}
    fusion = {"model__fusion__init_std": 0.2}
    return recipe_with(**{**shared, **pre, **fusion, **changes})


def publish_text(folder: Path) -> dict[str, Any]:
    """Save a text encoder as a published one; the changes of a recipe that starts from it and leaves it as it is."""
    room = {"model__modalities__text__positions": 128}
    encoder: Any = make_modalities(planted_recipe(**room))["text"].build(16, "reference")
    encoder.encoder.save_pretrained(folder)
    return {**room, "model__modalities__text__pretrained": str(folder), "pretrain__freeze": ["text"]}


def planted_gold(folder: Path, present: Callable[[int], Sequence[str]] = some, seed: int = 0) -> Path:
    """Write it."""
    return write_gold(
        folder, SPLIT_SIZES, present, seed, members=planted_members, tokenizer=make_tokenizer().to_str()
    )  # fmt: skip


def planted_splits(
    folder: Path, present: Callable[[int], Sequence[str]] = some, recipe: Recipe | None = None
) -> Splits:
    """Write and open it."""
    return Splits.open(recipe or planted_recipe(), planted_gold(folder, present))


__all__ = [
    "CHANCE",
    "NAMES",
    "make_tokenizer",
    "planted_gold",
    "planted_recipe",
    "planted_splits",
    "publish_text",
    "some",
]
