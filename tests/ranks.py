"""Start several ranks from a test, as a launcher would: through the plain environment."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launch(
    ranks: int, arguments: Sequence[str], environment: dict[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Start the ranks of one world with a plain environment."""
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(environment or {})}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    outputs = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [0] * len(codes), f"exit codes {codes}\n" + "\n".join(outputs)[-6000:]
    return outputs
