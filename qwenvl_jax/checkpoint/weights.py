"""A folder of weights for inference: `config.json`, the tokenizer's file, `weights/`, a manifest.

`weights/` is an ordinary Orbax checkpoint of a flat dict, dotted path -> array, which any Orbax
restores onto any mesh. It is written array by array and slice by slice, so a model larger than the
memory can be written. `weights.json` holds the sha256 of every array's bytes in C order: Orbax does
not notice a flipped bit.

Orbax lays the folder out around placeholders, and TensorStore writes the arrays in their place,
because Orbax itself only saves arrays that are in memory. Plain zarr files rather than Orbax's
OCDBT database: that one gathers data files of gigabytes in memory before writing them.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from qwenvl_jax.checkpoint.leaves import (
    DTYPES,
    Leaf,
    OnBytes,
    digest_leaf,
    disk_bytes,
    open_leaf,
    unwatched,
    write_leaf,
)
from qwenvl_jax.checkpoint.narration import leave_only_news
from qwenvl_jax.checkpoint.parts import restore_in_parts
from qwenvl_jax.checks import check_types
from qwenvl_jax.config import (
    AdapterConfig,
    ConfigError,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    VisionConfig,
    to_dict,
)
from qwenvl_jax.files import is_full_disk, json_text
from qwenvl_jax.sharding import fill, named_arrays

MANIFEST = "weights.json"
WEIGHTS = "weights"
TOKENIZER = "qwen.tiktoken"
FORMAT = 1


class WeightsError(ValueError):
    """A folder of weights that cannot be used: what is wrong, and how to fix it."""


def is_weights_folder(path: str | Path) -> bool:
    """Returns whether `path` is a folder of ours (whatever state it is in)."""
    return (Path(path) / MANIFEST).is_file()


def check_ours(source: Path) -> None:
    """Raises WeightsError where a folder is not one of our weights folders."""
    if not is_weights_folder(source):
        raise WeightsError(
            f"{source} is no weights folder of ours: make one of it with "
            "'python convert.py import SRC DST'"
        )


# --- writing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends without error.

    On any error, an interrupt included, it is removed, with the folders above it that were made,
    and nothing is left at `path`. What a kill has left beside it is named.

    Raises:
        WeightsError: `path` is there already.
        OSError: the disk is full.
    """
    path = check_new(path)
    made = [parent for parent in path.parents if not parent.exists()]  # the innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        told = "is of a conversion that was killed, or is under way: remove it if it is not"
        print(f"{left} {told}", file=sys.stderr)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp makes it private
        yield partial
        for file in (partial, *partial.rglob("*")):
            _flush(file)
        partial.rename(path)
        made = []
    except Exception as error:
        if not is_full_disk(error):
            raise
        told = "the disk is full: free some, or write elsewhere"
        raise OSError(errno.ENOSPC, told, str(path.parent)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # somebody else's by now
                parent.rmdir()


def check_new(path: str | Path) -> Path:
    """Returns the place where a new folder is to be: of a link, what it points at.

    Raises:
        WeightsError: something is there already, or a disk is mounted there.
    """
    real = Path(os.path.realpath(path))
    if real.is_symlink() or (real.exists() and not (real.is_dir() and not any(real.iterdir()))):
        raise WeightsError(f"{path} is there already: name a new folder, or remove it first")
    if os.path.ismount(real):  # a folder cannot be renamed onto one
        raise WeightsError(
            f"{path} is the top of a mounted disk, expected a new folder: name a folder inside it"
        )
    return real


def write_weights(
    folder: Path, config: ModelConfig, leaves: Mapping[str, Leaf], on_bytes: OnBytes = unwatched
) -> None:
    """Writes config, arrays and manifest into `folder`, holding one block in memory at a time."""
    leave_only_news()
    check_space(folder, sum(disk_bytes(leaf) for leaf in leaves.values()))
    weights = (folder / WEIGHTS).resolve()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(weights, {path: np.zeros(1, np.float32) for path in leaves})
    arrays = {}
    for path, leaf in sorted(leaves.items()):
        digest = write_leaf(weights / path, leaf, on_bytes)
        arrays[path] = {
            "shape": list(leaf.shape),
            "dtype": leaf.dtype.name,
            "sha256": digest,
        }
    (folder / "config.json").write_text(json_text(to_dict(config)), encoding="utf-8")
    manifest = {"format": FORMAT, "arrays": arrays}
    (folder / MANIFEST).write_text(json_text(manifest), encoding="utf-8")


def save_weights(
    path: str | Path, config: ModelConfig, state: nnx.State, tokenizer: str | Path | None = None
) -> None:
    """Writes a new folder from a model in memory; `tokenizer` is the vocabulary file to put in it.

    Raises:
        WeightsError: the folder is there already, or the arrays are spread over several processes.
    """
    leaves = {}
    for name, array in named_arrays(state).items():
        if not array.is_fully_addressable:
            raise WeightsError(
                f"{name} is spread over several processes: convert the run's checkpoint in a "
                "single process instead"
            )
        leaves[name] = Leaf(array.shape, np.dtype(array.dtype), _HostCopy(array))
    with new_folder(path) as folder:
        write_weights(folder, config, leaves)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, folder / TOKENIZER)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the vocabulary file of one folder into another, where there is one."""
    if (source / TOKENIZER).is_file():
        shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)


def check_space(folder: Path, needed: int) -> None:
    """Raises a WeightsError when `needed` bytes do not fit on the disk that holds `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WeightsError(
            f"the disk of {folder.parent} is too full: got {free / 1e9:.1f} GB free, expected "
            f"{needed / 1e9:.1f} GB; free some, or write elsewhere"
        )


class _HostCopy:
    """Reads parts of a device array through one copy, which lasts until its last part is read."""

    def __init__(self, array: jax.Array):
        self._array, self._host, self._left = array, None, array.shape[0]

    def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
        if self._host is None:
            self._host = np.asarray(self._array)
        part = self._host[index]
        self._left -= part.shape[0]
        if self._left <= 0:
            self._host = None
        return part


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading ------------------------------------------------------------------------------------


def read_weights_config(path: str | Path) -> ModelConfig:
    """Returns the model config of a folder of ours.

    Raises:
        WeightsError: the file is missing, is not JSON, or does not describe a model.
    """
    file = Path(path) / "config.json"
    return model_config_from_dict(_read_json(file), file)


def model_config_from_dict(fields: dict[str, Any], where: str | Path) -> ModelConfig:
    """Returns the config that `config.to_dict` made these fields of; `where` is for errors."""
    parts = {"vision": VisionConfig, "adapter": AdapterConfig, "decoder": DecoderConfig}
    try:
        made = {name: _from_dict(kind, fields.get(name)) for name, kind in parts.items()}
        lora = fields.get("lora", {})
        if isinstance(lora, dict):  # JSON has no tuples
            lora = lora | {"targets": tuple(lora.get("targets", ()))}
        made["lora"] = _from_dict(LoraConfig, lora)
        return _from_dict(ModelConfig, fields | made)
    except (ConfigError, TypeError) as error:
        raise WeightsError(f"{where} does not describe a model: {error}") from error


def open_weights(path: str | Path) -> dict[str, Leaf]:
    """Returns every array of a folder of ours, by dotted path, to be read in parts.

    Raises:
        WeightsError: files are missing, or disagree with the manifest; all of them are named.
    """
    path = Path(path)
    leaves, problems = {}, []
    for name, entry in _read_manifest(path).items():
        try:
            directory = (path / WEIGHTS / name).resolve()
            leaves[name] = open_leaf(directory, tuple(entry["shape"]), entry["dtype"])
        except ValueError as error:
            problems.append(f"{name}: {str(error).splitlines()[0][:200]}")
    if problems:
        raise WeightsError(_damaged(path, problems))
    return leaves


def verify_weights(path: str | Path, on_bytes: OnBytes = unwatched) -> None:
    """Reads every array once and compares its sha256 with the manifest.

    Raises:
        WeightsError: naming every array that is not what was written.
    """
    path = Path(path)
    manifest, leaves = _read_manifest(path), open_weights(path)

    def problem(name: str) -> str | None:
        try:
            digest = digest_leaf(leaves[name], on_bytes)
        except ValueError as error:
            return f"{name}: {str(error).splitlines()[0][:200]}"
        return None if digest == manifest[name]["sha256"] else f"{name}: its sha256 has changed"

    # Hashing lets go of the interpreter, so threads do run side by side.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = [found for found in pool.map(problem, leaves) if found]
    if problems:
        raise WeightsError(_damaged(path, problems))


def load_weights_folder(path: str | Path, abstract: nnx.State, *, verify: bool = True) -> nnx.State:
    """Returns the model's state, each array read straight into its sharding and dtype.

    `abstract` is that of `model.qwenvl.abstract_state(config, mesh)`; each device's process reads
    only the chunks it needs, after `verify` has read everything once.

    Raises:
        WeightsError: arrays are missing, unknown, misshapen or (`verify`) damaged.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    wanted = named_arrays(abstract)
    problems = [f"{name} is unknown" for name in manifest if name not in wanted]
    for name, array in wanted.items():
        if name not in manifest:
            problems.append(f"{name} is missing")
        elif tuple(manifest[name]["shape"]) != array.shape:
            problems.append(
                f"{name} is misshapen: got {tuple(manifest[name]['shape'])}, expected {array.shape}"
            )
    if problems:
        raise WeightsError(f"{path} does not hold this model: " + "; ".join(problems))
    if verify:
        verify_weights(path)
    leave_only_news()
    folder = (path / WEIGHTS).resolve()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        arrays = restore_in_parts(lambda args: checkpointer.restore(folder, args=args), wanted)
    return fill(abstract, arrays)


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise WeightsError(
            f"{path / MANIFEST} has format {manifest.get('format')}, expected {FORMAT}: written by "
            "another version of this package"
        )
    arrays = manifest.get("arrays")
    if not isinstance(arrays, dict) or not all(map(_is_entry, arrays.values())):
        raise WeightsError(
            f"{path / MANIFEST} is damaged: expected a shape, a dtype and a sha256 for each array; "
            "copy or convert the folder again"
        )
    return arrays


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(shape := entry.get("shape"), list)
        and all(type(size) is int for size in shape)
        and entry.get("dtype") in DTYPES
        and isinstance(entry.get("sha256"), str)
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing: not a complete folder of weights") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON: {error}") from error
    if not isinstance(contents, dict):
        raise WeightsError(f"{file} holds a {type(contents).__name__}, expected an object")
    return contents


def _from_dict(kind: type, fields: Any) -> Any:
    if not isinstance(fields, dict):
        raise ConfigError(f"no {kind.__name__} in it")
    known = sorted(field.name for field in dataclasses.fields(kind))
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ConfigError(f"unknown fields {', '.join(unknown)}, expected {', '.join(known)}")
    check_types(kind, fields)
    return kind(**fields)


def _damaged(path: Path, problems: list[str]) -> str:
    return f"{path} is damaged, copy or convert it again: " + "; ".join(problems)
