"""Opens a released folder: all its tensors by name, whichever files hold them.

A folder has `*.safetensors` or zip-format `pytorch_model*.bin` files, one or many; many come with
an index `*.index.json` whose `weight_map` says which shard holds which name. Which of them are read
is what transformers would read; other files beside them are not looked at. Opening reads headers
only. What is wrong is collected, so that one error can name all of it.
"""

import json
from pathlib import Path

import numpy as np

from qwenvl_jax.conversion.safetensors_file import read_safetensors
from qwenvl_jax.conversion.slots import ConversionError, FileError, MappedFiles, Slot
from qwenvl_jax.conversion.torch_zip import read_torch_zip

# The first pattern that matches anything names the files to read, or the index that names them.
# OpenCLIP folders may hold the same tower once more under other names, hence its own files first.
FILE_PATTERNS = (
    "open_clip*.safetensors",
    "open_clip*.bin",
    "model.safetensors",
    "model.safetensors.index.json",
    "*.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "*.bin.index.json",
    # Nothing says what belongs together.
    "model*.safetensors",
    "pytorch_model*.bin",
    "*.safetensors",
    "*.bin",
)
_NO_MODEL = "adapter_"  # PEFT's files may lie beside the model's


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
        self._weight_map: dict[str, str] = {}  # released name -> file name, where an index says
        self._unread: set[str] = set()  # file names
        if not self.path.exists():
            raise ConversionError(path, ["no such file or folder"])
        files = [self.path] if self.path.is_file() else self._weight_files()
        for file in files:
            self._add_file(file)

    def tensor(self, name: str) -> np.ndarray:
        """Returns a read-only view of one tensor; nothing is read until its elements are."""
        return self._files.view(self.slots[name])

    def may_hold(self, name: str) -> bool:
        """Returns whether a name that was not found may be in a file that could not be read."""
        if self._weight_map:
            return self._weight_map.get(name) in self._unread
        return bool(self._unread)

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> "ReleasedFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _weight_files(self) -> list[Path]:
        for pattern in FILE_PATTERNS:
            found = sorted(self.path.glob(pattern))
            files = [file for file in found if not file.name.startswith(_NO_MODEL)]
            if files and pattern.endswith(".index.json"):
                return self._indexed_files(files[0])
            if files:
                return files
        raise ConversionError(
            self.path, ["holds no *.safetensors and no pytorch_model*.bin; name the model's folder"]
        )

    def _indexed_files(self, index: Path) -> list[Path]:
        """Returns the files that an index names; those that are not there are problems."""
        self._weight_map = _weight_map(index)
        files = [self.path / shard for shard in sorted(set(self._weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        self.problems += [f"{name} is missing: {index.name} names it" for name in missing]
        self._unread.update(missing)
        return [file for file in files if file.name not in missing]

    def _add_file(self, file: Path) -> None:
        read = read_torch_zip if file.suffix != ".safetensors" else read_safetensors
        try:
            slots = read(file)
        except FileError as error:
            self.problems.append(str(error))
            self._unread.add(file.name)
            return
        except OSError as error:
            self.problems.append(f"{file.name}: cannot be read: {error.strerror}")
            self._unread.add(file.name)
            return
        for name, slot in slots.items():
            if name in self.slots:
                first = self.slots[name].file.name
                self.problems.append(f"{name} is in two files: {first} and {file.name}")
            else:
                self.slots[name] = slot


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file. Raises: ConversionError naming the file."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        missing = path.name if path.parent.is_dir() else "the folder itself"
        raise ConversionError(path.parent, [f"{missing} is missing"]) from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(path, [f"is not JSON: {error}"]) from error
    if not isinstance(contents, dict):
        raise ConversionError(path, [f"holds a {type(contents).__name__}, expected an object"])
    return contents


def _weight_map(file: Path) -> dict[str, str]:
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConversionError(file, ["has no weight_map"])
    for name, shard in weight_map.items():
        # Only a plain file name: an index must not point out of its folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConversionError(file, [f"{name} is in {shard!r}, expected a file name"])
    return weight_map
