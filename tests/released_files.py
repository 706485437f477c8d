"""Released checkpoints for tests: the golden one, and `.bin` files written without PyTorch."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from qwenvl_jax.conversion.reader import ReleasedFolder
from qwenvl_jax.conversion.safetensors_file import write_safetensors

GOLDEN = Path(__file__).parent / "golden"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STORAGES = {
    BFLOAT16: "BFloat16Storage",
    np.dtype("<f2"): "HalfStorage",
    np.dtype("<f4"): "FloatStorage",
    np.dtype("<i8"): "LongStorage",
}


def golden_tensors() -> dict[str, np.ndarray]:
    """Returns the golden checkpoint's tensors, as copies."""
    with ReleasedFolder(GOLDEN / "tiny.weights.safetensors") as folder:
        return {name: folder.tensor(name).copy() for name in folder.slots}


def write_folder(folder: Path, tensors: dict[str, np.ndarray], config: dict | None = None) -> Path:
    """Writes a released folder with one safetensors file; `config` None is the golden one."""
    folder.mkdir(parents=True)
    save_safetensors(folder / "model.safetensors", tensors)
    if config is None:
        shutil.copy(GOLDEN / "tiny.config.json", folder / "config.json")
    else:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(path, shapes, tensors.values())


def save_torch_zip(path: Path, tensors: dict[str, np.ndarray], **archive) -> None:
    """Writes a `.bin` file opcode by opcode, as torch.save lays it out; keeps arrays' strides."""
    storages, items = [], b""
    for name, tensor in tensors.items():
        owner = tensor if tensor.base is None else tensor.base
        if not any(owner is storage for storage in storages):
            storages.append(owner)
        key = next(i for i, storage in enumerate(storages) if storage is owner)
        start = (tensor.ctypes.data - owner.ctypes.data) // tensor.itemsize
        strides = tuple(step // tensor.itemsize for step in tensor.strides)
        items += plain(name) + torch_tensor(owner, str(key), start, tensor.shape, strides)
    save_archive(path, b"}(" + items + b"u", storages, **archive)


def save_archive(
    path: Path,
    value: bytes,
    storages: list[np.ndarray],
    byteorder: bytes = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Writes a zip whose data.pkl consists of the opcodes `value`."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + value + b".")
        archive.writestr("archive/byteorder", byteorder)
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage.tobytes())
        archive.writestr("archive/version", b"3\n")


def torch_tensor(owner: np.ndarray, key: str, start: int, shape: tuple, strides: tuple) -> bytes:
    """Returns the opcodes of one tensor: a call of _rebuild_tensor_v2 on its storage."""
    storage = (
        b"("
        + plain("storage")
        + f"ctorch\n{STORAGES[owner.dtype]}\n".encode()
        + plain(key)
        + plain("cpu")
        + plain(owner.size)
        + b"tQ"
    )
    hooks = b"ccollections\nOrderedDict\n)R"
    sizes = plain(start) + plain(shape) + plain(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + sizes + plain(False) + hooks + b"tR"


def plain(value) -> bytes:
    """Returns the opcodes that push a plain Python value."""
    return pickle.dumps(value, 2)[2:-1]


def bits(tensors: dict[str, np.ndarray]) -> dict[str, tuple]:
    """Returns what must be equal for two checkpoints to be the same."""
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in tensors.items()}


def read_all(folder: Path) -> dict[str, np.ndarray]:
    with ReleasedFolder(folder) as released:
        assert released.problems == []
        return {name: released.tensor(name).copy() for name in released.slots}
