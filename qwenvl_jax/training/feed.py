"""Batches on the device before they are asked for."""

import queue
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from qwenvl_jax.data.example import Batch, DataError


class Feed:
    """Iterates over batches that a thread has made and placed on the mesh, one ahead.

    While the device computes step s, the host makes batch s+1. An error of the data side is raised
    at the step it belongs to, not earlier.
    """

    def __init__(
        self, batches: Iterator[Batch], sharding: NamedSharding, patience: float, ahead: int = 1
    ):
        """`patience` is for how many seconds a batch is waited for before that is an error."""
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
        self._patience = patience
        self._is_closed = threading.Event()
        args = (batches, sharding)
        self._thread = threading.Thread(target=self._fill, args=args, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            item = self._queue.get(timeout=self._patience)
        except queue.Empty:
            raise DataError(
                f"the data have stopped coming: got no batch for {self._patience:g} seconds; a "
                "worker or the storage hangs; raise guard.data_timeout if they are only slow"
            ) from None
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Ends the thread; what it has made is dropped."""
        self._is_closed.set()
        self._thread.join(timeout=1)  # a thread that hangs in its source cannot be ended

    def _fill(self, batches: Iterator[Batch], sharding: NamedSharding) -> None:
        try:
            for batch in batches:
                placed = jax.tree.map(lambda array: _place(array, sharding), batch)
                if not self._offer(placed):
                    return
            self._offer(DataError("the data ended before the run did"))
        except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
            self._offer(error)

    def _offer(self, item: Batch | BaseException) -> bool:
        while not self._is_closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False


def _place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns the array on the mesh; each process sends its own devices their parts.

    `jax.device_put` would ask all processes whether they hold the same, by a collective: from this
    thread it can meet the step's collectives in another order on each process, and hang both.
    """
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
