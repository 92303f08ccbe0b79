"""Where tasks run: in this process, in a local pool, on a dask cluster. The bytes depend on none of it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")
DEATHS = 3  # of the local pool, before a build gives up


class Executor(Protocol):
    """Runs ``function(task)`` for every task, in any order; yields results as they come."""

    def map(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        """Results, in the order of completion. Raises what ``function`` raises."""
        ...


def executor(workers: int, cluster: str | None = None) -> Executor:
    """The executor that a command line asks for.

    Args:
        workers: local processes; 1 = this one.
        cluster: address of a dask scheduler, for example ``tcp://host:8786``.

    Raises:
        ValueError: fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1")
    if cluster:
        return Dask(cluster)
    return InProcess() if workers == 1 else Pool(workers)


@dataclass(frozen=True)
class InProcess:
    """One after the other, here."""

    def map(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        """See `Executor`."""
        yield from map(function, tasks)


@dataclass(frozen=True)
class Pool:
    """Local processes, started afresh (spawn). Where one is killed, its tasks are run again in a new pool."""

    workers: int

    def map(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        """See `Executor`. Raises ValueError where processes keep dying."""
        left = dict(enumerate(tasks))
        for _ in range(DEATHS):
            try:
                yield from self._attempt(function, left)
                return
            except BrokenProcessPool:
                continue
        raise ValueError(
            f"a worker process died {DEATHS} times (killed for its memory?); what is finished is kept: run the same "
            "command again, with fewer --workers"
        )

    def _attempt(self, function: Callable[[T], R], left: dict[int, T]) -> Iterator[R]:
        """Run what is left, and take from it what is done."""
        if not left:
            return
        with ProcessPoolExecutor(min(self.workers, len(left)), mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(function, task): number for number, task in left.items()}
            try:
                for future in as_completed(futures):
                    result = future.result()
                    del left[futures[future]]
                    yield result
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@dataclass(frozen=True)
class Dask:
    """A running ``dask.distributed`` cluster. Its workers need this package, and the lake and raw folders at the same paths."""

    address: str
    timeout: float = 30.0  # seconds to reach the scheduler

    def map(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        """See `Executor`. dask itself runs a task again whose worker died. Raises ValueError: no such cluster."""
        try:
            import distributed
        except ImportError:
            raise ValueError("--cluster needs dask.distributed: pip install 'lanistr[cluster]'") from None
        try:
            client = distributed.Client(self.address, timeout=self.timeout)
        except (OSError, ValueError) as error:
            raise ValueError(f"--cluster {self.address}: no dask scheduler there: {error}") from None
        with client:
            futures = client.map(function, tasks, pure=False)
            for _, result in distributed.as_completed(futures, with_results=True):
                yield result
