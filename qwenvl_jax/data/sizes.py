"""Sizes of the rows of a source, which planning needs: asked of the source, or measured once.

Measuring tokenises every row and opens no picture. What it finds is kept in the user's cache folder
under the fingerprints of source and vocabulary, so another run on the same data starts at once.
"""

import functools
import hashlib
import os
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import FIELDS, Source
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.data.workers import WorkerKilled, parted, spread
from qwenvl_jax.files import replace
from qwenvl_jax.prompt.tokenizer import Tokenizer

UNUSABLE = -1
_FORMAT = 2  # of the cached files; another way of tokenising or checking needs another number
_PART = 1000  # rows measured in one go
_SECONDS_BETWEEN_LINES = 10


class Sizes(NamedTuple):
    """One line a row. `tokens` counts text, and two for a picture's tags but not its slots."""

    sizes: np.ndarray  # int32 [N, 2]: tokens, pictures; `UNUSABLE` for rows that cannot be used
    tasks: np.ndarray  # uint8 [N]: place of the task in `FIELDS`; empty where nobody asked


def sizes_of(
    source: Source, tokenizer: Tokenizer, *, num_workers: int = 0, with_tasks: bool = False
) -> Sizes:
    """Returns the sizes of all rows of a source; `num_workers` processes measure where needed.

    Rows that could not be used are looked at each time: a prepared file that was damaged may have
    been given back, which no fingerprint tells.

    A source may know them: its method `sizes(tokenizer)` returns the array, or None; `tasks()`
    those of the tasks.
    """
    ask, ask_tasks = getattr(source, "sizes", None), getattr(source, "tasks", None)
    known = ask(tokenizer) if ask is not None else None
    if known is not None and not with_tasks:
        return Sizes(known, np.zeros(0, np.uint8))
    if known is not None and ask_tasks is not None:
        return Sizes(known, ask_tasks())
    place = cache_folder() / f"{_digest(source, tokenizer)}.npz"
    measured = _load(place)
    if measured is None or len(measured.sizes) != len(source):
        measured = measure(source, tokenizer, num_workers)
        _save(place, measured)
    elif _mended(measured, source, tokenizer):
        _save(place, measured)
    return measured


def measure(source: Source, tokenizer: Tokenizer, num_workers: int = 0) -> Sizes:
    """Returns the sizes of all rows, each read and tokenised; progress is told on stderr."""
    parts = []
    began = told = time.monotonic()
    for part in _parts(source, tokenizer, num_workers):
        parts.append(part)
        now = time.monotonic()
        if now - told > _SECONDS_BETWEEN_LINES:
            told, done = now, min(len(parts) * _PART, len(source))
            left = (len(source) - done) * (now - began) / done
            print(
                f"measuring rows: {done:,} of {len(source):,}, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
    if not parts:
        return Sizes(np.zeros((0, 2), np.int32), np.zeros(0, np.uint8))
    sizes, tasks = zip(*parts, strict=True)
    return Sizes(np.concatenate(sizes), np.concatenate(tasks))


def _parts(source: Source, tokenizer: Tokenizer, num_workers: int) -> Iterator[Sizes]:
    measure_rows = functools.partial(_measure_rows, source, tokenizer)
    parts = parted(len(source), _PART)
    if num_workers < 2 or len(parts) < 2 * num_workers:
        yield from map(measure_rows, parts)
        return
    try:
        yield from spread(measure_rows, parts, num_workers)
    except WorkerKilled as error:
        raise DataError(f"{error}; use a smaller data.num_workers") from error


def _mended(measured: Sizes, source: Source, tokenizer: Tokenizer) -> bool:
    """Returns whether rows that could not be used now can, after noting their sizes."""
    unusable = np.flatnonzero(measured.sizes[:, 0] == UNUSABLE)
    for index in unusable.tolist():
        now = _measure_rows(source, tokenizer, range(index, index + 1))
        measured.sizes[index], measured.tasks[index] = now.sizes[0], now.tasks[0]
    return bool((measured.sizes[unusable, 0] != UNUSABLE).any())


def _measure_rows(source: Source, tokenizer: Tokenizer, rows: range) -> Sizes:
    sizes = np.full((len(rows), 2), UNUSABLE, np.int32)
    tasks = np.zeros(len(rows), np.uint8)
    order = list(FIELDS)
    for place, index in enumerate(rows):
        try:
            example = example_of(source[index], tokenizer)
        except DataError:  # told with its reason when training starts
            continue
        pictures = len(example.images)
        sizes[place] = (len(example.ids) - pictures * tokenizer.slots, pictures)
        tasks[place] = order.index(example.task)
    return Sizes(sizes, tasks)


# --- the cache -----------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Returns the folder of measured sizes: `qwenvl_jax/sizes` under `$XDG_CACHE_HOME`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwenvl_jax" / "sizes"


def _digest(source: Source, tokenizer: Tokenizer) -> str:
    text = f"{_FORMAT}\n{source.fingerprint}\n{tokenizer.fingerprint}\n"
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _load(place: Path) -> Sizes | None:
    try:
        with np.load(place) as stored:
            return Sizes(stored["sizes"], stored["tasks"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"measured again, as {place} cannot be read: {error}", file=sys.stderr)
        return None


def _save(place: Path, measured: Sizes) -> None:

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez(file, sizes=measured.sizes, tasks=measured.tasks)

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        replace(place, write)
    except OSError as error:  # measuring again is slow, not wrong
        print(f"measured sizes are not kept: {place} cannot be written: {error}", file=sys.stderr)
