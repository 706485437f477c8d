"""A large array that worker processes read together: it travels as a path, not as its bytes."""

import os
import tempfile
import weakref
from pathlib import Path

import numpy as np

LEAST_BYTES = 2**24  # smaller ones travel whole


class SharedArray:
    """Holds an array; pickled, it is written to a temporary file once, which readers map.

    All readers share the pages of that file. It goes away with the process that wrote it, so a
    pickle is for processes of the same machine that start while this one lives.
    """

    def __init__(self, array: np.ndarray):
        self.array = array
        self._path: str | None = None

    def __getstate__(self) -> np.ndarray | str:
        if self.array.nbytes < LEAST_BYTES:
            return self.array
        if self._path is None:
            handle, self._path = tempfile.mkstemp(prefix="qwenvl-order-", suffix=".npy")
            weakref.finalize(self, _remove, self._path)
            with os.fdopen(handle, "wb") as file:
                np.save(file, self.array)
        return self._path

    def __setstate__(self, state: np.ndarray | str) -> None:
        self.array = np.load(state, mmap_mode="r") if isinstance(state, str) else state
        self._path = None


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)
