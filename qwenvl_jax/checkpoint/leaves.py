"""Arrays on disk that are read and written in parts, so that none of them has to fit in memory.

One array is one zarr folder in Orbax's plain layout, written here by TensorStore.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts

CHUNK_BYTES = 4 << 20  # a device that wants a part of an array reads whole chunks
BLOCK_BYTES = 64 << 20  # read, hashed and written at once; more only where one chunk row is more
DISK_BLOCK = 4096  # what a file takes is a multiple of it
ZARR_DTYPES = {"bfloat16": "bfloat16", "float16": "<f2", "float32": "<f4"}
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


class Leaf(NamedTuple):
    """An array that is somewhere else, readable in parts."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


OnBytes = Callable[[int], None]  # called with the number of bytes just done


def unwatched(num_bytes: int) -> None:
    """The callback of those who do not watch."""
    del num_bytes


def write_leaf(directory: Path, leaf: Leaf, on_bytes: OnBytes) -> str:
    """Returns the sha256 of the array's bytes, after writing them where Orbax will look."""
    chunk = chunk_shape(leaf.shape, leaf.dtype.itemsize)
    metadata = {
        "shape": list(leaf.shape),
        "chunks": list(chunk),
        "dtype": ZARR_DTYPES[leaf.dtype.name],
        "compressor": None,  # weights hardly compress
        "dimension_separator": ".",
    }
    # A chunk of zeros is stored too: left out, it could not be told from a lost one.
    spec = _zarr_spec(directory) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
    # Not synced here, chunk by chunk: the folder is, once, when it is complete.
    context = ts.Context({"file_io_sync": False})
    store = ts.open(spec, create=True, delete_existing=True, context=context).result()
    digest = hashlib.sha256()
    pending = None
    try:
        for rows, bits in _blocks(leaf):
            if pending is not None:
                pending.result()  # one block is written while the next is read
            pending = store[rows].write(bits.view(leaf.dtype))
            digest.update(bits.data)
            on_bytes(bits.nbytes)
        if pending is not None:
            pending.result()
    finally:
        if pending is not None:
            pending.exception()  # waits: whoever clears the folder now must be alone in it
    return digest.hexdigest()


def open_leaf(directory: Path, shape: tuple[int, ...], dtype: str) -> Leaf:
    """Returns the array that `write_leaf` (or Orbax) put there.

    Raises: ValueError for an array that cannot be opened, or has another shape or dtype.
    """
    store = ts.open(_zarr_spec(directory), open=True).result()
    if store.shape != shape or store.dtype.name != dtype:
        raise ValueError(f"got {store.dtype.name}{store.shape}, expected {dtype}{shape}")
    return Leaf(shape, DTYPES[dtype], lambda index: store[index].read().result())


def digest_leaf(leaf: Leaf, on_bytes: OnBytes) -> str:
    """Returns the sha256 of the array's bytes in C order, reading it block by block."""
    digest = hashlib.sha256()
    for _, bits in _blocks(leaf):
        digest.update(bits.data)
        on_bytes(bits.nbytes)
    return digest.hexdigest()


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the parts in which an array lies on disk: its longest side is halved until they fit.

    >>> chunk_shape((32, 4096, 11008), 2)
    (1, 1024, 1376)
    """
    chunk = list(shape)
    # Layers are read apart from each other, so that axis goes first where there is one to split.
    if len(shape) > 2 and np.prod(shape, dtype=np.int64) * itemsize > CHUNK_BYTES:
        chunk[0] = max(1, CHUNK_BYTES // int(np.prod(shape[1:], dtype=np.int64) * itemsize))
    while np.prod(chunk, dtype=np.int64) * itemsize > CHUNK_BYTES:
        longest = max(range(len(chunk)), key=lambda axis: chunk[axis])
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)


def disk_bytes(leaf: Leaf) -> int:
    """Returns what `write_leaf` takes of a disk: whole chunks, in whole blocks."""
    chunk = chunk_shape(leaf.shape, leaf.dtype.itemsize)
    number = math.prod(-(-size // part) for size, part in zip(leaf.shape, chunk, strict=True))
    size = math.prod(chunk) * leaf.dtype.itemsize
    return (number * -(-size // DISK_BLOCK) + 1) * DISK_BLOCK  # one for what describes it


def _blocks(leaf: Leaf) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields rows of the first axis, whole chunks of about BLOCK_BYTES together, and their bits."""
    chunk = chunk_shape(leaf.shape, leaf.dtype.itemsize)
    row_bytes = max(1, leaf.num_bytes // max(1, leaf.shape[0]))
    step = max(1, BLOCK_BYTES // (row_bytes * chunk[0])) * chunk[0]
    for start in range(0, leaf.shape[0], step):
        rows = slice(start, min(start + step, leaf.shape[0]))
        # NumPy moves plain integers much faster than bfloat16, which is foreign to it.
        yield rows, np.ascontiguousarray(leaf.read((rows,)).view(f"<u{leaf.dtype.itemsize}"))


def _zarr_spec(directory: Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{directory}/"}}
