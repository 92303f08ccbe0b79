"""What our loop costs: its steps under ZeRO-2 against plain torch / DDP and against DeepSpeed's bare engine.

``python benchmarks/engine.py --out results.json [--steps 102]``

The demo's pretraining at its own batch of 32, on 1 and on 2 ranks. After each step of `lanistr.training.loop.train` the
comparators take the same step, so that all see the same machine:

* ``torch``: plain torch, on 2 ranks DDP: forward, backward, clip, fused AdamW.
* ``deepspeed``: ``engine(batch)``, ``engine.backward``, ``engine.step`` on a second engine of the same configuration.

Both get what our loop has to find out: the counts over all ranks (equal work), and on which step they are. Ours is all
from the end of one step to the end of the next: hand-over of the batch, counts, reports, health, watchdog, guard and
whether a signal has come. Batches are made beforehand, and checkpoints and validation lie outside. Nothing is timed
before the losses of five steps, updates included, agree to 1e-5.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._harness import ROOT, spread, write_result
from etl import recipe as recipes
from etl.build import build
from etl.sources import synthetic
from lanistr.batch import Batch
from lanistr.config import PretrainConfig, Recipe, load_recipe
from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.reader import GoldDataset
from lanistr.modalities import make_modalities
from lanistr.model.lanistr import build_model
from lanistr.tasks import Pretrain
from lanistr.training import distributed
from lanistr.training.ds_config import fill_config
from lanistr.training.engine import Engine, parameter_groups, start
from lanistr.training.flops import Useful
from lanistr.training.lifeline import end_process
from lanistr.training.loop import train
from lanistr.training.schedule import lr_at

ZERO2 = ROOT / "ds_configs" / "zero2.json"
WARM_UP = 2  # steps that are not counted
PARITY_STEPS = 5
TOLERANCE = 1e-5  # of a loss, relative
Step = Callable[[Batch, dict[str, float], float], Tensor]


class Recorded(TrainLoader):
    """Makes all batches before the first step."""

    def steps(self, start: int, stop: int, device: torch.device | str = "cpu") -> Iterator[list[Batch]]:
        """As the loader's."""
        self.recorded = list(super().steps(start, stop, device))
        return iter(self.recorded)


def weighted(task: Pretrain, totals: dict[str, Tensor], counts: dict[str, float]) -> Tensor:
    """Equation 3: this rank's share of the loss."""
    return torch.stack([task.weights[n] * t / max(counts[n], 1) for n, t in totals.items()]).sum()


def torch_step(task: Pretrain, config: PretrainConfig) -> Step:
    """Plain torch, or DDP."""
    world = distributed.world_size()
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated")  # its successor syncs them once
    model = task if world == 1 else nn.parallel.DistributedDataParallel(task, broadcast_buffers=False)
    groups = parameter_groups(task, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    def step(batch: Batch, counts: dict[str, float], lr: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = weighted(task, model(batch), counts)
        (world * loss).backward()
        nn.utils.clip_grad_norm_(task.parameters(), config.clip)
        optimizer.step()
        return loss.detach()

    return step


def deepspeed_step(task: Pretrain, config: PretrainConfig, filled: dict[str, Any]) -> Step:
    """DeepSpeed's engine, and nothing else."""
    import deepspeed

    world = distributed.world_size()
    groups = parameter_groups(task, config.weight_decay)
    engine: Any = cast(Any, deepspeed).initialize(model=task, model_parameters=groups, config=filled)[0]

    def step(batch: Batch, counts: dict[str, float], lr: float) -> Tensor:
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        loss = weighted(task, engine(batch), counts)
        engine.backward(world * loss)
        engine.step()
        return loss.detach()

    return step


class Paired:
    """After each step of ours: note what it took, and let the comparators take the same step."""

    def __init__(self, loader: Recorded, comparators: dict[str, Step], config: PretrainConfig, steps: int):
        self.loader, self.comparators, self.config, self.total = loader, comparators, config, steps
        self.wall: dict[str, list[float]] = {name: [] for name in ("ours", *comparators)}
        self.cpu: dict[str, list[float]] = {name: [] for name in self.wall}
        self.losses: dict[str, list[float]] = {name: [] for name in comparators}

    def begin(self, step: int = 0) -> None:
        """All ranks start to measure together."""
        distributed.barrier()
        self.marks = time.perf_counter(), time.process_time()

    def score(self, step: int) -> None:
        """Nothing is validated."""

    def end(self, name: str) -> None:
        """Note the time since `begin`."""
        wall, cpu = time.perf_counter() - self.marks[0], time.process_time() - self.marks[1]
        self.wall[name].append(wall)
        self.cpu[name].append(cpu)

    def after_step(self, step: int) -> bool:
        """As `train` calls it."""
        self.end("ours")
        step, device = step - 1, torch.device("cpu")  # from the number of steps done to the one just done
        (batch,) = self.loader.recorded[step]
        counts = dict(zip(batch.counts, distributed.all_reduce_sum(list(batch.counts.values()), device), strict=True))
        lr = lr_at(step, self.total, self.config.lr, self.config.warmup, self.config.final_lr)
        for name in list(self.comparators)[:: -1 if step % 2 else 1]:
            torch.manual_seed(hash((self.config.seed, step, distributed.rank())))
            self.begin()
            loss = self.comparators[name](batch, counts, lr)
            self.end(name)
            self.losses[name].append(distributed.all_reduce_sum([float(loss)], device)[0])
        self.begin()
        return False


def run_paired(recipe: Recipe, gold: Path, folder: Path, steps: int, log_every: int) -> tuple[Paired, list[float]]:
    """Train all three; returns the times, and our losses as reported: means over ``log_every`` steps."""
    changes = {"max_steps": steps, "epochs": 10_000, "save_every": 1_000_000, "log_every": log_every}
    config = recipe.pretrain.model_copy(update=changes)
    device = start(threads=1)
    dataset = GoldDataset(gold, "train", {})
    modalities = make_modalities(dataset.manifest, recipe.model.modalities)
    dataset = GoldDataset(gold, "train", modalities)
    loader = Recorded(
        dataset, Collator(modalities, views=2, seed=config.seed), global_batch=config.global_batch,
        micro_batch=None, ranks=distributed.world_size(), rank=distributed.rank(), seed=config.seed,
        grouping=recipe.data.grouping, workers=0,
    )  # fmt: skip

    def task() -> Pretrain:
        model = build_model(recipe.model, modalities, config.seed, device.type, config.precision)
        return Pretrain(model, modalities, recipe.model.fusion, recipe.objective, config.seed).train()

    filled = fill_config(ZERO2, recipe.name, config, distributed.world_size())
    comparators = {"torch": torch_step(task(), config), "deepspeed": deepspeed_step(task(), config, filled)}
    paired = Paired(loader, comparators, config, steps)
    folder.mkdir(exist_ok=True)
    engine = Engine(task(), filled, device, config.weight_decay)
    useful = Useful(recipe, dataset.manifest.modalities)
    train(engine, loader, config, folder, resuming=False, validation=paired, useful=useful)
    distributed.barrier()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return paired, [row["loss"] for row in rows]


def parity(ours: list[float], losses: dict[str, list[float]]) -> dict[str, float]:
    """Largest relative difference of a loss, per comparator.

    Raises:
        ValueError: above 1e-5: a timing of something else than the same training.
    """
    found = {n: max(abs(a - b) / abs(a) for a, b in zip(ours, theirs, strict=True)) for n, theirs in losses.items()}
    if max(found.values()) > TOLERANCE:
        raise ValueError(f"losses differ from ours: {found}; no timing")
    return found


def measure(gold: Path, folder: Path, steps: int) -> dict[str, Any]:
    """On one rank of its world: the gate, then the times of every step, CPU seconds summed over ranks."""
    recipe = load_recipe("demo")
    checked, ours = run_paired(recipe, gold, folder / "parity", PARITY_STEPS, log_every=1)
    same = parity(ours, checked.losses)
    paired, _ = run_paired(recipe, gold, folder / "timed", steps, recipe.pretrain.log_every)
    cpu = {
        name: distributed.all_reduce_sum(seconds[WARM_UP:], torch.device("cpu")) for name, seconds in paired.cpu.items()
    }
    return {"parity": same, "wall": {name: s[WARM_UP:] for name, s in paired.wall.items()}, "cpu": cpu}


def on_ranks(ranks: int, gold: Path, folder: Path, steps: int) -> dict[str, Any]:
    """`measure` in a world of ``ranks`` fresh processes."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        __file__,
        "--out",
        str(folder / "rank0.json"),
        "--gold",
        str(gold),
        "--steps",
        str(steps),
    ]
    world = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = [{**world, "RANK": str(r), "LOCAL_RANK": str(r), "OMP_NUM_THREADS": "1"} for r in range(ranks)]
    processes = [subprocess.Popen(command, env=environment) for environment in own]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise ValueError(f"{ranks} ranks: a rank failed, see above")
    return json.loads((folder / "rank0.json").read_text(encoding="utf-8"))


def make_rows(ranks: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Contract 5 rows, one per comparator; ``overhead`` is of the mean step (health included) and of the median one."""
    wall, cpu = found["wall"], found["cpu"]
    rows = []
    for name in ("torch", "deepspeed"):
        ratio, cpu_ratio = spread(wall["ours"], wall[name]), spread(cpu["ours"], cpu[name])
        rows.append(
            {
                "case": f"demo/zero2/{ranks} rank{'s' if ranks > 1 else ''}/float32",
                "comparator": "ddp" if name == "torch" and ranks > 1 else name,
                "ratio": ratio,
                "cpu_ratio": cpu_ratio,
                "overhead": {
                    "wall_median": 1 / ratio["median"] - 1,
                    "wall_mean": sum(wall["ours"]) / sum(wall[name]) - 1,
                    "cpu_median": 1 / cpu_ratio["median"] - 1,
                    "cpu_mean": sum(cpu["ours"]) / sum(cpu[name]) - 1,
                },
                "parity": found["parity"][name],
                "ours": {"seconds": statistics.median(wall["ours"]), "cpu_s": statistics.median(cpu["ours"])},
                "theirs": {"seconds": statistics.median(wall[name]), "cpu_s": statistics.median(cpu[name])},
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """What a person reads."""
    lines = [
        f"{'case':<28}{'against':<12}{'ms':>8}{'theirs':>8}   overhead: {'wall':>7}{'mean':>8}{'CPU':>8}{'mean':>8}"
    ]
    for row in rows:
        cost = "".join(f"{row['overhead'][k]:>+8.1%}" for k in ("wall_median", "wall_mean", "cpu_median", "cpu_mean"))
        times = "".join(f"{1000 * row[who]['seconds']:>8.1f}" for who in ("ours", "theirs"))
        lines.append(f"{row['case']:<28}{row['comparator']:<12}{times}             {cost}")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="result file (contract 5)")
    parser.add_argument("--steps", type=int, default=102, help=f"the first {WARM_UP} are not counted")
    parser.add_argument("--gold", type=Path, help=argparse.SUPPRESS)  # in a rank: measure, and write the times
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.gold:
        found = measure(arguments.gold, arguments.out.parent, arguments.steps)
        if distributed.rank() == 0:
            arguments.out.write_text(json.dumps(found), encoding="utf-8")
        distributed.shutdown()
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic.generate(folder / "raw", samples=800)
        gold = build(recipes.load("demo"), folder / "raw", folder / "lake")
        for ranks in (1, 2):
            rows += make_rows(ranks, on_ranks(ranks, gold, folder / str(ranks), arguments.steps))
    write_result(arguments.out, "engine", rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    end_process(main())
