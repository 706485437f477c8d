"""Where one stored tensor lies in its file, and the memory-mapped view of it.

Both file formats are read into the same thing, a `Slot`; nothing but headers is touched until a
slot is viewed, and a view is a mapping of the file, not a copy.
"""

import mmap
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from qwenvl_jax.words import counted

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_DTYPES = frozenset((BFLOAT16, *(np.dtype(code) for code in ("<f2", "<f4"))))


class ConversionError(ValueError):
    """Everything that is wrong with a checkpoint, in one message.

    >>> print(ConversionError("x.safetensors", ["a is missing", "b is misshapen"]))
    x.safetensors cannot be used, 2 problems:
      a is missing;
      b is misshapen
    """

    def __init__(self, where: str | Path, problems: list[str]):
        self.problems = list(problems)
        count = counted(len(problems), "problem")
        # Semicolons, because a command prints the message on one line.
        super().__init__(f"{where} cannot be used, {count}:\n  " + ";\n  ".join(problems))


class FileError(ValueError):
    """One file that cannot be read: what is wrong, and how to fix it. Collected by the reader."""


class Slot(NamedTuple):
    """A tensor in a file; `strides` count elements, as PyTorch's do."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the element strides of a C-ordered array: (2, 3, 5) -> (15, 5, 1)."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class MappedFiles:
    """Read-only mappings, one a file, kept open until `close`."""

    def __init__(self):
        self._maps: dict[Path, mmap.mmap] = {}

    def view(self, slot: Slot) -> np.ndarray:
        """Returns the tensor as a read-only view of its file. The slot's bounds were checked."""
        if 0 in slot.shape:
            return np.empty(slot.shape, slot.dtype)
        if slot.file not in self._maps:
            with slot.file.open("rb") as file:
                self._maps[slot.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        strides = tuple(step * slot.dtype.itemsize for step in slot.strides)
        return np.ndarray(slot.shape, slot.dtype, self._maps[slot.file], slot.offset, strides)

    def close(self) -> None:
        """Forgets the mappings; each is unmapped when the last view of it is gone."""
        self._maps.clear()


def is_finite(tensor: np.ndarray) -> bool:
    """Returns whether no element is NaN or infinite.

    Infinities and NaNs are the largest bit patterns of either sign. As signed integers the
    positive ones come out on top, as unsigned integers the negative ones: two plain maxima, many
    times faster than `np.isfinite`, which would first have to widen bfloat16.
    """
    infinity = np.array(np.inf, tensor.dtype).view(f"<i{tensor.dtype.itemsize}")
    bits = tensor.view(infinity.dtype)
    unsigned = tensor.view(f"<u{tensor.dtype.itemsize}")
    negative_infinity = np.array(-np.inf, tensor.dtype).view(unsigned.dtype)
    return tensor.size == 0 or bool(bits.max() < infinity and unsigned.max() < negative_infinity)
