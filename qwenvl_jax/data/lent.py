"""Memory of pictures that worker processes fill and the trainer's process reads, used again.

Copying a batch to shared memory that is made for it takes a worker a tenth of the time of decoding
its pictures, mostly to find and clear fresh pages. Here a worker keeps the memory that it decodes
into, lends it with the batch, and takes it again when nothing in the other process refers to it.
Memory is a file without a name (memfd, Linux): it goes away with its processes, however they end.
"""

import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qwenvl_jax.data.canvas import Canvases
from qwenvl_jax.data.example import Batch

_IS_FREE, _IS_TAKEN = 0, 1


def can_lend() -> bool:
    """Returns whether this system has what lending needs."""
    return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


class Lent:
    """Says where the images of a batch are: a file that process `pid` has open, and their shape."""

    def __init__(self, pid: int, descriptor: int, shape: tuple[int, ...]):
        self.pid, self.descriptor, self.shape = pid, descriptor, shape


class _Block(NamedTuple):
    """Memory for one canvas, and behind it a byte that says whether it is taken."""

    memory: mmap.mmap
    descriptor: int

    def give_back(self) -> None:
        self.memory[-1] = _IS_FREE


class LendingCanvases(Canvases):
    """Hands out uint8 arrays of one shape, which `lend` passes on without copying."""

    def __init__(self, shape: Sequence[int]):
        super().__init__(shape)
        self._blocks: dict[int, _Block] = {}  # by address; kept as long as this process lives
        self._lent: set[int] = set()  # addresses that the other process gives back
        self._lock = threading.Lock()  # of the choice of a block

    def take(self) -> np.ndarray:
        """Returns an array that holds anything; its memory comes back as that of `Canvases`."""
        if not self._size:
            return super().take()
        with self._lock:
            address, block = self._free_block()
            block.memory[-1] = _IS_TAKEN
            self._lent.discard(address)
        flat = np.frombuffer(block.memory, np.uint8, self._size)
        weakref.finalize(flat, self._drop, address).atexit = False
        return flat.reshape(self._shape)

    def lend(self, batch: Batch) -> Batch:
        """Returns the batch to send to another process, which gives it to `Borrower.open`.

        Images that this object has not handed out stay as they are.
        """
        address = batch.images.ctypes.data
        if address not in self._blocks or batch.images.shape != self._shape:
            return batch
        self._lent.add(address)
        lent: Any = Lent(os.getpid(), self._blocks[address].descriptor, self._shape)
        return batch._replace(images=lent)

    def _free_block(self) -> tuple[int, _Block]:
        """Returns a block and its address; there are as many as were ever taken at once."""
        for address, block in self._blocks.items():
            if block.memory[-1] == _IS_FREE:
                return address, block
        descriptor = os.memfd_create("qwenvl-pictures")
        os.ftruncate(descriptor, self._size + 1)
        block = _Block(mmap.mmap(descriptor, self._size + 1), descriptor)
        address = np.frombuffer(block.memory, np.uint8).ctypes.data
        self._blocks[address] = block
        return address, block

    def _drop(self, address: int) -> None:
        if address not in self._lent:
            self._blocks[address].give_back()


class Borrower:
    """Opens lent batches in the process that reads them."""

    def __init__(self) -> None:
        self._memory: dict[tuple[int, int], mmap.mmap] = {}

    def open(self, batch: Batch) -> Batch:
        """Returns the batch with its images; nothing refers to them: their memory goes back."""
        lent: Any = batch.images
        if not isinstance(lent, Lent):
            return batch
        memory = self._memory.get((lent.pid, lent.descriptor))
        if memory is None:
            file = os.open(f"/proc/{lent.pid}/fd/{lent.descriptor}", os.O_RDWR)
            memory = mmap.mmap(file, 0)
            os.close(file)
            self._memory[lent.pid, lent.descriptor] = memory
        flat = np.frombuffer(memory, np.uint8, len(memory) - 1)
        weakref.finalize(flat, memory.__setitem__, -1, _IS_FREE).atexit = False
        return batch._replace(images=flat.reshape(lent.shape))
