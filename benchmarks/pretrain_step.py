"""One pretraining step (forward + backward): packed and routed (ours) against padded layouts of the same function.

``python benchmarks/pretrain_step.py --out results.json [--quick] [--amazon GOLD]``

Mixes: ``amazon`` (text, image, table; 99.8 % of the samples lack the image) and ``mimic`` (text, image, series; 35.7 %).
Text lengths come from the index of a gold dataset where one is given, else from assumed distributions (Amazon lognormal,
median 45, 4 to 128 tokens; MIMIC lognormal, median 420, 30 to 512). Comparators, same parameters, same loss, same run:

* ``padded_masked``: padded to the longest of the batch; every modality runs for every sample; full logits.
* ``pad_to_max``: the same with 512 tokens and 48 steps, the published layout.

Text enters fusion by its [CLS] only, as in the published code: with all tokens the comparators would lose by more.
*Useful* FLOPs are those of each sample alone, without the encoders of what it lacks. Every timing follows a parity check
in float64, parameter by parameter: in float32 the first layer norm of a fresh [CLS] (zeros, epsilon 1e-12) and the ReLUs
of the SimSiam heads magnify rounding so far that another order of sums is 1e-3 off.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _harness
from benchmarks.padded import padded_loss
from lanistr.batch import Batch, map_leaves, to_device
from lanistr.config import Recipe, load_recipe
from lanistr.data.loader import Collator
from lanistr.data.samples import Sample
from lanistr.manifest import Manifest, ModalitySchema
from lanistr.modalities import MODALITIES
from lanistr.modalities.base import Modality
from lanistr.modalities.padded import dense_bert
from lanistr.modalities.tabular import Row
from lanistr.modalities.timeseries import Series
from lanistr.model.lanistr import Lanistr, build_model
from lanistr.tasks import Pretrain

COMPARATORS = ("padded_masked", "pad_to_max")
IMAGES = {"amazon": 0.002, "mimic": 0.643}  # share of samples with an image: 1 - the paper's missing ratio
STRUCTURED = {"amazon": "tabular", "mimic": "timeseries"}
STEPS = 48
DEMO_SAMPLES = 64  # the global batch of amazon_pretrain: fewer leave matrix products too small to be fast
Modalities = dict[str, Modality[Any, Any]]


@dataclass(frozen=True)
class Case:
    """One mix and size; ``lengths`` are the samples' text tokens and where they come from."""

    mix: str
    size: str
    lengths: tuple[int, ...]
    source: str

    @property
    def name(self) -> str:
        """As result files say it."""
        return f"{self.mix}/{self.size}/float32"


def text_lengths(mix: str, gold: str | None, n: int) -> tuple[tuple[int, ...], str]:
    """``n`` lengths in tokens, and their source."""
    rng = np.random.default_rng(0)
    if gold:
        manifest = Manifest.load(gold)
        column = f"length/{next(n for n, m in manifest.modalities.items() if m.kind == 'text')}"
        shards = manifest.shards_of("train")
        every = np.concatenate(
            [pq.read_table(Path(gold) / s.index, columns=[column])[column].to_numpy() for s in shards]
        )
        return tuple(rng.choice(every[every > 1], n).tolist()), f"{manifest.name} {manifest.content_id[:12]}"
    median, sigma, low, high = (45, 0.6, 4, 128) if mix == "amazon" else (420, 0.35, 30, 512)
    drawn = np.clip(rng.lognormal(np.log(median), sigma, n), low, high).astype(int)
    return tuple(drawn.tolist()), f"assumed lognormal, median {median}"


def make_recipe(case: Case) -> Recipe:
    """The paper's recipe of the mix, or the demo's sizes for the mix's modalities; text enters fusion by its [CLS]."""
    recipe = load_recipe(f"{case.mix}_pretrain" if case.size == "full" else "demo")
    blocks = {n: dict(b) for n, b in recipe.model.modalities.items() if n in ("text", "image", STRUCTURED[case.mix])}
    for block in blocks.values():
        block.pop("pretrained", None)
    blocks["text"] |= {"max_tokens": 512, "fusion_tokens": "cls", "corruption": "mask", "mask_ratio": 0.15}
    if "timeseries" in blocks:
        blocks["timeseries"]["max_steps"] = STEPS
    if "tabular" in blocks:
        blocks["tabular"]["norm"] = "frozen"  # else padding rows would change the statistics
    model = recipe.model.model_copy(update={"modalities": blocks})
    objective = recipe.objective.model_copy(update={"decorrelation": 0.0})
    return recipe.model_copy(update={"model": model, "objective": objective})


def make_modalities(case: Case, recipe: Recipe, names: list[str] | None = None) -> Modalities:
    """Modalities over the paper's schemas; the demo's size has a vocabulary in proportion to its width."""
    made: Modalities = {}
    for name, block in recipe.model.modalities.items():
        schema = MODALITIES[name].paper_schema()
        if name == "text" and case.size == "demo":
            schema = ModalitySchema(kind="text", members=schema.members, spec={**schema.spec, "vocab_size": 5120})
        if names is None or name in names:
            made[name] = MODALITIES[name](name, block, schema)
    return made


def make_samples(case: Case, modalities: Modalities) -> list[Sample]:
    """Random contents of the case's lengths; the first samples have the images."""
    rng = np.random.default_rng(1)
    images = round(IMAGES[case.mix] * len(case.lengths))
    samples = []
    for i, length in enumerate(case.lengths):
        contents: dict[str, Any] = {"text": np.array([101, *rng.integers(1000, 5000, length - 2), 102])}
        if i < images:
            shape = modalities["image"].example().shape
            contents["image"] = rng.integers(0, 256, shape, dtype=np.uint8)
        if case.mix == "amazon":
            categories = np.array([9, 8, 2, 3])
            contents["tabular"] = Row(rng.normal(size=2).astype(np.float32), categories, np.ones(6, dtype=bool))
        else:
            values = rng.normal(size=(STEPS, 76)).astype(np.float32)
            contents["timeseries"] = Series(values, np.ones((STEPS, 76), dtype=bool))
        presence = sum(1 << bit for bit, name in enumerate(modalities) if name in contents)
        samples.append(Sample(key=f"{i:016x}", presence=presence, label=-1, contents=contents))
    return samples


@dataclass(frozen=True)
class Setting:
    """A task, its batch, and the loss of each layout."""

    task: Pretrain
    batch: Batch
    losses: dict[str, Callable[[], Tensor]]

    def step(self, layout: str) -> Tensor:
        """Forward + backward, as in training: gradients are new in each step."""
        self.task.zero_grad(set_to_none=True)
        loss = self.losses[layout]()
        loss.backward()
        return loss.detach()


def packed_loss(task: Pretrain, batch: Batch) -> Tensor:
    """Equation 3 for one batch on one rank."""
    totals = task(batch)
    return torch.stack([task.weights[n] * t / max(batch.counts[n], 1) for n, t in totals.items()]).sum()


def make_setting(case: Case, dtype: torch.dtype = torch.float32) -> Setting:
    """Everything for one case, on the CPU."""
    recipe = make_recipe(case)
    modalities = make_modalities(case, recipe)
    model = build_model(recipe.model, modalities, seed=0)
    task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, seed=0).to(dtype)
    batch = Collator(modalities, views=2, seed=0)(make_samples(case, modalities), [1.0] * len(case.lengths), epoch=0)
    batch = map_leaves(batch, Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x)
    for parameter in task.parameters():
        parameter.grad = torch.empty_like(parameter).fill_(0)  # so that peak memory is counted above all gradients
    bert = dense_bert(task.model.encoder("text").encoder)
    longest = {
        "padded_masked": {"text": max(case.lengths), "timeseries": STEPS},
        "pad_to_max": {"text": 512, "timeseries": STEPS},
    }
    losses: dict[str, Callable[[], Tensor]] = {"packed": partial(packed_loss, task, batch)}
    losses |= {name: padded_loss(task, batch, bert, lengths) for name, lengths in longest.items()}
    return Setting(task, batch, losses)


def useful_flops(case: Case) -> int:
    """Forward + backward of each sample alone, with the encoders of what it has only (counted on the meta device)."""
    recipe = make_recipe(case)
    total = 0
    for sample in make_samples(case, make_modalities(case, recipe)):
        modalities = make_modalities(case, recipe, list(sample.contents))
        with torch.device("meta"):
            model = Lanistr(recipe.model, modalities, backend="sdpa_bucketed")
            task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, seed=0)
        task.to("meta")
        batch = to_device(Collator(modalities, views=2, seed=0)([sample], [1.0], epoch=0), "meta")
        total += _harness.flops(lambda t=task, b=batch: packed_loss(t, b).backward())
    return total


Gradients = dict[str, Tensor]


def parity(case: Case) -> dict[str, dict[str, float]]:
    """Largest relative differences of loss and gradient, parameter by parameter, from ours, per comparator, in float64.

    A gradient below 1e-12 of all gradients together counts as that much: a key's bias has none but rounding.

    Raises:
        ValueError: above 1e-6 (losses are summed in float32): a timing of something else than the same function.
    """
    setting = make_setting(case, torch.float64)

    def outcome(layout: str) -> tuple[float, Gradients]:
        loss = float(setting.step(layout))
        return loss, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in setting.task.named_parameters()}

    loss, ours = outcome("packed")
    floor = 1e-12 * float(torch.stack([g.norm() for g in ours.values()]).norm())
    found = {}
    for name in COMPARATORS:
        reference, theirs = outcome(name)
        apart = [float((ours[n] - g).norm() / g.norm().clamp(min=floor)) for n, g in theirs.items()]
        found[name] = {"loss": abs(loss - reference) / abs(reference), "grad": max(apart)}
        if max(found[name].values()) > 1e-6:
            raise ValueError(f"{case.name}: {name} differs from ours: {found[name]}; no timing")
    return found


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Contract 5 rows, one per comparator."""
    same = parity(case)
    setting = make_setting(case)
    executed = {name: _harness.flops(partial(setting.step, name)) for name in setting.losses}
    seconds = _harness.interleaved({name: partial(setting.step, name) for name in setting.losses}, rounds)
    del setting
    useful = useful_flops(case)
    figures = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "executed_gflop": executed[name] / 1e9,
            "useful_share": useful / executed[name],
            "peak_mib": memory(case, name) / 2**20,
        }
        for name in seconds
    }
    rows = []
    for comparator in COMPARATORS:
        ratio = _harness.spread(seconds["packed"], seconds[comparator])
        flop_ratio = executed[comparator] / executed["packed"]
        rows.append(
            {
                "case": case.name,
                "comparator": comparator,
                "samples": len(case.lengths),
                "text_lengths": case.source,
                "mean_tokens": sum(case.lengths) / len(case.lengths),
                "ratio": ratio,
                "flop_ratio": flop_ratio,
                "of_flop_model": ratio["median"] / flop_ratio,
                "executed_over_useful": executed["packed"] / useful,
                "useful_gflop": useful / 1e9,
                "parity": same[comparator],
                "ours": figures["packed"],
                "theirs": figures[comparator],
            }
        )
    return rows


def memory(case: Case, layout: str) -> int:
    """Peak bytes of one step above its weights and gradients, in a fresh process."""
    return _harness.in_fresh_process(__file__, ["--memory-of", layout, "--case", json.dumps(asdict(case))])["bytes"]


def peak_of_step(case: Case, layout: str) -> int:
    """In this process, the first step: nothing else has run."""
    setting = make_setting(case)
    return _harness.peak_bytes(partial(setting.step, layout))


HEAD = {"rows": 4096, "width": 768, "vocabulary": 30522, "masked": 0.15}


def peak_of_head(kind: str) -> int:
    """Peak bytes of the MLM head forward + backward on 8 texts of 512 tokens, 15 % masked."""
    from lanistr.modalities.text import MLMHead
    from lanistr.ops.masked_ce import linear_cross_entropy

    rows, masked = int(HEAD["rows"]), int(HEAD["rows"] * HEAD["masked"])
    head = MLMHead(int(HEAD["width"]), int(HEAD["vocabulary"]), 1e-12)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, int(HEAD["width"]), generator=generator, requires_grad=True)
    positions = torch.randperm(rows, generator=generator)[:masked].sort().values
    targets = torch.randint(0, int(HEAD["vocabulary"]), (masked,), generator=generator)
    labels = torch.full((rows,), -100).index_copy(0, positions, targets)

    def step() -> None:
        if kind == "full":
            logits = head.decoder(head.norm(torch.nn.functional.gelu(head.dense(hidden)))).float()
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            return
        x = head.norm(torch.nn.functional.gelu(head.dense(hidden.index_select(0, positions))))
        linear_cross_entropy(x, head.decoder.weight, head.decoder.bias, targets, torch.ones(masked)).backward()

    step()
    return _harness.peak_bytes(step)


def head_memory_row() -> dict[str, Any]:
    """Peak memory of the MLM head: logits at masked positions, in chunks, against full logits."""
    peaks = {
        kind: _harness.in_fresh_process(__file__, ["--memory-of", f"head:{kind}"])["bytes"] / 2**20
        for kind in ("masked", "full")
    }
    return {
        "case": "mlm_head/8x512/float32",
        "comparator": "full_logits",
        "memory_ratio": peaks["full"] / peaks["masked"],
        "ours": {"peak_mib": peaks["masked"]},
        "theirs": {"peak_mib": peaks["full"]},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """What a person reads."""
    lines = [
        f"{'case':<24}{'against':<15}{'faster':>8}{'(min-max)':>15}{'FLOP':>8}{'of model':>9}{'exec/useful':>12}{'MiB':>8}{'theirs':>8}"
    ]
    for row in rows:
        start = f"{row['case']:<24}{row['comparator']:<15}"
        mib = f"{row['ours']['peak_mib']:>8.0f}{row['theirs']['peak_mib']:>8.0f}"
        if "memory_ratio" in row:
            lines.append(f"{start}{'':>8}{'':>15}{'':>8}{'':>9}{'':>12}{mib}   {row['memory_ratio']:.1f}x less memory")
            continue
        ratio = row["ratio"]
        spread = f"({ratio['min']:.2f}-{ratio['max']:.2f})"
        lines.append(
            f"{start}{ratio['median']:>7.2f}x{spread:>15}{row['flop_ratio']:>7.2f}x"
            f"{row['of_flop_model']:>9.2f}{row['executed_over_useful']:>12.3f}{mib}"
        )
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (contract 5)")
    parser.add_argument("--quick", action="store_true", help="demo size only")
    parser.add_argument("--only", default="", help="cases that start with this, for example mimic or amazon/full")
    parser.add_argument("--samples", type=int, default=2, help="at full size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--amazon", help="gold dataset whose text lengths count for the Amazon mix")
    parser.add_argument("--mimic", help="gold dataset whose text lengths count for the MIMIC mix")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        kind, _, head = arguments.memory_of.partition(":")
        peak = peak_of_head(head) if head else peak_of_step(Case(**json.loads(arguments.case)), kind)
        print(json.dumps({"bytes": peak}))
        return 0
    if arguments.out is None:
        parser.error("--out FILE is needed")
    rows = [head_memory_row()]
    for size, samples in (("demo", DEMO_SAMPLES), ("full", arguments.samples))[: 1 if arguments.quick else 2]:
        for mix in [mix for mix in IMAGES if f"{mix}/{size}".startswith(arguments.only)]:
            lengths, source = text_lengths(mix, getattr(arguments, mix), samples)
            print(f"{mix}, {size} size, {samples} samples ...", file=sys.stderr, flush=True)
            rows += measure(Case(mix, size, lengths, source), arguments.rounds)
            print(table(rows[-2:]), file=sys.stderr, flush=True)
            _harness.write_result(arguments.out, "pretrain_step", rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
