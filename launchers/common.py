"""What the launchers share: the command line, one-line errors, and the demo dataset."""

import argparse
import fcntl
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path("lake/gold/demo")


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that training launchers have in common."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero2.json", help="ZeRO configuration")
    made.add_argument("--recipe", default="demo", help="name or path")
    made.add_argument("--data", type=Path, help=f"gold dataset (default: {DEMO}, built if absent)")
    made.add_argument("--run", type=Path, help="run folder (default: runs/<recipe>)")
    made.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        choices=["auto", "force"],
        help="go on from the newest checkpoint, if there is one; force: although recipe, data or tokenizer differ",
    )
    made.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="for example pretrain.lr=2e-4")
    return made


def label_count(text: str) -> int | None:
    """``all`` or a positive number."""
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a positive number or all")
    return int(text)


def main(run: Callable[[], None]) -> int:
    """Run; a user's mistake is one line on rank 0 and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("DeepSpeed", "torch", "httpx", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if is_rank_0():
        logging.getLogger("lanistr").setLevel(logging.INFO)
    else:
        logging.getLogger("lanistr").setLevel(logging.WARNING)
    try:
        run()
    except ValueError as error:
        if is_rank_0():
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main_of_ranks(run: Callable[[], None]) -> NoReturn:
    """As `main`, for a rank: it ends with its launcher, and without torch's teardown."""
    from lanistr.training.lifeline import end_process, follow_launcher

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost peer is three C++ stack traces
    follow_launcher()
    end_process(main(run))


def is_rank_0() -> bool:
    """Before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def dataset(given: Path | None, recipe: str) -> Path:
    """The dataset to train on; the demo recipe's own is built if it is absent.

    Raises:
        ValueError: no ``--data`` for another recipe; the build failed.
    """
    if given:
        return given
    if recipe != "demo":
        raise ValueError(f"--data GOLD is needed with --recipe {recipe}; only the demo recipe brings its own data")
    if is_rank_0():
        _build_demo()
    while not (DEMO / "manifest.json").is_file():
        if (DEMO.parent / ".demo.failed").exists():
            raise ValueError("the demo dataset could not be built; see rank 0")
        time.sleep(0.5)
    return DEMO


def _build_demo() -> None:
    DEMO.parent.mkdir(parents=True, exist_ok=True)
    with open(DEMO.parent / ".demo.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (DEMO / "manifest.json").is_file():
            return
        failed = DEMO.parent / ".demo.failed"
        failed.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        for command in (
            ["synth", "--out", "raw/demo"],
            ["build", "demo", "--raw", "raw/demo", "--lake", "lake"],
        ):
            print(f"demo data: python -m etl {' '.join(command)}", file=sys.stderr, flush=True)
            if subprocess.run([sys.executable, "-m", "etl", *command], env=environment).returncode:
                failed.touch()
                raise ValueError(f"the demo dataset could not be built: python -m etl {' '.join(command)} failed")
