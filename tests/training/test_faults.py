"""Never lost, never stuck: whatever ends a run, ``--resume auto`` ends where the undisturbed run ends.

Real processes, real signals, a real full disk. Runs on the same layout must be bitwise equal; on another layout the
samples of each step are the same and losses equal to 1e-5.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lanistr.training.checkpoint import find_latest
from tests.model.support import NAMES, RECIPE
from tests.ranks import finish, free_port, launch
from tests.tiny_gold import write_gold

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16
TIMING = {"samples_per_s", "tokens_per_s", "data_wait", "memory_mib", "seconds"}
pytestmark = pytest.mark.dist


class World:
    """A tiny dataset and recipe, and the run that nothing disturbed."""

    def __init__(self, folder: Path):
        self.folder = folder
        every = {"train": 40, "val": 8, "test": 4}
        self.gold = write_gold(
            folder / "gold", every, lambda i: [n for b, n in enumerate(NAMES) if (i * 5 + 6) >> b & 1]
        )
        tree = RECIPE.model_dump(mode="json")
        tree["pretrain"] |= {"global_batch": 8, "max_steps": STEPS, "save_every": 4, "eval_every": 8, "log_every": 1}
        tree["pretrain"] |= {"lr": 1e-3, "eps": 1e-6, "on_nonfinite": "skip", "hang_after": 120.0}
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(yaml.safe_dump(tree))
        (folder / "zero0.json").write_text("{}")
        self.whole = folder / "whole"
        self.finish(self.whole)

    def arguments(self, run: Path, stage: str = "2", *more: str) -> list[str]:
        ds = self.folder / "zero0.json" if stage == "0" else ROOT / "ds_configs" / f"zero{stage}.json"
        names = ["--deepspeed", str(ds), "--recipe", str(self.recipe), "--data", str(self.gold), "--run", str(run)]
        return [str(ROOT / "launchers" / "pretrain.py"), *names, "--resume", "auto", *more]

    def start(self, run: Path, ranks: int = 2, stage: str = "2", *more: str) -> "list[subprocess.Popen[str]]":
        return launch(ranks, self.arguments(run, stage, *more))

    def finish(self, run: Path, ranks: int = 2, stage: str = "2", *more: str) -> str:
        return finish(self.start(run, ranks, stage, *more))[0]

    def stop_after(self, run: Path, steps: int, ranks: int = 2, stage: str = "2") -> str:
        """Train a part of the run, and stop it by SIGTERM to one rank."""
        processes = self.start(run, ranks, stage)
        wait_for(lambda: done(run) >= steps, processes)
        processes[-1].send_signal(signal.SIGTERM)
        return finish(processes)[0]


def done(run: Path, since: float = 0.0) -> int:
    """Steps reported; 0 where nothing was since then."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() and path.stat().st_mtime > since else 0


def saving_since(run: Path, started: float) -> bool:
    """Whether a checkpoint is being written; what an earlier kill has left does not count."""
    with contextlib.suppress(FileNotFoundError):
        return any(folder.stat().st_ctime > started for folder in (run / "checkpoints").glob(".step-*"))
    return False


def wait_for(condition: Callable[[], bool], processes: "list[subprocess.Popen[str]]") -> None:
    while not condition() and any(process.poll() is None for process in processes):
        time.sleep(0.01)


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = find_latest(run)
    assert found is not None
    assert found.step == STEPS
    assert found.damage() is None
    assert (run / "checkpoints" / "latest").read_text() == found.folder.name
    return load_file(str(found.folder / "weights.safetensors"))


def assert_bitwise(world: World, run: Path) -> None:
    mine, theirs = weights(run), weights(world.whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [row["loss"] for row in rows(run)] == [row["loss"] for row in rows(world.whole)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults"))


def kill(world: World, run: Path, whom: str, rng: random.Random) -> None:
    """Start, kill at a random moment (every other time while a checkpoint is written), and see that nobody is left."""
    started = time.time()
    processes = world.start(run) if whom != "launcher" else [start_launcher(world, run)]
    inside_save = rng.random() < 0.5
    at, delay = rng.randrange(1, STEPS), rng.uniform(0, 0.05)
    wait_for(lambda: saving_since(run, started) if inside_save else done(run, started) >= at, processes)
    time.sleep(delay)
    victims = {"one": processes[-1:], "all": processes, "launcher": processes}[whom]
    ranks = children(processes[0].pid) if whom == "launcher" else []
    for process in victims:
        process.kill()
    begun = time.monotonic()
    for process in processes:
        process.communicate(timeout=60)
    wait_for_end(ranks)
    assert time.monotonic() - begun < 60


def start_launcher(world: World, run: Path) -> "subprocess.Popen[str]":
    """DeepSpeed's launcher of one node."""
    import base64

    node = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={node}", "--master_addr=127.0.0.1"]
    command += [f"--master_port={free_port()}", *world.arguments(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, text=True)


def start_runner(world: World, run: Path) -> "subprocess.Popen[str]":
    """What a user types: ``deepspeed``, which starts the launcher of the node."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_accelerators", "2"]
    command += ["--master_port", free_port(), *world.arguments(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, text=True)


def children(pid: int) -> list[int]:
    import psutil

    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


def wait_for_end(pids: list[int]) -> None:
    import psutil

    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=60)
    assert not alive, "a rank has outlived its launcher"


@pytest.mark.parametrize("whom", [pytest.param("one", marks=pytest.mark.slow), "launcher"])
def test_killed_at_a_random_moment_and_resumed_equals_undisturbed(world: World, tmp_path: Path, whom: str) -> None:
    kill(world, tmp_path / "run", whom, random.Random(f"default {whom}"))
    world.finish(tmp_path / "run")
    assert_bitwise(world, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(20))
def test_killed_at_twenty_random_moments(world: World, tmp_path: Path, draw: int) -> None:
    rng = random.Random(draw)
    for _ in range(rng.randrange(1, 3)):  # sometimes again, after a resume
        kill(world, tmp_path / "run", ["one", "all", "launcher"][draw % 3], rng)
    world.finish(tmp_path / "run")
    assert_bitwise(world, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("start", [start_launcher, start_runner])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_end_with_a_launcher_that_is_told_to_and_lose_nothing(
    world: World, tmp_path: Path, start: Callable[[World, Path], "subprocess.Popen[str]"], number: signal.Signals
) -> None:
    run = tmp_path / "run"
    launcher = start(world, run)
    wait_for(lambda: done(run) >= 5, [launcher])
    ranks = children(launcher.pid)
    assert len(ranks) >= 2
    launcher.send_signal(number)
    launcher.communicate(timeout=60)
    wait_for_end(ranks)
    found = find_latest(run)
    assert found is not None
    assert found.damage() is None
    world.finish(run)
    assert_bitwise(world, run)


def test_a_dead_rank_ends_the_others_with_one_line_that_names_it(world: World, tmp_path: Path) -> None:
    processes = world.start(tmp_path / "run", 2, "2", "pretrain.max_steps=2000", "pretrain.epochs=1000")
    wait_for(lambda: done(tmp_path / "run") >= 3, processes)
    processes[1].kill()
    output = processes[0].communicate(timeout=40)[0]
    assert processes[0].returncode == 1
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1 is dead: ")
    assert "last after step " in line
    assert "Traceback" not in output


def test_a_signal_saves_and_a_damaged_checkpoint_is_passed_over(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = world.stop_after(run, 6)
    assert "saved; --resume auto goes on" in output
    found = find_latest(run)
    assert found is not None
    assert 6 <= found.step < STEPS
    path = next((found.folder / "engine").glob("zero_pp_rank_1*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    output = world.finish(run)
    assert f"{found.folder} is damaged: engine/{path.name} has another sha256" in output
    assert "resumed after step 4" in output
    assert_bitwise(world, run)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A real disk of a few megabytes; needs root."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip("cannot mount a small disk here (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_last_good_checkpoint_stays(world: World, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2) as disk:
        run = disk / "run"
        processes = world.start(run)
        outputs = [process.communicate()[0] for process in processes]
        assert [process.returncode for process in processes] == [2, 2], outputs[0]
        assert "checkpoint NOT saved: rank " in outputs[0]
        assert "No space left on device" in outputs[0]
        assert "Traceback" not in outputs[0] + outputs[1]
        found = find_latest(run)
        assert found is not None
        assert found.damage() is None
        shutil.copytree(run, tmp_path / "moved")
    world.finish(tmp_path / "moved")
    assert_bitwise(world, tmp_path / "moved")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [[(2, "2"), (1, "2")], [(1, "2"), (2, "2")], [(2, "2"), (4, "2")], [(2, "2"), (2, "0"), (2, "1")]],
    ids=lambda layouts: " to ".join(f"{ranks}xzero{stage}" for ranks, stage in layouts),
)
def test_another_layout_goes_on_with_the_same_samples_and_losses(
    world: World, tmp_path: Path, layouts: list[tuple[int, str]]
) -> None:
    run = tmp_path / "run"
    for i, layout in enumerate(layouts[:-1]):
        world.stop_after(run, 5 * (i + 1), *layout)
    output = world.finish(run, *layouts[-1])
    assert " -> " in output, "it did not resume from another layout"
    expected = rows(world.whole)
    assert [row["loss"] for row in rows(run)] == pytest.approx([row["loss"] for row in expected], abs=1e-5)


def test_one_rank_goes_on_where_two_have_stopped(world: World, tmp_path: Path) -> None:
    world.stop_after(tmp_path / "run", 5)
    output = world.finish(tmp_path / "run", 1, "1")
    assert "ranks 2 -> 1, stage 2 -> 1" in output
    losses = [[row["loss"] for row in rows(run)] for run in (tmp_path / "run", world.whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
