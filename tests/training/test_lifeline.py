"""How a process that has trained ends."""

import subprocess
import sys
import time

import psutil
import pytest

from lanistr.training.lifeline import _alive

ENDING = """
import atexit, sys, threading
from lanistr.training.lifeline import end_process
atexit.register(lambda: print("registered"))
threading.Thread(target=threading.Event().wait).start()
print("out"); print("err", file=sys.stderr)
end_process(3)
"""


def test_what_is_printed_and_registered_arrives_and_no_thread_holds_the_end_up() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr.split()) == (3, ["out", "registered"], ["err"])


@pytest.mark.skipif(sys.platform != "linux", reason="psutil's boot time lies elsewhere")
def test_a_launcher_lives_on_when_the_wall_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time since boot does not change, the time of the boot does: NTP, or a virtual machine that was resumed."""
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    process = psutil.Process(launcher.pid)
    try:
        before, boot = process.create_time(), psutil.boot_time()
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot + 5)
        assert psutil.Process(launcher.pid).create_time() > before + 4  # not a reason to take it for another one
        assert _alive(process)
    finally:
        launcher.kill()
    for _ in range(100):  # a zombie first
        if not _alive(process):
            break
        time.sleep(0.05)
    assert not _alive(process)
    launcher.wait()
    assert not _alive(process)
