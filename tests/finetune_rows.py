"""A small fine-tuning file with its pictures, good or bad, as a person would have it."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_jax.config import DataConfig
from qwenvl_jax.data.record import Record

NANO = "configs/nano/scenes.tiktoken"
SLOTS = 4
SIDE = 28


def encoded(number: int, kind: str = "PNG", side: int = 33, mode: str = "RGB") -> bytes:
    """Returns a picture whose colour tells its number."""
    colour = (number % 256, number // 256, 77)
    data = io.BytesIO()
    Image.new("RGB", (side, side - 4), colour).convert(mode).save(data, kind)
    return data.getvalue()


def write_rows(folder: Path, count: int, name: str = "rows.json", first: int = 0) -> str:
    """Returns a file of dialogues whose answers tell their number; a third has no picture."""
    rows = []
    for number in range(first, first + count):
        question = f"Which one? {'It is. ' * (number % 7)}"
        if number % 3:
            (folder / f"{number}.png").write_bytes(encoded(number))
            question = f"Picture 1: <img>{number}.png</img>\n{question}"
        turns = [("user", question), ("assistant", f"number {number}")]
        conversations = [{"from": who, "value": value} for who, value in turns]
        rows.append({"id": f"row-{number}", "conversations": conversations})
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


class Rows:
    """A source of records that are there already; an error among them is raised when read."""

    def __init__(self, rows: Sequence[Record | Exception]):
        self._rows = list(rows)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self._rows).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        if isinstance(row, Exception):
            raise row
        return row


def data_config(**changes) -> DataConfig:
    settings = {
        "source": "rows",
        "length": 160,
        "max_images": 3,
        "image_size": SIDE,
        "rows": 4,
        "tokenizer": NANO,
    }
    return DataConfig(**(settings | changes))


def numbers_in(batch, tokenizer) -> list[int]:
    """Returns the numbers of the samples of a batch, row by row."""
    found = []
    for tokens, segment in zip(batch.tokens, batch.segment, strict=True):
        for sample in range(1, segment.max() + 1):
            text = tokenizer.decode(tokens[segment == sample])
            found.append(int(text.rsplit("number ", 1)[1].split("<|im_end|>")[0]))
    return found


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
