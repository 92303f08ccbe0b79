"""Throughput and peak memory of the fusion encoder: packed (ours) against padded with a mask.

``python benchmarks/fusion_encoder.py --out results.json [--quick]``

A sample is [CLS], text (lognormal lengths, median 45, 4 to 128 tokens), the image's tokens and three tabular tokens; a
missing ratio of r means that a share r of the samples lacks the image. Comparators, same weights, same run:

* ``padded_masked``: every sequence padded to the longest of the batch, padding masked.
* ``all_slots``: every sample has the slots of every modality (what a presence mask in a dense tensor costs).

Each timing is forward + backward, after a parity check of loss and gradients on the same inputs.

Shape suffixes: B samples, L padded length, T packed rows, D width.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _harness
from benchmarks.padded import dense_block
from lanistr.batch import FusionIndex, make_fusion_index, to_device
from lanistr.config import FusionConfig
from lanistr.model.fusion import FusionEncoder
from lanistr.ops.attention import resolve_backend
from lanistr.ops.transformer import Block

MISSING = (0.0, 0.5, 0.9, 0.998)
TABULAR_TOKENS = 3
COMPARATORS = ("padded_masked", "all_slots")


@dataclass(frozen=True)
class Case:
    """One size and missing ratio."""

    name: str
    missing: float
    width: int
    layers: int
    heads: int
    image_tokens: int
    batch: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Inputs:
    """Pools of tokens, the index that packs them, and the slots of the dense comparators."""

    pools: list[Tensor]
    index: FusionIndex
    target_TD: Tensor
    slots: dict[str, tuple[Tensor, Tensor]]  # comparator: (slot (T,) in the flattened (B * L) grid, keep (B, L))


def make_inputs(case: Case, device: str) -> Inputs:
    """Fixed random tokens and lengths."""
    rng = np.random.default_rng(0)
    text = np.clip(rng.lognormal(np.log(45), 0.6, case.batch), 4, 128).astype(int)
    absent = rng.permutation(case.batch) < round(case.missing * case.batch)
    images = np.flatnonzero(~absent)
    counts = [text, np.full(len(images), case.image_tokens), np.full(case.batch, TABULAR_TOKENS)]
    rows = [np.arange(case.batch), images, np.arange(case.batch)]
    sizes = [int(max(c.sum(), 1)) for c in counts]
    index = make_fusion_index(counts, rows, sizes, np.ones(case.batch), views=1)
    generator = torch.Generator().manual_seed(0)
    pools = [torch.randn(size, case.width, generator=generator) for size in sizes]
    target_TD = torch.randn(len(index.gather_T), case.width, generator=generator)
    lengths = np.diff(index.layout.cu_seqlens.numpy())
    longest_text = int(text.max())
    dense = {
        "padded_masked": [np.arange(n) for n in lengths],
        "all_slots": [
            np.concatenate(
                [
                    np.arange(1 + t),
                    *([] if gone else [np.arange(case.image_tokens) + 1 + longest_text]),
                    np.arange(TABULAR_TOKENS) + 1 + longest_text + case.image_tokens,
                ]
            )
            for t, gone in zip(text, absent, strict=True)
        ],
    }
    slots = {name: _slots(positions) for name, positions in dense.items()}
    return to_device(Inputs(pools, index, target_TD, slots), device)


def _slots(positions: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    length = max(int(p.max()) for p in positions) + 1
    keep = np.zeros((len(positions), length), dtype=bool)
    for sample, slots in enumerate(positions):
        keep[sample, slots] = True
    return torch.from_numpy(np.flatnonzero(keep)), torch.from_numpy(keep)


def packed_loss(encoder: FusionEncoder, inputs: Inputs) -> Tensor:
    """Ours."""
    return _loss(encoder(inputs.pools, inputs.index), inputs)


def padded_loss(encoder: FusionEncoder, inputs: Inputs, comparator: str) -> Tensor:
    """The same encoder over a dense (B, L, D) tensor with a key mask."""
    slot_T, keep_BL = inputs.slots[comparator]
    tokens_TD = torch.cat([encoder.cls.to(inputs.pools[0].dtype), *inputs.pools])
    tokens_TD = tokens_TD.index_select(0, inputs.index.gather_T)
    x_BLD = tokens_TD.new_zeros(keep_BL.numel(), tokens_TD.shape[1]).index_copy(0, slot_T, tokens_TD)
    x_BLD = x_BLD.view(*keep_BL.shape, -1)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        x_BLD = dense_block(block, x_BLD, keep_BL)
    return _loss(encoder.norm(x_BLD).flatten(0, 1).index_select(0, slot_T), inputs)


def _loss(out_TD: Tensor, inputs: Inputs) -> Tensor:
    return (out_TD.float() - inputs.target_TD).square().mean()


def make_steps(case: Case, device: str) -> tuple[FusionEncoder, Inputs, dict[str, Callable[[], Tensor]]]:
    """The encoder, its inputs, and forward + backward of ours and of each comparator."""
    config = FusionConfig(width=case.width, layers=case.layers, heads=case.heads, intermediate=4 * case.width)
    dtype = getattr(torch, case.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = FusionEncoder(config, resolve_backend("auto", device))
    encoder = encoder.to(device, dtype)
    inputs = make_inputs(case, device)
    inputs = Inputs([p.to(dtype) for p in inputs.pools], inputs.index, inputs.target_TD, inputs.slots)

    def step(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            encoder.zero_grad(set_to_none=True)
            value = loss()
            value.backward()
            return value.detach()

        return run

    steps = {"packed": step(lambda: packed_loss(encoder, inputs))}
    for comparator in COMPARATORS:
        steps[comparator] = step(lambda name=comparator: padded_loss(encoder, inputs, name))
    return encoder, inputs, steps


def parity(encoder: FusionEncoder, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> dict[str, float]:
    """Relative differences of the loss and of the gradient of all parameters.

    Raises:
        ValueError: above 1e-5 (float32) or 3e-2 (bfloat16): a timing of something else than the same function.
    """
    results = []
    for step in (ours, theirs):
        loss = step()
        gradient = torch.cat([p.grad.float().flatten() for p in encoder.parameters() if p.grad is not None])
        results.append((loss, gradient))
    (loss_a, grad_a), (loss_b, grad_b) = results
    found = {
        "loss": float((loss_a - loss_b).abs() / loss_b.abs()),
        "grad": float((grad_a - grad_b).norm() / grad_b.norm()),
    }
    allowed = 1e-5 if next(encoder.parameters()).dtype == torch.float32 else 3e-2
    if max(found.values()) > allowed:
        raise ValueError(f"packed and padded differ: {found}, allowed {allowed}; no timing")
    return found


def measure(case: Case, device: str, rounds: int) -> list[dict[str, Any]]:
    """Contract 5 rows, one per comparator."""
    encoder, inputs, steps = make_steps(case, device)
    tokens = len(inputs.index.gather_T)
    memory = {name: _memory(case, name) for name in steps}
    executed = {name: _harness.flops(step) for name, step in steps.items()}
    rows = []
    for comparator in COMPARATORS:
        same = parity(encoder, steps["packed"], steps[comparator])
        timing = _harness.paired_ratio(steps["packed"], steps[comparator], rounds)
        rows.append(
            {
                "case": f"{case.name}/missing={case.missing:g}/{case.dtype}",
                "comparator": comparator,
                "ratio": timing["ratio"],
                "flop_ratio": executed[comparator] / executed["packed"],
                "parity": same,
                "ours": _figures(case, tokens, timing["ours_s"], memory["packed"]),
                "theirs": _figures(case, tokens, timing["theirs_s"], memory[comparator]),
            }
        )
    return rows


def _figures(case: Case, tokens: int, seconds: float, memory: int) -> dict[str, float]:
    return {
        "seconds": seconds,
        "samples_per_s": case.batch / seconds,
        "real_tokens_per_s": tokens / seconds,
        "peak_mib": memory / 2**20,
    }


def _memory(case: Case, step: str) -> int:
    arguments = ["--memory-of", step, "--case", json.dumps(asdict(case))]
    return _harness.in_fresh_process(__file__, arguments)["bytes"]


def cases(quick: bool) -> list[Case]:
    """The demo's size, and the paper's (not with ``--quick``)."""
    small = [Case("demo", r, 192, 2, 6, 17, 64) for r in MISSING]
    full = [Case("paper", r, 768, 6, 12, 197, 16) for r in MISSING]
    return small if quick else small + full


def table(rows: list[dict[str, Any]]) -> str:
    """What a person reads."""
    head = f"{'case':<34}{'against':<15}{'faster':>8}{'(min-max)':>14}{'FLOP':>7}{'samples/s':>11}{'tokens/s':>10}{'MiB':>8}{'theirs':>8}"
    lines = [head]
    for row in rows:
        ratio, ours = row["ratio"], row["ours"]
        spread = f"({ratio['min']:.2f}-{ratio['max']:.2f})"
        lines.append(
            f"{row['case']:<34}{row['comparator']:<15}{ratio['median']:>7.2f}x{spread:>14}{row['flop_ratio']:>7.2f}"
            f"{ours['samples_per_s']:>11.1f}{ours['real_tokens_per_s']:>10.0f}{ours['peak_mib']:>8.1f}{row['theirs']['peak_mib']:>8.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (contract 5)")
    parser.add_argument("--quick", action="store_true", help="demo size only, three rounds")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    if arguments.memory_of:
        _, _, steps = make_steps(Case(**json.loads(arguments.case)), device)
        print(json.dumps({"bytes": _harness.peak_bytes(steps[arguments.memory_of])}))
        return 0
    if arguments.out is None:
        parser.error("--out FILE is needed")
    rows: list[dict[str, Any]] = []
    for case in cases(arguments.quick):
        print(f"{case.name}, missing ratio {case.missing:g} ...", file=sys.stderr)
        rows += measure(case, device, rounds=3 if arguments.quick else 5)
    _harness.write_result(arguments.out, "fusion_encoder", rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
