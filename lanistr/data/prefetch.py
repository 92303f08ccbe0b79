"""Who makes the batches: this process, a thread, or worker processes. Always in order, always the same batches."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lanistr.batch import Batch
from lanistr.data.transfer import Parcel, pack

AHEAD = 2  # batches that each worker has ready
Maker = Callable[[int], Batch]
T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    """A user's error in a worker; torch would bury it in a traceback."""

    message: str


class _Parcels(Dataset["Parcel[Batch] | _Failure"]):
    """Runs in a worker process."""

    def __init__(self, make: Maker):
        self.make = make

    def __getitem__(self, index: int) -> "Parcel[Batch] | _Failure":
        try:
            return pack(self.make(index))
        except ValueError as error:
            return _Failure(str(error))


def prefetch(
    make: Maker, indices: Sequence[int], workers: int, processes: bool, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """The batches of ``indices``, in order.

    Args:
        make: makes a batch; picklable where there are processes.
        indices: of the batches.
        workers: 0 = made when asked for, on the CPU.
        processes: worker processes, or (where little is decoded and Python would only wait for itself) one thread that
            keeps as many batches ready.
        device: where the batches shall be; on a GPU each is copied while the one before is computed.
    """
    device = torch.device(device)
    if workers == 0:
        return map(make, indices)
    if processes:
        parcels = _from_processes(make, indices, workers)
    elif device.type == "cpu":  # nothing to hand over
        return _from_thread(make, indices, AHEAD * workers)
    else:
        parcels = _from_thread(lambda index: pack(make(index)).pin_memory(), indices, AHEAD * workers)
    return _copied_ahead(parcels, device) if device.type == "cuda" else (parcel.unpack() for parcel in parcels)


def _from_thread(make: Callable[[int], T], indices: Sequence[int], ahead: int) -> Iterator[T]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
    pending: deque[Future[T]] = deque()
    try:
        for index in indices:
            pending.append(pool.submit(make, index))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _from_processes(make: Maker, indices: Sequence[int], workers: int) -> "Iterator[Parcel[Batch]]":
    loader = DataLoader(
        _Parcels(make),
        sampler=indices,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=AHEAD,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="forkserver",
        worker_init_fn=_one_thread,
    )
    for parcel in loader:
        if isinstance(parcel, _Failure):
            raise ValueError(parcel.message)
        yield parcel


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _copied_ahead(parcels: "Iterator[Parcel[Batch]]", device: torch.device) -> Iterator[Batch]:
    """Copies the next batch on a stream of its own while the caller computes on the last one."""
    stream = torch.cuda.Stream(device)
    ready: tuple[Parcel[Batch], Batch] | None = None
    for parcel in parcels:
        with torch.cuda.stream(stream):
            batch = parcel.unpack(device)
        if ready:
            yield ready[1]
        # What follows on the caller's stream waits for the copy; the pinned buffer lives until then in `ready`.
        torch.cuda.current_stream(device).wait_stream(stream)
        batch.weights_B.record_stream(torch.cuda.current_stream(device))
        ready = parcel, batch
    if ready:
        yield ready[1]
