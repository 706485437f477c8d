"""The golden checkpoint as a released folder, loaded the way users load one, and its answers."""

import atexit
import base64
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import qwenvl_jax

GOLDEN = Path(__file__).parent / "golden"
CASES = ("text_short", "text_long", "one_image", "two_images", "image_long")
NUM_RANKS = 206  # what puts <img> at the id that the checkpoint expects
PICTURES_OF = {"one_image": [0], "two_images": [1, 0], "image_long": [1]}


@functools.cache
def outputs() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "tiny.outputs.safetensors")


def ids(case: str) -> list[int]:
    return outputs()[f"{case}.ids"].tolist()


def pictures(case: str) -> np.ndarray | None:
    return outputs()["image224.uint8"][PICTURES_OF[case]] if case in PICTURES_OF else None


def greedy(case: str) -> list[int]:
    return outputs()[f"{case}.greedy"].tolist()


def write_folder(folder: Path, *, with_tokenizer: bool = False) -> None:
    """Writes a released folder; its vocabulary has one id for each byte below 206, so ASCII."""
    shutil.copyfile(GOLDEN / "tiny.config.json", folder / "config.json")
    shutil.copyfile(GOLDEN / "tiny.weights.safetensors", folder / "model.safetensors")
    if with_tokenizer:
        lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(NUM_RANKS)]
        (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n")


def load(mesh=None, dtype="float32"):
    """Returns a new VL of the golden weights; it has compiled nothing yet."""
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name))
        return qwenvl_jax.from_pretrained(name, dtype=dtype, mesh=mesh)


@functools.cache
def model():
    """Returns the VL that tests share, vocabulary included, with what it has compiled so far."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_folder(folder, with_tokenizer=True)
    return qwenvl_jax.from_pretrained(folder, dtype="float32")
