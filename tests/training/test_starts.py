"""However a run is started, it is the same run: each start against one in the plain environment (`tests.ranks`)."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import finish, free_port
from tests.training.test_faults import ROOT, World, assert_bitwise, done, wait_for

LOCAL = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
pytestmark = [pytest.mark.dist, pytest.mark.slow]
# One task per rank, told apart as Slurm does, and signals forwarded to them.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids[i]=$!; done
trap 'kill -USR1 "${pids[@]}"; signalled=1' USR1
code=0
for pid in "${pids[@]}"; do
  while kill -0 $pid 2> /dev/null; do signalled=; wait $pid; last=$?; [[ $signalled ]] || break; done
  ((last == 0)) || code=$last
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("starts"))


def start(command: list[str], environment: dict[str, str] = LOCAL) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_torchrun(world: World, tmp_path: Path) -> None:
    # Without the "--" torchrun takes --run for an abbreviation of its own --run-path.
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    finish([start([*module, *world.arguments(tmp_path / "run")])])
    assert_bitwise(world, tmp_path / "run")


def test_two_nodes_on_one_machine(world: World, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    module = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh"]
    module += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    finish([start([*module, f"--node_rank={node}", *world.arguments(tmp_path / "run")]) for node in range(2)])
    assert_bitwise(world, tmp_path / "run")


def test_the_slurm_script_saves_before_its_time_is_up_and_goes_on_when_requeued(world: World, tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    requeued, run = tmp_path / "requeued", tmp_path / "run"
    slurm = {"SLURM_JOB_ID": free_port(), "SLURM_JOB_NODELIST": "node0", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT), "REQUEUED": str(requeued)}
    environment = {**LOCAL, **slurm, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    arguments = world.arguments(run)
    command = ["bash", str(ROOT / "launchers" / "slurm" / "pretrain.sbatch"), *arguments[arguments.index("--recipe") :]]
    job = start(command, {**environment, "MASTER_PORT": free_port()})
    wait_for(lambda: done(run) >= 5, [job])
    job.send_signal(signal.SIGUSR1)
    (output,) = finish([job])
    assert "stopped by SIGUSR1" in output
    assert requeued.read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    finish([start(command, {**environment, "MASTER_PORT": free_port()})])
    assert_bitwise(world, run)
    assert len(requeued.read_text().splitlines()) == 1, "a run that is done is not requeued"
