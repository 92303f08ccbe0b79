"""What the watchdog concludes from what ranks say, and that a hanging rank ends all; dead ones are in test_faults.py."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from lanistr.training import distributed
from lanistr.training.watchdog import Beat, Observer, Watchdog
from tests.ranks import launch


def watch(beats: dict[float, dict[int, Beat]], ranks: int = 3, dead_after: float = 5, hang_after: float = 30) -> list:
    """(time, verdict) of every verdict over a script of beats; ranks that say nothing are missing from it."""
    observer = Observer(ranks, dead_after, hang_after, 0.0)
    return [(now, said) for now, heard in beats.items() if (said := observer.judge(heard, now))]


def test_ranks_that_get_on_are_left_alone_however_long() -> None:
    beats = {float(t): {r: Beat(t, t // 9, "training", t % 9) for r in range(3)} for t in range(1, 500)}
    assert not watch(beats)


def test_a_rank_that_falls_silent_is_dead_and_named_with_its_step() -> None:
    beats = {float(t): {r: Beat(t, 7, "saving", 0) for r in range(3) if r != 1 or t < 4} for t in range(1, 20)}
    assert watch(beats)[0] == (9.0, "rank 1 is dead: not heard of for 6 s, last after step 7, saving")


def test_a_rank_that_never_said_anything_is_dead_too() -> None:
    beats = {float(t): {r: Beat(t) for r in (0, 1)} for t in range(1, 8)}
    assert watch(beats)[0][1].startswith("rank 2 is dead")


def test_of_ranks_that_wait_for_each_other_the_one_that_is_behind_hangs() -> None:
    def at(t: int) -> dict[int, Beat]:
        late = Beat(t, 41, "waiting for data", t)
        return {0: Beat(t, 41, "training", t), 1: late, 2: Beat(t, 41, "training", t)}

    ((_, said), *_) = watch({float(t): at(t) for t in range(1, 40)})
    assert said == "rank 1 hangs after step 41, waiting for data: no progress for 31 s"


def test_where_nobody_is_behind_every_rank_hangs() -> None:
    ((_, said), *_) = watch({float(t): {r: Beat(t, 3, "training", t) for r in range(3)} for t in range(1, 40)})
    assert said.startswith("every rank hangs after step 3, training")


def test_a_rank_that_failed_is_named_with_its_error_unless_all_are_failing_at_once() -> None:
    def at(t: int) -> dict[int, Beat]:
        return {r: Beat(t, 5, "training", 0, "OSError: no disk" if r == 2 and t >= 3 else None) for r in range(3)}

    ((now, said), *_) = watch({float(t): at(t) for t in range(1, 6)})
    assert said == "rank 2 failed after step 5, training: OSError: no disk"
    assert now == 4.0, "one beat later: the others may be about to say the same themselves"


def test_of_ranks_that_come_to_the_same_verdict_one_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = HashStore()
    monkeypatch.setattr(os, "_exit", lambda code: None)
    for rank in (1, 2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        watchdog = Watchdog(tmp_path, 1000.0)
        watchdog.store, watchdog.verdict = store, None
        watchdog._end("rank 0 hangs after step 3, saving: no progress for 9 s")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rank 0 hangs after step 3, saving")
    watchdog._listen()
    assert watchdog.verdict == "rank 0 hangs after step 3, saving: no progress for 9 s"


def test_alone_it_leaves_errors_alone(tmp_path: Path) -> None:
    def fail() -> None:
        with Watchdog(tmp_path, 1000.0) as watchdog:
            watchdog.note(1, "training")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()


def test_a_rank_that_waits_in_vain_for_the_others_ends_with_one_line() -> None:
    code = "from lanistr.training.distributed import rendezvous_deadline as d\nwith d(0.2):\n    __import__('time').sleep(60)"
    at = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, **at}, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "error: rank 1 waited 0 s at node0:29500 for all 4 ranks to join: one is missing\n"


@pytest.mark.slow  # it waits: below 20 s a busy machine looks like a dead rank
@pytest.mark.dist
def test_a_rank_that_hangs_ends_all_with_one_line_that_names_it_and_leaves_its_stack(tmp_path: Path) -> None:
    begun = time.monotonic()
    processes = launch(3, [str(Path(__file__).with_name("hang_worker.py")), str(tmp_path)])
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert time.monotonic() - begun < 300
    assert [process.returncode for process in processes] == [1, 1, 1], outputs
    (line,) = [line for output in outputs for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1 hangs after step 7, waiting for data: no progress for ")
    assert "hang_worker.py" in (tmp_path / "incidents" / "stacks-rank-1.txt").read_text()
