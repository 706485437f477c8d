"""Reads the table of contents of a PyTorch `.bin` file, without PyTorch and without running it.

Since PyTorch 1.6 such a file is a zip archive: `NAME/data.pkl` describes the tensors, and each
storage is an uncompressed entry `NAME/data/KEY`. A pickle is a program, and unpickling it normally
lets it import and call anything. Here it may name the few harmless things of `find_class`; whatever
else it asks for is refused by name before anything runs.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwenvl_jax.conversion.slots import BFLOAT16, FileError, Slot

MAX_PICKLE_BYTES = 64 << 20  # a full checkpoint's table is a few hundred kilobytes
STORAGE_DTYPES = {
    "BFloat16Storage": BFLOAT16,
    "HalfStorage": np.dtype("<f2"),
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "BoolStorage": np.dtype("?"),
}


def read_torch_zip(path: Path) -> dict[str, Slot]:
    """Returns every tensor's slot by name.

    Raises: FileError for a truncated, compressed, legacy or hostile file.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            folder, table = _read_table(archive, path)
            storages = _Storages(path, archive, file, folder)
            return _slots(_restricted_load(table, storages, path), path)
    except zipfile.BadZipFile as error:
        raise FileError(f"{path.name}: {_not_a_zip(path)}") from error


class _Storage(NamedTuple):
    offset: int  # bytes from the start of the file
    num_elements: int
    dtype: np.dtype


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storages:
    """Finds the bytes of a storage in the archive."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, file: io.BufferedReader, folder: str):
        self._path, self._archive, self._file, self._folder = path, archive, file, folder
        self._size = path.stat().st_size

    def find(self, key: str, dtype: np.dtype) -> _Storage:
        name = f"{self._folder}/data/{key}"
        try:
            entry = self._archive.getinfo(name)
        except KeyError as error:
            raise FileError(f"{self._path.name}: has no entry {name!r}") from error
        if entry.compress_type != zipfile.ZIP_STORED:
            raise FileError(
                f"{self._path.name}: entry {name!r} is compressed, which torch.save never does; "
                "save it again with torch.save"
            )
        offset = self._data_offset(entry)
        if offset + entry.file_size > self._size:
            raise FileError(f"{self._path.name}: is truncated inside entry {name!r}")
        return _Storage(offset, entry.file_size // dtype.itemsize, dtype)

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        # The local header repeats name and extra field, and PyTorch pads the extra field there
        # (and only there) to align the data, so the central directory does not tell the offset.
        self._file.seek(entry.header_offset)
        header = self._file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise FileError(f"{self._path.name}: entry {entry.filename!r} has no local header")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        return entry.header_offset + 30 + name_bytes + extra_bytes


# The pure Python unpickler, because the C one reserves memory for whatever memo index a file names.
class _RestrictedUnpickler(pickle._Unpickler):
    """Resolves the names of a state dict, and nothing else."""

    def __init__(self, table: bytes, storages: _Storages, path: Path):
        super().__init__(io.BytesIO(table))
        self._storages, self._path = storages, path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if module == "torch" and name in STORAGE_DTYPES:
            return _StorageType(STORAGE_DTYPES[name])
        raise FileError(
            f"{self._path.name}: asks for {module}.{name}, which a checkpoint of plain tensors "
            "never needs; nothing was run. Do not load this file with torch.load either, unless "
            "you trust its author"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), _, int()):
                return self._storages.find(key, dtype)
        raise FileError(f"{self._path.name}: refers to an unknown kind of storage")

    def _rebuild_tensor(self, storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> Slot:
        """Returns a slot after checking that every element lies inside its storage."""
        numbers_ok = (
            isinstance(storage, _Storage)
            and _is_sizes(shape)
            and _is_sizes(strides)
            and _is_sizes((start,))
            and len(shape) == len(strides)
        )
        if not numbers_ok:
            raise FileError(f"{self._path.name}: describes a tensor with malformed sizes")
        last = start + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        if 0 not in shape and last >= storage.num_elements:
            raise FileError(
                f"{self._path.name}: a tensor of shape {shape} reaches element {last} of a storage "
                f"that holds {storage.num_elements}: the file is truncated or damaged"
            )
        offset = storage.offset + start * storage.dtype.itemsize
        return Slot(self._path, storage.dtype, shape, strides, offset)


def _is_sizes(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(type(n) is int and n >= 0 for n in numbers)


def _read_table(archive: zipfile.ZipFile, path: Path) -> tuple[str, bytes]:
    """Returns the archive's inner folder name and the bytes of its pickle."""
    tables = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
    if len(tables) != 1:
        raise FileError(
            f"{path.name}: is a zip archive with {len(tables)} files named data.pkl, expected 1: "
            "not a file written by torch.save"
        )
    if tables[0].file_size > MAX_PICKLE_BYTES:
        raise FileError(
            f"{path.name}: its data.pkl has {tables[0].file_size} bytes, at most "
            f"{MAX_PICKLE_BYTES} are read"
        )
    folder = tables[0].filename.removesuffix("/data.pkl")
    if f"{folder}/byteorder" in archive.namelist():
        order = archive.read(f"{folder}/byteorder")
        if order != b"little":
            raise FileError(f"{path.name}: byte order is {order!r}, expected b'little'")
    return folder, archive.read(tables[0])


def _restricted_load(table: bytes, storages: _Storages, path: Path) -> Any:
    try:
        return _RestrictedUnpickler(table, storages, path).load()
    except FileError:
        raise
    except Exception as error:  # a damaged pickle may fail in any way
        raise FileError(
            f"{path.name}: its data.pkl cannot be read ({type(error).__name__})"
        ) from error


def _slots(contents: Any, path: Path) -> dict[str, Slot]:
    # Training frameworks often wrap the weights: {"state_dict": {...}, "epoch": ...}.
    if isinstance(contents, dict) and isinstance(contents.get("state_dict"), dict):
        contents = contents["state_dict"]
    if not isinstance(contents, dict):
        raise FileError(f"{path.name}: holds a {type(contents).__name__}, expected a state dict")
    odd = [name for name, value in contents.items() if not isinstance(value, Slot)]
    if odd:
        raise FileError(f"{path.name}: these entries are not tensors: {', '.join(map(str, odd))}")
    return dict(contents)


def _not_a_zip(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(512)
    if start[:1] == b"\x80" or start[257:262] == b"ustar":
        return (
            "is in PyTorch's legacy format (before 1.6); with PyTorch at hand, write it again by "
            "torch.save(torch.load(path, weights_only=True), path), or save it as safetensors"
        )
    if start[:4] == b"PK\x03\x04":
        return "is truncated (its zip directory is missing); copy or download it again"
    return "is not a PyTorch file"
