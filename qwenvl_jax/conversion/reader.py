"""Opens a released folder: all its tensors by name, whichever files hold them.

A folder has `*.safetensors` or zip-format `pytorch_model*.bin` files, one or many; many come with
an index `*.index.json` whose `weight_map` says which shard holds which name. Opening reads headers
only. What is wrong is collected, so that one error can name all of it.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwenvl_jax.conversion.safetensors_file import read_safetensors
from qwenvl_jax.conversion.slots import ConversionError, FileError, MappedFiles, Slot
from qwenvl_jax.conversion.torch_zip import read_torch_zip

# The first pattern that matches anything names the files to read: safetensors before pickles.
# OpenCLIP folders may hold the same tower once more under other names, hence its own files first.
FILE_PATTERNS = (
    "open_clip*.safetensors",
    "open_clip*.bin",
    "model*.safetensors",
    "*.safetensors",
    "pytorch_model*.bin",
    "*.bin",
)


class ReleasedFolder:
    """The tensors of a released folder (or of one weights file), read when asked for.

    `problems` lists what was wrong with the files; callers add what is wrong with the names and
    raise everything at once as a `ConversionError`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.slots: dict[str, Slot] = {}
        self.problems: list[str] = []
        self._files = MappedFiles()
        if not self.path.exists():
            raise ConversionError(path, ["no such file or folder"])
        files = [self.path] if self.path.is_file() else self._weight_files()
        for file in files:
            self._add_file(file)
        if self.path.is_dir():
            self._check_index()

    def tensor(self, name: str) -> np.ndarray:
        """Returns a read-only view of one tensor; nothing is read until its elements are."""
        return self._files.view(self.slots[name])

    def config(self) -> dict:
        """Returns `config.json` as it is. Raises: ConversionError if it is missing or not JSON."""
        return read_json(self.path / "config.json")

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> "ReleasedFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _weight_files(self) -> list[Path]:
        for pattern in FILE_PATTERNS:
            files = sorted(self.path.glob(pattern))
            if files:
                self._pattern = pattern
                return files
        raise ConversionError(
            self.path, ["holds no *.safetensors and no pytorch_model*.bin; name the model's folder"]
        )

    def _add_file(self, file: Path) -> None:
        read = read_torch_zip if file.suffix != ".safetensors" else read_safetensors
        try:
            slots = read(file)
        except FileError as error:
            self.problems.append(str(error))
            return
        except OSError as error:
            self.problems.append(f"{file.name}: cannot be read: {error.strerror}")
            return
        for name, slot in slots.items():
            if name in self.slots:
                first = self.slots[name].file.name
                self.problems.append(f"{name} is in two files: {first} and {file.name}")
            else:
                self.slots[name] = slot

    def _check_index(self) -> None:
        """Collects where the index, if there is one, and the files disagree."""
        suffix = Path(self._pattern).suffix
        for file in sorted(self.path.glob(f"*{suffix}.index.json")):
            present = {slot.file.name for slot in self.slots.values()}
            for name, shard in _weight_map(file):
                if not (self.path / shard).is_file():
                    problem = f"{shard}: is named by {file.name} but is not there"
                elif shard in present and name not in self.slots:
                    problem = f"{name} is missing: {file.name} says it is in {shard}"
                else:
                    continue
                if problem not in self.problems:
                    self.problems.append(problem)


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file. Raises: ConversionError naming the file."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        missing = path.name if path.parent.is_dir() else "the folder itself"
        raise ConversionError(path.parent, [f"{missing} is missing"]) from error
    except ValueError as error:
        raise ConversionError(path, [f"is not JSON: {error}"]) from error
    if not isinstance(contents, dict):
        raise ConversionError(path, [f"holds a {type(contents).__name__}, expected an object"])
    return contents


def _weight_map(file: Path) -> Iterator[tuple[str, str]]:
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConversionError(file, ["has no weight_map"])
    for name, shard in weight_map.items():
        # Only a plain file name: an index must not point out of its folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConversionError(file, [f"{name} is in {shard!r}, expected a file name"])
        yield name, shard
