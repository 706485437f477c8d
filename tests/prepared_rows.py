"""Small sources for the tests of preparation; a module, so that spawned processes find them."""

import dataclasses
import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.prepare import prepare, processes
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.shard import Plan
from qwenvl_jax.data.sources.stream import InRanges


def picture(width: int = 80, height: int = 70, seed: int = 0, form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(data, form)
    return data.getvalue()


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Captioned pictures; row 7 is unreadable, row 11 has half a surrogate pair.

    With a file `fault` that says "self" or "parent" the process that reads row 25, or its parent,
    is killed.
    """

    num_rows: int = 40
    fault: Path | None = None
    fingerprint: str = "pairs"

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Record:
        if index == 25 and self.fault is not None and self.fault.exists():
            victim = os.getpid() if self.fault.read_text() == "self" else os.getppid()
            os.kill(victim, signal.SIGKILL)
            signal.pause()
        if index == 7:
            raise DataError("row 7 was never written")
        text = f"picture {index}" + "\ud800" * (index == 11)
        image = picture(80 + 10 * (index % 3), 70, index)
        return Record(f"pairs/{index}", "caption", {"text": text, "language": "en"}, (image,))


def plan(folder: Path, source: Pairs, **settings) -> Plan:
    stream = InRanges(source, rows_per_shard=10, end=len(source))
    return Plan(stream=stream, folder=folder, **settings)


if __name__ == "__main__":
    folder, fault, num_workers = sys.argv[1:]
    prepare(plan(Path(folder), Pairs(fault=Path(fault))), processes(int(num_workers)))
