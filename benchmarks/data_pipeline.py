"""How fast pictures come through the data pipeline, as ratios to doing only what must be done.

    python benchmarks/data_pipeline.py

Writes 96 JPEG files of 640 x 480 and a fine-tuning file about them into a temporary folder, then
lets the ways take turns, several times, and prints medians of the ratios of each round:

    bare      Pillow decodes and resizes the files, nothing else, on one core
    pipeline  rows planned, read, tokenised, decoded, resized, packed: one worker's work in this
              process, threads of this process, 1 and 2 worker processes
    torch     a DataLoader with as many processes that reads, tokenises, decodes, resizes, collates

Six minutes on two free cores. PyTorch comes with the extra `bench`; without it its lines are left
out.
"""

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_jax.config import DataConfig
from qwenvl_jax.data.canvas import Canvases
from qwenvl_jax.data.pipeline import batches
from qwenvl_jax.data.rows import RowMaker, canvas_shape, open_rows, open_sources
from qwenvl_jax.data.sources.conversations import Conversations
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.prompt.tokenizer import load_tokenizer

SIDE, SLOTS, MAX_IMAGES, ROWS = 448, 256, 7, 8
NUM_FILES, WIDTH, HEIGHT = 96, 640, 480
VOCABULARY = Path(__file__).parents[1] / "qwenvl_jax" / "assets" / "nano"
DRAINED, TIMED = 18, 18  # batches a turn: those that workers made before the clock ran, and after


def write_files(folder: Path) -> Path:
    """Returns a fine-tuning file of dialogues about as many pictures with the grain of photos."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(NUM_FILES):
        coarse = random.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        grain = random.normal(0, 8, (HEIGHT, WIDTH, 3))
        pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=85)
        question = f"Picture 1: <img>{number}.jpg</img>\nWhat is it?"
        turns = [("user", question), ("assistant", "a red star")]
        rows.append({"conversations": [{"from": who, "value": text} for who, text in turns]})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# --- the ways: each yields the number of pictures that it has just finished -----------------------


def bare(path: Path) -> Iterator[int]:
    files = itertools.cycle(sorted(path.parent.glob("*.jpg")))
    while True:
        for file in itertools.islice(files, ROWS * MAX_IMAGES):
            image = Image.open(file).convert("RGB")
            np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        yield ROWS * MAX_IMAGES


def data_config(path: Path, num_workers: int) -> DataConfig:
    return DataConfig(
        source="rows",
        path=str(path),
        length=2300,  # seven of these samples
        max_images=MAX_IMAGES,
        image_size=SIDE,
        rows=ROWS,
        tokenizer=str(VOCABULARY),
        num_workers=num_workers,
    )


def pipeline(path: Path, num_workers: int) -> Iterator[int]:
    for batch in batches(data_config(path, num_workers), 0, slots=SLOTS):
        yield int((batch.image_start < 2**30).sum())


def worker(path: Path) -> Iterator[int]:
    """What a worker process does, in this one: batches made on one core, without a queue."""
    config, tokenizer = data_config(path, 1), load_tokenizer(VOCABULARY, slots=SLOTS)
    opened = open_rows(config, tokenizer, 0, open_sources(config, tokenizer))
    canvases = Canvases(canvas_shape(config, ROWS))
    make = RowMaker(config, tokenizer, opened, range(ROWS), canvases)
    for step in itertools.count():
        batch, _ = make(step)
        yield int((batch.image_start < 2**30).sum())


class TorchRows:
    """The same rows as a map-style dataset: token ids and pixels of one picture."""

    def __init__(self, path: Path):
        self._source = Conversations(path)
        self._tokenizer = load_tokenizer(VOCABULARY, slots=SLOTS)

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> tuple:
        import torch

        example = example_of(self._source[index * 31 % NUM_FILES], self._tokenizer)
        (picture,) = example.images
        assert isinstance(picture, Path)
        with Image.open(picture) as file:
            image = file.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return torch.from_numpy(example.ids), torch.from_numpy(np.array(image))


def torch_loader(path: Path, num_workers: int) -> Iterator[int]:
    from torch.nn.utils.rnn import pad_sequence
    from torch.utils.data import DataLoader, default_collate

    def collate(samples: list) -> tuple:
        ids, images = zip(*samples, strict=True)
        return pad_sequence(list(ids), batch_first=True), default_collate(list(images))

    loader = DataLoader(
        TorchRows(path),  # pyright: ignore[reportArgumentType]  a dataset by its methods
        batch_size=ROWS * MAX_IMAGES,
        num_workers=num_workers,
        collate_fn=collate,
    )
    for _, images in loader:
        yield len(images)


# --- timing --------------------------------------------------------------------------------------

Way = Callable[[], Iterator[int]]
Speeds = dict[str, list[float]]


def core_turn(way: Way) -> float:
    """Returns pictures a second of a core: what other programs take does not count."""
    return turn(way, family_time)


def clock_turn(way: Way) -> float:
    """Returns pictures a second by the clock."""
    return turn(way, time.perf_counter)


def one_core_turn(way: Way) -> float:
    """Returns pictures a second by the clock where this process may use one core only."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    speed = clock_turn(way)
    os.sched_setaffinity(0, allowed)
    return speed


def turn(way: Way, clock: Callable[[], float]) -> float:
    pictures = way()
    for _ in range(DRAINED):
        next(pictures)
    start = clock()
    speed = sum(itertools.islice(pictures, TIMED)) / (clock() - start)
    del pictures
    gc.collect()  # ends worker processes
    return speed


def family_time() -> float:
    """Returns seconds of a core that this process and its workers have used so far."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        status = Path(f"/proc/{child.pid}/stat").read_text(encoding="ascii")
        user, system = status.rpartition(")")[2].split()[11:13]  # proc(5): utime and stime
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def compare(ways: dict[str, Way], rounds: int, turn: Callable[[Way], float]) -> Speeds:
    """Returns each way's speeds, measured in turns."""
    speeds: Speeds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            speeds[name].append(turn(way))
    return speeds


def ratio(speeds: Speeds, one: str, other: str) -> str:
    """Returns the median of the ratios of each round, and their range."""
    found = sorted(a / b for a, b in zip(speeds[one], speeds[other], strict=True))
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def show(name: str, speeds: Speeds, one: str, other: str) -> None:
    print(f"{name:<60} {ratio(speeds, one, other)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="How fast pictures come through the data pipeline."
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    has_torch = importlib.util.find_spec("torch") is not None
    with tempfile.TemporaryDirectory() as folder:
        path = write_files(Path(folder))

        def ways(make: Callable[[Path, int], Iterator[int]], counts: Iterable[int]) -> list[Way]:
            return [functools.partial(make, path, count) for count in counts]

        threads, one, two = ways(pipeline, [0, 1, 2])
        core: dict[str, Way] = {
            "bare": functools.partial(bare, path),
            "worker": functools.partial(worker, path),
            "threads": threads,
            "one": one,
        }
        if has_torch:
            core["torch"], core["torch one"] = ways(torch_loader, [0, 1])
        speeds = compare(core, rounds, core_turn)
        print("pictures a core's second:")
        show("a worker's work to the bare loop", speeds, "worker", "bare")
        show("threads to the bare loop", speeds, "threads", "bare")
        show("a worker process, handing over included, to the bare loop", speeds, "one", "bare")
        if has_torch:
            show("threads to DataLoader without workers", speeds, "threads", "torch")
            show("a worker process to DataLoader with one", speeds, "one", "torch one")
        else:
            print("no comparison with DataLoader: PyTorch is not installed (extra `bench`)")
        speeds = compare({"one": one, "two": two, "threads": threads}, rounds, clock_turn)
        speeds |= compare({"one core": threads}, rounds, one_core_turn)
        print(f"pictures a second by the clock, {len(os.sched_getaffinity(0))} cores:")
        show("threads on all cores to one core", speeds, "threads", "one core")
        show("2 worker processes to 1", speeds, "two", "one")
        show("2 worker processes to threads", speeds, "two", "threads")


if __name__ == "__main__":
    main()
