"""Batches on the device before they are asked for."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import NamedSharding

from qwenvl_jax.data.example import Batch, DataError
from qwenvl_jax.data.mixture import Round

_SLICE = 0.2  # seconds after which a wait looks up
_THREAD = "feed"  # the name of the threads that make batches


@runtime_checkable
class Teller(Protocol):
    """What the data side says afterwards of the batch of a step, counted from 0.

    `repeats`: what repeats of the data, None where they have no end. `digests`: of what all
    processes of a run must have alike, by name.
    """

    repeats: Round | None
    digests: Mapping[str, str]

    def metrics(self, step: int) -> dict[str, int | float]: ...

    def samples(self, step: int) -> dict[int, tuple[str, ...]]:
        """Returns row of the global batch -> the keys of its samples, of this process's rows."""
        ...


class Told(NamedTuple):
    metrics: dict[str, int | float]
    samples: dict[int, tuple[str, ...]]


NOTHING_TOLD = Told({}, {})


class Feed:
    """Iterates over batches that a thread has made and placed on the mesh, one ahead.

    While the device computes step s, the host makes batch s+1. An error of the data side is raised
    at the step it belongs to, not earlier.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        sharding: NamedSharding,
        patience: float,
        *,
        ahead: int = 1,
        held: "HeldRows | None" = None,
        teller: Teller | None = None,
    ):
        """Starts making batches.

        patience: for how many seconds a batch is waited for before that is an error.
        held: which rows of the global batch `batches` bring; None: all of them.
        teller: says what went into the batches.
        """
        self._held, self._teller, self._patience = held, teller, patience
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
        self.has_failed = False  # whether it has raised: no batch comes any more
        self._is_closed = threading.Event()
        args = (batches, sharding)
        self._thread = threading.Thread(target=self._fill, args=args, name=_THREAD, daemon=True)
        self._thread.start()

    @property
    def repeats(self) -> Round | None:
        """What repeats of the data; None where they have no end, or nobody knows."""
        return None if self._teller is None else self._teller.repeats

    @property
    def digests(self) -> Mapping[str, str]:
        """What the data side says that all processes of a run must have alike, by name."""
        return {} if self._teller is None else self._teller.digests

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.take()
        assert batch is not None
        return batch

    def take(self, unless: Callable[[], bool] = lambda: False) -> Batch | None:
        """Returns the next batch; None when `unless` comes true while it is waited for."""
        end = time.monotonic() + self._patience
        while (item := self._wait(min(_SLICE, self._patience))) is None:
            if unless():
                return None
            if time.monotonic() >= end:
                self.has_failed = True
                raise DataError(
                    f"the data have stopped coming: got no batch for {self._patience:g} seconds; a "
                    "worker or the storage hangs; raise guard.data_timeout if they are only slow"
                )
        if isinstance(item, BaseException):
            self.has_failed = True
            raise item
        return item

    def _wait(self, seconds: float) -> Batch | BaseException | None:
        try:
            return self._queue.get(timeout=seconds)
        except queue.Empty:
            return None

    def told(self, step: int) -> Told:
        """Returns what the data side tells of the batch of a step, where it tells anything."""
        if self._teller is None:
            return NOTHING_TOLD
        return Told(self._teller.metrics(step), self._teller.samples(step))

    def close(self) -> None:
        """Ends the thread; what it has made is dropped."""
        self._is_closed.set()
        self._thread.join(timeout=1)  # a thread that hangs in its source cannot be ended

    def _fill(self, batches: Iterator[Batch], sharding: NamedSharding) -> None:
        try:
            for batch in batches:
                placed = jax.tree.map(lambda array: _place(array, sharding, self._held), batch)
                if not self._offer(placed):
                    return
            self._offer(DataError("the data ended before the run did"))
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
            self._offer(error)

    def _offer(self, item: Batch | BaseException) -> bool:
        while not self._is_closed.is_set():
            try:
                self._queue.put(item, timeout=_SLICE)
                return True
            except queue.Full:
                continue
        return False


def is_feed_hanging() -> bool:
    """Returns whether a feed's thread hangs in its source, once all feeds are closed."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


class HeldRows(NamedTuple):
    """The rows of a global batch of `total` rows that a process needs for its own devices."""

    rows: tuple[int, ...]  # in rising order
    total: int


def rows_of_process(sharding: NamedSharding, total: int) -> HeldRows:
    """Returns which rows of a batch this process's devices hold under a sharding of the rows."""
    parts = sharding.addressable_devices_indices_map((total,)).values()
    found = {row for part in parts if part is not None for row in range(total)[part[0]]}
    return HeldRows(tuple(sorted(found)), total)


def _place(array: np.ndarray, sharding: NamedSharding, held: HeldRows | None) -> jax.Array:
    """Returns the array on the mesh; each process sends its own devices their parts.

    `jax.device_put` would ask all processes whether they hold the same, by a collective: from this
    thread it can meet the step's collectives in another order on each process, and hang both.
    """
    if held is None:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    shape = (held.total, *array.shape[1:])

    def part(index: Any) -> np.ndarray:
        wanted = range(held.total)[index[0]]
        first = held.rows.index(wanted.start)
        return array[(slice(first, first + len(wanted)), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, part)
