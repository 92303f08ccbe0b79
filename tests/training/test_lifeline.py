"""How a process that has trained ends."""

import subprocess
import sys

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
