"""One rank of a test: rank 1 never gets its data, and the others wait for it in a collective. ``python hang_worker.py RUN``."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lanistr.training import distributed
from lanistr.training.engine import start
from lanistr.training.watchdog import Watchdog


def main() -> None:
    start(threads=1)
    with Watchdog(Path(sys.argv[1]), hang_after=20.0) as watchdog:
        watchdog.note(7, "waiting for data")
        if distributed.rank() == 1:
            time.sleep(600)
        watchdog.note(7, "training")
        distributed.barrier()


if __name__ == "__main__":
    main()
