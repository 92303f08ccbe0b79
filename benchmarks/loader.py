"""The loader: balance over ranks, speed against a plain webdataset pipeline, latency, memory.

``python benchmarks/loader.py --out results.json [--quick]``

* ``balance``: mean / max cost per rank and step, and the share of compute that is not padding if text (and series) were
  padded to the longest of the micro-batch, beside random batches. Costs are fusion tokens. Our encoders are packed: they
  execute no padding at all; the share is what a dense encoder would waste.
* ``end_to_end``: the same shards (224 px JPEG, tokens, a tabular row), read, decoded and collated into uint8 pixels,
  tokens and rows, in one process on one core. Comparator: a plain ``webdataset`` pipeline with shuffle, decode and
  batching, once with our JPEG decoder, once with its own, once with all our decoders and our collator: the same batches.
  An epoch has 64 batches; one of 16 shows what its beginning costs (the memory of two batches is paged in).
* ``rates``: samples per second from the index alone, and of raw member bytes in random order.
* ``latency``: seconds from opening a dataset to its first batch; CPU seconds to plan an epoch of 10 million samples.
* ``memory``: resident memory over an epoch of a million small samples (100 shards that are links to one).
"""

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _harness
from benchmarks._gold import write_dataset
from lanistr.batch import Batch
from lanistr.data.deal import deal
from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.plan import Facts, Plan, PlanOptions, Table
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import Sample
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from lanistr.modalities.pixels import decode_jpeg

PRESENCE = (0.02, 0.2, 0.5, 0.98)
IMAGE_TOKENS = 197
BATCH = 64
RECIPE = {"text": {"max_tokens": 128}, "image": {"size": 224}, "tabular": {}}


def lengths(n: int, image: float) -> np.ndarray:
    """(n, 4) tokens per modality: text in 95 %, images, a row always, series in 40 % of the samples."""
    rng = np.random.default_rng(0)
    text = np.where(rng.random(n) < 0.95, np.clip(rng.lognormal(np.log(45), 0.6, n), 4, 128), 0)
    series = np.where(rng.random(n) < 0.4, np.clip(rng.lognormal(np.log(24), 0.5, n), 1, 48), 0)
    images = np.where(rng.random(n) < image, IMAGE_TOKENS, 0)
    return np.stack([text, images, np.full(n, 3), series], axis=1).astype(np.int64)


def shares(tokens_N4: np.ndarray, steps: list[list[np.ndarray]]) -> dict[str, float]:
    """Balance, and useful compute with text (and with text and series) padded to the longest of the micro-batch."""
    balance, real, padded_text, padded = [], 0, 0, 0
    for slots in steps:
        loads = np.array([tokens_N4[rows].sum() for rows in slots])
        balance.append(loads.mean() / loads.max())
        for rows in slots:
            x = tokens_N4[rows]
            text, series = (int(x[:, c].max() * (x[:, c] > 0).sum() - x[:, c].sum()) for c in (0, 3))
            real += int(x.sum())
            padded_text += int(x.sum()) + text
            padded += int(x.sum()) + text + series
    return {
        "balance": float(np.mean(balance)),
        "useful_text_padded": real / padded_text,
        "useful_all_padded": real / padded,
    }


def balance_rows(quick: bool) -> list[dict[str, Any]]:
    """One row per mix, ranks and micro-batch, over an epoch of 512 steps; random batches are the comparator."""
    rows, most = [], 64 if quick else 512
    for micro in (32, 8):
        for ranks in (8, 16):
            for image in PRESENCE:
                batch = micro * ranks
                tokens = lengths(batch * 512, image)
                strata = ((tokens > 0) << np.arange(4)).sum(1)
                facts = Facts(strata, 1 + tokens.sum(1), tokens[:, 0] * 64 + tokens[:, 3])
                found = {}
                for name, options in (
                    ("ours", PlanOptions("grouped", batch)),
                    ("ours_max_tokens", PlanOptions("grouped", batch, int(batch * facts.tokens_N.mean()))),
                    ("ours_mixed", PlanOptions("mixed", batch)),
                ):
                    plan = Plan(Table("mix", facts), 0, options)
                    steps = list(itertools.islice(plan.steps(0), most))
                    equal = options.max_tokens is None
                    found[name] = shares(tokens, [[m for r in deal(s, ranks, 1, equal) for m in r] for s in steps])
                random = np.random.default_rng(1).permutation(len(tokens))[: most * batch].reshape(most, ranks, micro)
                theirs = shares(tokens, [list(step) for step in random])
                rows.append(
                    {
                        "case": f"balance/{micro}x{ranks}/image={image:g}",
                        "comparator": "random",
                        **found,
                        "theirs": theirs,
                    }
                )
    return rows


def our_loader(folder: Path, views: int, batch: int = BATCH, workers: int = 0) -> TrainLoader:
    """As training opens it."""
    modalities = make_modalities(Manifest.load(folder), RECIPE)
    dataset = GoldDataset(folder, "train", modalities)
    return TrainLoader(
        dataset, Collator(modalities, views, 0), global_batch=batch, micro_batch=None, ranks=1, rank=0, seed=0,
        grouping="grouped", workers=workers,
    )  # fmt: skip


def webdataset_batches(folder: Path, decoder: Any) -> Iterator[tuple[torch.Tensor, ...]]:
    """What a user of webdataset writes: shuffle, decode, pad, batch."""
    from webdataset.compat import WebDataset

    def collate(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, ...]:
        tokens = [torch.from_numpy(s["tok.npy"].astype(np.int64)) for s in samples]
        rows = torch.from_numpy(np.stack([s["tab.npy"] for s in samples]))
        batch = rows, torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        return (*batch, torch.from_numpy(np.stack([s["jpg"] for s in samples]))) if "jpg" in samples[0] else batch

    urls = [str(path) for path in sorted((folder / "train").glob("b0-*.tar"))]
    pipeline: Any = WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
    return iter(pipeline.shuffle(1000).decode(decoder).batched(BATCH, collation_fn=collate, partial=False))


def webdataset_same_batches(folder: Path) -> Iterator[Batch]:
    """Our batches, made by webdataset: what reads and shuffles is all that differs."""
    from webdataset.compat import WebDataset

    modalities = make_modalities(Manifest.load(folder), RECIPE)
    collator, all_present = Collator(modalities, 1, 0), (1 << len(modalities)) - 1

    def decode(key: str, data: bytes) -> Any:
        member = key.removeprefix(".")
        found = [m.decode({member: data}) for m in modalities.values() if member in m.members]
        return found[0] if found else None

    def collate(samples: list[dict[str, Any]]) -> Batch:
        made = [
            Sample(s["__key__"], all_present, 0, {name: s[m.members[0]] for name, m in modalities.items()})
            for s in samples
        ]
        return collator(made, [1.0] * len(made), 0)

    urls = [str(path) for path in sorted((folder / "train").glob("b0-*.tar"))]
    pipeline: Any = WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
    return iter(pipeline.shuffle(1000).decode(decode).batched(BATCH, collation_fn=collate, partial=False))


def our_decoder(key: str, data: bytes) -> Any:
    """As a handler of webdataset."""
    return decode_jpeg(data, 224) if key.endswith("jpg") else None


def end_to_end_row(
    folder: Path, n: int, rounds: int, case: str, pipeline: Callable[[Path], Iterator[Any]], views: int
) -> dict[str, Any]:
    """Paired CPU seconds of an epoch in this process."""
    loader = our_loader(folder, views)
    steps = n // BATCH
    epochs = itertools.count()

    def ours() -> None:
        start = next(epochs) * loader.steps_per_epoch
        seen = sum(b.size for step in loader.steps(start, start + steps) for b in step)
        assert seen == steps * BATCH, seen

    def theirs() -> None:
        seen = sum(batch.size if isinstance(batch, Batch) else len(batch[0]) for batch in pipeline(folder))
        assert seen == steps * BATCH, seen

    timing = _harness.paired_ratio(ours, theirs, rounds)
    figures = {
        who: {"seconds": timing[f"{who}_s"], "samples_per_s": n / timing[f"{who}_s"]} for who in ("ours", "theirs")
    }
    return {"case": f"end_to_end/{case}", "comparator": "webdataset", "ratio": timing["ratio"], **figures}


def spread(function: Callable[[], float], rounds: int) -> dict[str, float]:
    """Of repeated measurements."""
    values = [function() for _ in range(rounds)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": rounds}


def index_rate(dataset: GoldDataset, plan: Plan, steps: int) -> float:
    """Samples per CPU second: key, label, presence and places of each, in the order of the plan; no tar is touched."""
    begin, seen = time.process_time(), 0
    for step in itertools.islice(plan.steps(0), steps):
        for position in step.items_G.tolist():
            shard, row = dataset.locate(position)
            part = dataset.index[shard]
            seen += part.label_N[row] == 0 and part.presence_N[row] > 0 and part.keys_N[row] != b""
    return seen / (time.process_time() - begin)


def member_rate(dataset: GoldDataset, plan: Plan, steps: int) -> float:
    """Samples per CPU second: the raw bytes of all members, in the order of the plan."""
    begin, seen = time.process_time(), 0
    for step in itertools.islice(plan.steps(0), steps):
        seen += sum(bool(dataset.fetch(position).members) for position in step.items_G.tolist())
    return seen / (time.process_time() - begin)


def rate_rows(folder: Path, small: Path, rounds: int) -> list[dict[str, Any]]:
    """Samples per CPU second."""
    rows = []
    for name, where in (("224px", folder), ("small", small)):
        dataset = GoldDataset(where, "train", make_modalities(Manifest.load(where), RECIPE))
        plan = Plan(dataset, 0, PlanOptions("grouped", BATCH))
        for what, function in (("index", index_rate), ("member bytes", member_rate)):
            steps = min(plan.steps_per_epoch, 400)
            function(dataset, plan, steps)
            measured = spread(functools.partial(function, dataset, plan, steps), rounds)
            rows.append({"case": f"rates/{name}, {what}", "samples_per_s": measured})
    return rows


def latency_rows(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds to the first batch; CPU seconds for a plan."""

    def first_batch() -> float:
        begin = time.perf_counter()
        next(our_loader(folder, views=2, batch=32).steps(0, 1))
        return time.perf_counter() - begin

    class TenMillion:
        content_id = "ten million"
        shard_sizes = np.full(1000, 10_000)
        repeats = np.ones(1000)
        made = Facts(*(np.random.default_rng(0).integers(0, high, 10_000) for high in (12, 400, 1 << 16)))

        def facts(self, shard: int) -> Facts:
            return self.made

    def plan(grouping: Any) -> float:
        begin = time.process_time()
        planned = Plan(TenMillion(), 0, PlanOptions(grouping, 256))
        assert sum(window.stop - window.first for window in planned.windows(0)) == 10_000_000 // 256
        return time.process_time() - begin

    first_batch()
    rows = [{"case": "latency/first batch of 32, 224px", "seconds": spread(first_batch, 2 * rounds)}]
    for grouping in ("mixed", "grouped"):
        rows.append(
            {"case": f"latency/plan of 10 M, {grouping}", "seconds": spread(lambda g=grouping: plan(g), rounds)}
        )
    return rows


def memory_of_an_epoch(small: Path) -> dict[str, Any]:
    """Resident MiB after each tenth of an epoch of small samples, in this (fresh) process."""
    loader = our_loader(small, views=2, batch=500)
    resident, begin, seen = [], time.process_time(), 0
    for number, step in enumerate(loader.steps(0, loader.steps_per_epoch), 1):
        seen += sum(batch.size for batch in step)
        if number % (loader.steps_per_epoch // 10) == 0:
            resident.append(round(_harness._status("VmRSS") / 2**20, 1))
            print(f"{seen:,} samples, {resident[-1]} MiB", file=sys.stderr)
    return {"samples": seen, "resident_mib": resident, "samples_per_s": seen / (time.process_time() - begin)}


def table(rows: list[dict[str, Any]]) -> str:
    """What a person reads."""
    kinds = {"random": "theirs", "mixed": "ours_mixed", "grouped": "ours", "tokens": "ours_max_tokens"}
    heads = "".join(f"{kind:>9}" for kind in kinds)
    lines = [
        f"{'':<28}{'balance, mean/max':^36}   {'useful compute, text padded':^36}",
        f"{'case':<28}{heads}   {heads}",
    ]
    for row in (row for row in rows if row["case"].startswith("balance")):
        cells = ["".join(f"{row[k][what]:>9.3f}" for k in kinds.values()) for what in ("balance", "useful_text_padded")]
        lines.append(f"{row['case']:<28}{cells[0]}   {cells[1]}")
    return "\n".join(lines + [line for row in rows for line in _figures(row)])


def _figures(row: dict[str, Any]) -> Iterator[str]:
    if "ratio" in row:
        r, ours, theirs = row["ratio"], row["ours"]["samples_per_s"], row["theirs"]["samples_per_s"]
        faster = f"{r['median']:.2f}x {row['comparator']} ({r['min']:.2f}-{r['max']:.2f})"
        yield f"{row['case']}: {faster}, {ours:.0f} against {theirs:.0f} samples/s per core"
    for key, unit in (("samples_per_s", "samples/s"), ("seconds", "s")):
        if isinstance(row.get(key), dict):
            s = row[key]
            yield f"{row['case']}: {s['median']:.4g} {unit} ({s['min']:.4g}-{s['max']:.4g})"
    if "resident_mib" in row:
        yield f"{row['case']}: {row['samples']:,} at {row['samples_per_s']:.0f} samples/s, MiB by tenth {row['resident_mib']}"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (contract 5)")
    parser.add_argument("--quick", action="store_true", help="fewer samples and rounds")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(json.dumps(memory_of_an_epoch(arguments.memory_of)))
        return 0
    if arguments.out is None:
        parser.error("--out FILE is needed")
    rounds, n, links = (3, 1024, 10) if arguments.quick else (5, 4096, 100)
    print("balance ...", file=sys.stderr)
    rows = balance_rows(arguments.quick)
    with tempfile.TemporaryDirectory() as temporary:
        folder, short, text, small = (Path(temporary) / name for name in ("large", "short", "text", "small"))
        print("writing shards ...", file=sys.stderr)
        write_dataset(folder, n, 512, ("text", "image", "tabular"))
        write_dataset(short, n // 4, 512, ("text", "image", "tabular"))
        write_dataset(text, 10_000, 5_000, ("text", "tabular"))
        write_dataset(small, 10_000, 10_000, ("text", "tabular"), links)
        same_jpeg = functools.partial(webdataset_batches, decoder=our_decoder)
        pillow = functools.partial(webdataset_batches, decoder="rgb8")
        for case, where, samples, pipeline, views in (
            ("224px, same JPEG decoder", folder, n, same_jpeg, 1),
            ("224px, same JPEG decoder, a short epoch", short, n // 4, same_jpeg, 1),
            ("224px, its Pillow decoder", folder, n, pillow, 1),
            ("224px, all our decoders, the same batches", folder, n, webdataset_same_batches, 1),
            ("224px, same JPEG decoder, ours also masks two views", folder, n, same_jpeg, 2),
            ("tokens and a row", text, 10_000, pillow, 1),
            ("tokens and a row, all our decoders, the same batches", text, 10_000, webdataset_same_batches, 1),
        ):
            print(f"end to end, {case} ...", file=sys.stderr)
            rows.append(end_to_end_row(where, samples, rounds, case, pipeline, views))
        rows += rate_rows(short, text, rounds)
        rows += latency_rows(short, rounds)
        print("memory ...", file=sys.stderr)
        rows.append(
            {"case": "memory/small samples", **_harness.in_fresh_process(__file__, ["--memory-of", str(small)])}
        )
    _harness.write_result(arguments.out, "loader", rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
