"""Reads the header of a safetensors file, and writes such files tensor by tensor.

Own code rather than the library's, for two reasons: a view must stay a mapping of the file (the
library's numpy interface has no bfloat16), and a shard must be written without holding all of it.
Format: 8 bytes header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_jax.conversion.slots import BFLOAT16, FileError, Slot, contiguous_strides
from qwenvl_jax.words import counted

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
DTYPES = {
    "BF16": BFLOAT16,
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path: Path) -> dict[str, Slot]:
    """Returns every tensor's slot by name.

    Raises: FileError for a file that is not safetensors, is truncated, or whose entries overlap,
        leave gaps or do not match their shapes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise FileError(f"{path.name}: is truncated, it has only {size} bytes")
        (header_bytes,) = struct.unpack("<Q", start)
        if header_bytes > MAX_HEADER_BYTES:
            raise FileError(
                f"{path.name}: is not a safetensors file: its header would have {header_bytes} "
                f"bytes, at most {MAX_HEADER_BYTES} are possible"
            )
        header = file.read(header_bytes)
    if len(header) < header_bytes:
        raise FileError(
            f"{path.name}: is truncated in its header: got {size} bytes, expected at least "
            f"{8 + header_bytes}; copy or download it again"
        )
    entries = _parse(header, path)
    slots = {name: _slot(path, name, entries[name], 8 + header_bytes) for name in entries}
    _check_layout(path, slots, 8 + header_bytes, size)
    return slots


def _parse(header: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise FileError(f"{path.name}: names appear twice: {', '.join(twice)}")
        return dict(pairs)

    try:
        entries = json.loads(header, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path.name}: its header is not JSON") from error
    if not isinstance(entries, dict):
        raise FileError(f"{path.name}: its header is not a JSON object")
    entries.pop("__metadata__", None)
    return entries


def _slot(path: Path, name: str, entry: Any, data_start: int) -> Slot:
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            all(type(size) is int and size >= 0 for size in shape)
        ):
            pass
        case _:
            raise FileError(f"{path.name}: the header entry of {name} is malformed")
    if code not in DTYPES:
        raise FileError(
            f"{path.name}: {name} has dtype {code}, expected one of {', '.join(DTYPES)}"
        )
    expected = math.prod(shape) * DTYPES[code].itemsize
    if end - begin != expected or begin < 0:
        raise FileError(
            f"{path.name}: {name} of shape {shape} and dtype {code} needs {expected} bytes, but "
            f"its offsets are {begin} to {end}"
        )
    strides = contiguous_strides(tuple(shape))
    return Slot(path, DTYPES[code], tuple(shape), strides, data_start + begin)


def _check_layout(path: Path, slots: dict[str, Slot], data_start: int, size: int) -> None:
    """Raises unless the tensors follow each other without overlap or gap to the file's end."""
    end, before = data_start, "the header"
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if slot.offset != end:
            what = "overlaps" if slot.offset < end else "leaves a gap after"
            raise FileError(f"{path.name}: {name} {what} {before}")
        end, before = slot.offset + slot.num_bytes, name
    if end > size:
        lost = sum(slot.offset + slot.num_bytes > size for slot in slots.values())
        raise FileError(
            f"{path.name}: is truncated: got {size} bytes, expected {end}, so that it has "
            f"lost {lost} of {counted(len(slots), 'tensor')}; copy or download it again"
        )
    if end < size:
        raise FileError(f"{path.name}: has {size - end} bytes after its last tensor")


def write_safetensors(
    path: Path, shapes: dict[str, tuple[np.dtype, tuple[int, ...]]], tensors: Iterable[np.ndarray]
) -> None:
    """Writes a file whose header follows from `shapes`; `tensors` come one by one in that order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, (dtype, shape)), tensor in zip(shapes.items(), tensors, strict=True):
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise ValueError(
                    f"{name}: got {tensor.dtype}{tensor.shape}, the header says {dtype}{shape}"
                )
            bits = np.ascontiguousarray(tensor.view(f"<u{dtype.itemsize}"))
            file.write(bits.data.cast("B") if bits.size else b"")
