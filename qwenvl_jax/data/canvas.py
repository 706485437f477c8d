"""Memory for the pictures of batches, used again and again.

A batch of pictures has tens of megabytes, and a system that has to find and clear fresh pages for
each one takes a tenth of the time of decoding into them.
"""

import math
import mmap
import weakref
from collections.abc import Sequence

import numpy as np


class Canvases:
    """Hands out uint8 arrays of one shape; their memory comes back when nothing refers to it.

    Threads may share it. Pickled, it is one of the same shape with memory of its own.
    """

    def __init__(self, shape: Sequence[int]):
        self._shape = tuple(shape)
        self._size = math.prod(self._shape)
        self._free: list[mmap.mmap] = []

    def take(self) -> np.ndarray:
        """Returns an array that holds anything; views of it keep its memory as it does itself."""
        if not self._size:
            return np.empty(self._shape, np.uint8)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = _pages(self._size)
        # numpy lets every view refer to this array, and not to what lies below it
        flat = np.frombuffer(memory, np.uint8)
        weakref.finalize(flat, self._free.append, memory).atexit = False
        return flat.reshape(self._shape)

    def __reduce__(self) -> tuple:
        return type(self), (self._shape,)


def _pages(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
