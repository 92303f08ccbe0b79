"""Fine-tuning with frozen encoders: features computed once (``finetune.cache``) against encoders that run in every epoch.

``python benchmarks/finetune_cache.py --out results.json [--quick] [--amazon GOLD] [--mimic GOLD]``

Compute is counted by torch on the meta device, exactly: an epoch is a training step of every labelled sample (forward and
backward) and the validation (forward), as fine-tuning does both. ``once`` is what filling the cache takes.

* Paper's sizes, counted only: train and validation samples 4 to 1 (512 to 128), each with every modality, as the paper
  fine-tunes; text lengths as in `pretrain_step`. Variants: only [CLS] of the text enters fusion (the published code);
  that and no image; the paper's recipe with a frozen fusion encoder.
* ``demo/minilm``: the demo shop and the demo's model with a text encoder of MiniLM's size (6 layers, 384 wide), fine-tuned
  for real, from random weights, which change neither time nor compute. Seconds are of the whole of `finetune`: start,
  filling the cache, training, validation, checkpoints. First both trainings must have given the same.
"""

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _harness
from benchmarks.pretrain_step import text_lengths
from etl import recipe as etl_recipes
from etl.build import build
from etl.sources import synthetic
from lanistr.config import Recipe, load_recipe
from lanistr.data.loader import Collator
from lanistr.data.reader import open_split
from lanistr.data.samples import Sample
from lanistr.evaluation.evaluate import evaluate_run
from lanistr.manifest import Manifest, ModalitySchema
from lanistr.modalities import MODALITIES, make_modalities
from lanistr.modalities.base import Modality
from lanistr.modalities.encoded import EncodedModality
from lanistr.model.lanistr import build_model
from lanistr.tasks import Finetune, Pretrain
from lanistr.training import distributed
from lanistr.training.checkpoint import WEIGHTS, find_latest, named_tensors, save_weights
from lanistr.training.engine import start
from lanistr.training.finetune import finetune
from lanistr.training.flops import meta_pretrain, unpadded
from lanistr.training.lifeline import end_process
from lanistr.training.transfer import save_schema

CHUNK = 16
TRAIN, VAL = 32, 8
CLS_ONLY = "model.modalities.text.fusion_tokens=cls"
PAPER = [  # recipe, variant, overrides, modalities that the samples lack
    ("amazon_finetune_beauty", "", [], ()),
    ("amazon_finetune_beauty", "/text [CLS]", [CLS_ONLY], ()),
    ("amazon_finetune_beauty", "/text [CLS], no image", [CLS_ONLY], ("image",)),
    ("amazon_finetune_beauty", "/fusion frozen", ["finetune.freeze=[text,image,tabular,projections,fusion]"], ()),
    ("mimic_finetune", "", [], ()),
    ("mimic_finetune", "/text [CLS]", [CLS_ONLY], ()),
]
OUTPUTS = {"amazon": 5, "mimic": 2}
SMALL = [
    "model.modalities.text={hidden: 384, layers: 6, heads: 12, intermediate: 1536, max_tokens: 96}",
    "finetune.freeze=encoders",
    "finetune.modality_dropout=0",
    "finetune.check_every=null",
    "finetune.health_every=null",
]
Modalities = dict[str, Modality[Any, Any]]


@dataclass(frozen=True)
class Compute:
    """Floating-point operations of an epoch, and of what comes once before the first."""

    epoch: int
    once: int

    def of_run(self, epochs: int) -> int:
        """All of a run of so many epochs."""
        return self.once + epochs * self.epoch


def meta_finetune(recipe: Recipe, schemas: Mapping[str, ModalitySchema], outputs: int) -> tuple[Finetune, Modalities]:
    """The fine-tuning task without memory, frozen as the recipe says, and its modalities."""
    pretrain, modalities = meta_pretrain(recipe, schemas)
    with torch.device("meta"):
        task = Finetune(pretrain.model, recipe.model.fusion.width, outputs, recipe.finetune, seed=0)
    task.to("meta").freeze(recipe.finetune.frozen(list(modalities)))
    return task, modalities


def count_both(
    recipe: Recipe,
    schemas: Mapping[str, ModalitySchema],
    outputs: int,
    train: Sequence[Sample],
    val: Sequence[Sample],
) -> tuple[Compute, Compute]:
    """Of the cached and of the uncached training on these samples."""
    task, modalities = meta_finetune(recipe, schemas, outputs)
    frozen = [name for name in recipe.finetune.frozen(list(modalities)) if name in modalities]
    widths = {name: _hidden_width(task, name) for name in frozen}
    encoded = {name: EncodedModality(modalities[name], widths[name], "float32", 1) for name in frozen}
    cached = [[_with_features(sample, modalities, widths) for sample in split] for split in (train, val)]
    forward = [_count(task, modalities, split, backward=False) for split in (train, val)]
    ours = [_count(task, {**modalities, **encoded}, split, backward=False) for split in cached]
    once = sum(forward) - sum(ours)  # the encoders are all that the two forward passes differ in
    epoch = _count(task, {**modalities, **encoded}, cached[0], backward=True) + ours[1]
    return Compute(epoch, once), Compute(_count(task, modalities, train, backward=True) + forward[1], 0)


def _hidden_width(task: Finetune, name: str) -> int:
    projection: Any = task.model.encoder(name).projection
    return projection.in_features


def _with_features(sample: Sample, modalities: Modalities, widths: Mapping[str, int]) -> Sample:
    """The sample as the cache hands it over; the features are zeros."""
    contents = dict(sample.contents)
    for name in widths.keys() & contents.keys():
        tokens = int(modalities[name].collate([contents[name]], None, [1.0]).token_counts.sum())
        contents[name] = np.zeros((tokens, widths[name]), dtype=np.float32)
    return sample._replace(contents=contents)


def _count(
    task: Finetune, modalities: Mapping[str, Modality[Any, Any]], samples: Sequence[Sample], backward: bool
) -> int:
    """Of one pass over the samples, each sequence at its own length."""
    collator = Collator(modalities, views=1, seed=0)

    def run() -> None:
        for begin in range(0, len(samples), CHUNK):
            part = samples[begin : begin + CHUNK]
            batch = unpadded(collator(part, [1.0] * len(part), 0))
            with torch.set_grad_enabled(backward):
                total = torch.stack(list(task(batch).values())).sum()
            if backward:
                total.backward()

    return _harness.flops(run)


def paper_samples(modalities: Modalities, lengths: Sequence[int], lacking: Sequence[str]) -> list[Sample]:
    """Samples of the largest content of everything but text, which has the given lengths."""
    made = []
    for i, length in enumerate(lengths):
        contents = {name: modality.example() for name, modality in modalities.items() if name not in lacking}
        contents["text"] = np.resize(contents["text"], length)
        made.append(Sample(key=f"{i:016x}", presence=0, label=0, contents=contents))
    return made


def paper_row(
    name: str, variant: str, overrides: list[str], lacking: Sequence[str], gold: str | None
) -> dict[str, Any]:
    """The compute of a recipe at the paper's size."""
    recipe = load_recipe(name, overrides)
    schemas = {kind: MODALITIES[kind].paper_schema() for kind in recipe.model.modalities}
    mix = name.partition("_")[0]
    lengths, source = text_lengths(mix, gold, TRAIN + VAL)
    samples = paper_samples(meta_pretrain(recipe, schemas)[1], lengths, lacking)
    ours, theirs = count_both(recipe, schemas, OUTPUTS[mix], samples[:TRAIN], samples[TRAIN:])
    about = {"text_lengths": source, "mean_tokens": statistics.mean(lengths)}
    return compute_row(name + variant, recipe.finetune.epochs, len(samples), ours, theirs) | about


def compute_row(case: str, epochs: int, samples: int, ours: Compute, theirs: Compute) -> dict[str, Any]:
    """Contract 5; Gflop are per epoch and sample."""
    per_sample = 1e9 * samples
    return {
        "case": case,
        "comparator": "uncached",
        "flop_ratio": theirs.epoch / ours.epoch,
        "flop_ratio_of_run": theirs.of_run(epochs) / ours.of_run(epochs),
        "epochs": epochs,
        "samples": samples,
        "ours": {"epoch_gflop": ours.epoch / per_sample, "once_gflop": ours.once / per_sample},
        "theirs": {"epoch_gflop": theirs.epoch / per_sample},
    }


class Shop:
    """A demo shop, a run of random weights to start from, and trainings of both kinds from it."""

    def __init__(self, folder: Path, samples: int, labels: int, epochs: int):
        self.folder, self.labels, self.numbers = folder, labels, itertools.count()
        synthetic.generate(folder / "raw", samples=samples)
        self.gold = build(etl_recipes.load("demo"), folder / "raw", folder / "lake")
        self.recipe = load_recipe("demo", [*SMALL, f"finetune.epochs={epochs}"])
        self.source = folder / "pretrained"
        self._write_source()

    def _write_source(self) -> None:
        manifest, recipe = Manifest.load(self.gold), self.recipe
        modalities = make_modalities(manifest, recipe.model.modalities)
        model = build_model(recipe.model, modalities, seed=0)
        task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, seed=0)
        checkpoint = self.source / "checkpoints" / "step-00000001"
        save_weights(checkpoint / WEIGHTS, {n: t.detach().clone() for n, t in named_tensors(task).items()})
        (checkpoint / "meta.json").write_text('{"step": 1, "loader": {}, "files": {}}', encoding="utf-8")
        (self.source / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
        save_schema(self.source, manifest)

    def tune(self, cache: bool) -> Path:
        """A whole fine-tuning; returns its run."""
        run = self.folder / f"run-{next(self.numbers)}"
        recipe = self.recipe.model_copy(update={"finetune": self.recipe.finetune.model_copy(update={"cache": cache})})
        zero = _harness.ROOT / "ds_configs" / "zero2.json"
        finetune(recipe, self.gold, run, zero, source=self.source, labels=self.labels, resume=None)
        return run

    def compute(self) -> tuple[int, Compute, Compute]:
        """Number of the samples that `tune` uses, and what they cost with and without the cache."""
        manifest = Manifest.load(self.gold)
        modalities = make_modalities(manifest, self.recipe.model.modalities)
        train, val = (open_split(self.gold, split, modalities, self.recipe.data) for split in ("train", "val"))
        read = [
            [split.read(int(p)) for p in split.labelled(n, self.recipe.finetune.seed)]
            for split, n in ((train, self.labels), (val, None))
        ]
        return sum(map(len, read)), *count_both(self.recipe, manifest.modalities, len(manifest.labels), *read)


def parity(gold: Path, ours: Path, theirs: Path) -> dict[str, float]:
    """How far two trainings ended apart: validation loss (relative), test outputs (absolute), weights (relative, by tensor).

    The bias of attention's keys has no gradient but rounding, which Adam makes steps of; it changes no output and is left
    out.

    Raises:
        ValueError: outputs or losses more than 1e-3 apart: a timing of something else than the same training.
    """
    losses = [[json.loads(line)["log_loss"] for line in (run / "validation.jsonl").open()] for run in (ours, theirs)]
    for run in (ours, theirs):
        evaluate_run(run, gold, "test")
    outputs = [np.load(run / "predictions-test.npz")["outputs"] for run in (ours, theirs)]
    found = {
        "loss": float(np.max(np.abs(np.array(losses[0]) / losses[1] - 1))),
        "outputs": float(np.abs(outputs[0] - outputs[1]).max()),
        "weights": weights_apart(ours, theirs),
    }
    if max(found["loss"], found["outputs"]) > 1e-3:
        raise ValueError(f"cached and uncached training differ: {found}; no timing")
    return found


def weights_apart(ours: Path, theirs: Path) -> float:
    """Largest relative difference of a tensor of the last checkpoints."""
    tensors = []
    for run in (ours, theirs):
        last = find_latest(run)
        assert last is not None, "a finished run has a checkpoint"
        tensors.append(load_file(str(last.folder / WEIGHTS)))
    apart = []
    for name, theirs_own in tensors[1].items():
        a, b = tensors[0][name].double(), theirs_own.double()
        if name.endswith("qkv.bias"):
            third = len(b) // 3
            a, b = (torch.cat([x[:third], x[2 * third :]]) for x in (a, b))
        apart.append(float((a - b).norm() / b.norm().clamp(min=1e-12)))
    return max(apart)


def shop_row(samples: int, labels: int, epochs: int, rounds: int) -> dict[str, Any]:
    """Fine-tune for real, both ways, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        shop = Shop(Path(folder), samples, labels, epochs)
        say("demo/minilm: both trainings, for their results ...")
        ours, theirs = shop.tune(cache=True), shop.tune(cache=False)
        same = parity(shop.gold, ours, theirs)
        say(f"  apart: {same}")
        ways: dict[str, Callable[[], Any]] = {"ours": lambda: shop.tune(True), "theirs": lambda: shop.tune(False)}
        seconds = _harness.interleaved(ways, rounds)
        used, cached, uncached = shop.compute()
        features = sum(f.stat().st_size for f in (ours / "features").iterdir())
        metrics = json.loads((ours / "summary.json").read_text(encoding="utf-8"))["best"]
    row = compute_row("demo/minilm/float32", epochs, used, cached, uncached)
    row |= {"ratio": _harness.spread(seconds["ours"], seconds["theirs"]), "parity": same, "labels": labels}
    row["ours"] |= {"seconds": statistics.median(seconds["ours"]), "cache_mib": features / 2**20, "best": metrics}
    row["theirs"] |= {"seconds": statistics.median(seconds["theirs"])}
    return row


def say(line: str) -> None:
    """To the person who waits."""
    print(line, file=sys.stderr, flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What a person reads."""
    lines = [f"{'case':<46}{'epoch':>8}{'run':>8}{'epochs':>8}{'seconds':>9}{'(min-max)':>16}"]
    for row in rows:
        line = f"{row['case']:<46}{row['flop_ratio']:>7.2f}x{row['flop_ratio_of_run']:>7.2f}x{row['epochs']:>8}"
        if "ratio" in row:
            ratio = row["ratio"]
            line += f"{ratio['median']:>8.2f}x{'({:.2f}-{:.2f})'.format(ratio['min'], ratio['max']):>16}"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file (contract 5)")
    parser.add_argument("--quick", action="store_true", help="compute only, nothing is trained")
    parser.add_argument("--amazon", help="gold dataset whose text lengths count for the Amazon recipe")
    parser.add_argument("--mimic", help="gold dataset whose text lengths count for the MIMIC recipe")
    parser.add_argument("--samples", type=int, default=1000, help="of the demo shop")
    parser.add_argument("--labels", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    rows = []
    for name, variant, overrides, lacking in PAPER:
        rows.append(paper_row(name, variant, overrides, lacking, getattr(arguments, name.partition("_")[0])))
        say(table(rows[-1:]).splitlines()[1])
    if not arguments.quick:
        start()
        rows.append(shop_row(arguments.samples, arguments.labels, arguments.epochs, arguments.rounds))
        distributed.shutdown()
    _harness.write_result(arguments.out, "finetune_cache", rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    end_process(main())
