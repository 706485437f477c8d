"""Preparation and reading of rows: rows a second, and what a million rows cost to open.

    python benchmarks/prepare_rows.py [--rows 1000000] [--pictures 4000]

Writes about 1 GB into a temporary folder. Pictures are JPEGs of noise that is smooth enough to
have a photo's size; they go through the rules for web sets and the shipped vocabulary.
"""

import argparse
import dataclasses
import io
import os
import pickle
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import qwenvl_jax
from qwenvl_jax.data.prepare import prepare, processes
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.shard import Plan
from qwenvl_jax.data.sources.prepared import INDEX, Prepared
from qwenvl_jax.data.sources.stream import InRanges
from qwenvl_jax.data.sources.tar_shards import TarShards

NANO = Path(qwenvl_jax.__file__).parent / "assets" / "nano"
NUM_SHARDS = 8


@dataclasses.dataclass(frozen=True)
class Sentences:
    """Short rows of text, so that counting and not copying is what is measured."""

    num_rows: int
    fingerprint: str = "sentences"

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Record:
        return Record(f"sentences/{index}", "text", {"text": f"number {index} of many rows"})


def write_tars(folder: Path, num_pictures: int) -> None:
    """Writes tar shards of pictures of 640 x 480 with captions."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    encoded = []
    for _ in range(16):
        coarse = Image.fromarray(noise.integers(0, 256, (60, 80, 3), np.uint8))
        data = io.BytesIO()
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
        encoded.append(data.getvalue())
    print(f"a picture has {np.mean([len(data) for data in encoded]) / 1e3:.0f} kB")
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(num_pictures // NUM_SHARDS):
                caption = f"photo {number} of a <b>red</b> star on a blue ground"
                for kind, data in (("jpg", encoded[number % 16]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def measure_prepare(plan: Plan, num_workers: int) -> str:
    """Returns rows a second, and what does not depend on how busy the machine is."""
    start, busy = time.perf_counter(), processor_seconds()
    rows = prepare(plan, processes(num_workers))["rows"]
    rate = rows / (time.perf_counter() - start)
    busy = 1e6 * (processor_seconds() - busy) / rows
    return f"{rate:.0f} rows a second, {busy:.0f} us of processor time a row"


def processor_seconds() -> float:
    """Returns what this process and those that it has waited for have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def resident() -> float:
    """Returns the MiB of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_open(folder: Path) -> None:
    """Prints the seconds and the memory of opening a folder; run in a process of its own."""
    before = resident()
    start = time.perf_counter()
    rows = Prepared(folder)
    seconds = time.perf_counter() - start
    print(f"open {len(rows)} rows: {seconds:.3f} s, {resident() - before:.1f} MiB more")
    print(f"pickled for a worker: {len(pickle.dumps(rows)) / 1e3:.0f} kB")
    picks = random.Random(0).sample(range(len(rows)), 20_000)
    start = time.perf_counter()
    for pick in picks:
        assert rows[pick].key == f"sentences/{pick}"
    rate = len(picks) / (time.perf_counter() - start)
    print(f"random rows: {rate:.0f} a second, {resident() - before:.1f} MiB more by then")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open is not None:
        measure_open(arguments.open)
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_tars(root / "tars", arguments.pictures)
        for num_workers in (1, 2):
            stream, folder = TarShards(root / "tars"), root / f"pictures{num_workers}"
            plan = Plan(stream=stream, folder=folder, rules=("web",), tokenizer=NANO)
            told = measure_prepare(plan, num_workers)
            print(f"prepare pictures, {num_workers} processes: {told}")
        sentences = Sentences(arguments.rows)
        plan = Plan(stream=InRanges(sentences, 10_000, len(sentences)), folder=root / "many")
        print(f"prepare short texts, 2 processes: {measure_prepare(plan, 2)}")
        print(f"{INDEX}: {(root / 'many' / INDEX).stat().st_size / 1e3:.0f} kB")
        run = [sys.executable, __file__, "--open", str(root / "many")]
        subprocess.run(run, check=True)


if __name__ == "__main__":
    main()
