"""Batches of finite sources: rows planned from sizes, read, tokenised, decoded and packed.

What a step holds follows from (seed, step) and the data alone. A process makes only its own rows of
the global batch, and pictures are decoded after the plan has said where they go.
"""

import hashlib
import itertools
import json
import random
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenvl_jax.config import DataConfig
from qwenvl_jax.data.canvas import Canvases
from qwenvl_jax.data.example import Batch, DataError, Example
from qwenvl_jax.data.holes import Hole, too_many
from qwenvl_jax.data.mixture import samples_per_round
from qwenvl_jax.data.order import Order, is_usable
from qwenvl_jax.data.packing import check_fits, image_slots, pack, pixels
from qwenvl_jax.data.record import Source
from qwenvl_jax.data.sizes import sizes_of
from qwenvl_jax.data.sources.open import CONVERSATIONS
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.data.turns import CutTurns
from qwenvl_jax.image.decode import keep_buffers
from qwenvl_jax.image.vary import varied
from qwenvl_jax.prompt.tokenizer import Tokenizer
from qwenvl_jax.words import counted

_BUFFERS = 16  # that Pillow keeps, of up to 16 MB: a thread needs three for a picture
_NAMED = 3  # unusable rows in the message that refuses a start
_ORDER_FORMAT = 1  # another number where the same settings would give another order


class Notes(NamedTuple):
    """What was met in the making of one batch."""

    num_samples: int  # good and bad
    holes: tuple[Hole, ...]
    keys: tuple[tuple[str, ...], ...]  # of the good samples of each row that was made


def keys_of(rows: Sequence[Sequence[Example]]) -> tuple[tuple[str, ...], ...]:
    """Returns the keys of the samples of each row."""
    return tuple(tuple(example.key for example in row) for row in rows)


class OpenRows(NamedTuple):
    """Finite sources, ready to be read in their order."""

    sources: dict[str, Source]  # by path, as the config gives it
    order: Order
    unusable: dict[str, np.ndarray]  # the rows of each source that no step holds


def open_sources(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Source]:
    """Returns path -> source. Raises: DataError or OSError where one cannot be opened."""
    from qwenvl_jax.data.sources.open import open_source

    sources = {path: open_source(path) for path in config.mixture or [config.path]}
    if not config.cut_turns:
        return sources
    return {path: CutTurns(source, tokenizer, config.length) for path, source in sources.items()}


def open_rows(
    config: DataConfig, tokenizer: Tokenizer, seed: int, sources: dict[str, Source]
) -> OpenRows:
    """Returns the sources of `config.path` or `config.mixture`, measured and put in order.

    Raises: DataError where one has no usable row, or too many rows are bad.
    """
    found = [
        sizes_of(
            source, tokenizer, num_workers=config.num_workers, with_tasks=config.same_task_rows
        )
        for source in sources.values()
    ]
    sizes = [part.sizes for part in found]
    unusable = {
        name: np.flatnonzero(~is_usable(array, tokenizer.slots, config.length, config.max_images))
        for name, array in zip(sources, sizes, strict=True)
    }
    _check_usable(sources, unusable, tokenizer, config)
    usable = [len(source) - len(unusable[name]) for name, source in sources.items()]
    taken = usable
    if config.mixture:
        weights = [float(weight) for weight in config.mixture.values()]
        taken = samples_per_round(usable, weights, config.mixing, config.temperature)
    order = Order(
        sizes,
        slots=tokenizer.slots,
        length=config.length,
        max_images=config.max_images,
        seed=seed,
        num_taken=taken,
        groups=[part.tasks for part in found] if config.same_task_rows else None,
    )
    return OpenRows(sources, order, unusable)


def fingerprint(config: DataConfig, tokenizer: Tokenizer, sources: dict[str, Source]) -> str:
    """Returns a digest of all that decides which tokens and pictures a step holds, save the seed.

    The rows of each source in their order, its weight, the vocabulary and the settings of the
    plan; not the paths, so data may move.
    """
    prints = [source.fingerprint for source in sources.values()]
    facts = {
        "order": _ORDER_FORMAT,
        "sources": prints,
        "weights": [float(weight) for weight in config.mixture.values()],
        "mixing": [config.mixing, config.temperature] if config.mixture else None,
        "tokenizer": tokenizer.fingerprint,
        "slots": tokenizer.slots,
        "limits": [config.rows, config.length, config.max_images, config.image_size],
        "form": [config.mask, config.same_task_rows, config.attend_across],
    }
    if config.vary_pictures:  # not where it is off, so that runs begun without it go on
        facts["vary"] = config.vary_pictures
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def contents(config: DataConfig, sources: dict[str, Source]) -> dict[str, str]:
    """Returns source -> fingerprint of its rows alone, whatever the settings make of them.

    By path in a mixture; `data.path` may move.
    """
    plain = {k: x.source if isinstance(x, CutTurns) else x for k, x in sources.items()}
    return {k if config.mixture else "data.path": x.fingerprint for k, x in plain.items()}


def digest_of_unusable(opened: OpenRows) -> str:
    """Returns a digest of which rows no step holds; the order of the others follows from it."""
    digest = hashlib.sha256()
    for rows in opened.unusable.values():
        digest.update(f"{len(rows)}\n".encode() + rows.astype("<i8").tobytes())
    return digest.hexdigest()


def unusable_rows(
    sources: dict[str, Source],
    unusable: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    config: DataConfig,
) -> Iterator[Hole]:
    """Yields the reason for every row that no step holds; each is read once more for it."""
    for name, rows in unusable.items():
        for index in rows.tolist():
            found = read_sample(sources[name], name, index, tokenizer, config)
            if isinstance(found, Hole):
                yield found


def _check_usable(
    sources: dict[str, Source],
    unusable: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    config: DataConfig,
) -> None:
    for name, source in sources.items():
        if not len(source):
            raise DataError(f"{name} holds no rows: got an empty source, expected at least one")
        if len(unusable[name]) == len(source):
            told = _first_of({name: source}, {name: unusable[name]}, tokenizer, config)
            raise DataError(
                f"{name} has no usable row: got {counted(len(source), 'row')} and none that can be "
                f"trained on; {told}"
            )
    num_rows, num_bad = sum(map(len, sources.values())), sum(map(len, unusable.values()))
    if num_bad > config.max_bad_fraction * num_rows:
        told = _first_of(sources, unusable, tokenizer, config)
        raise DataError(too_many(num_bad, num_rows, config.max_bad_fraction, told))


def _first_of(
    sources: dict[str, Source],
    unusable: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    config: DataConfig,
) -> str:
    """Returns the first unusable rows, and what lists the others: a refused start writes no list.

    `qwenvl data lint` takes conversation files alone.
    """
    holes = itertools.islice(unusable_rows(sources, unusable, tokenizer, config), _NAMED)
    named = " ".join(f"({number}) {hole.detail}" for number, hole in enumerate(holes, start=1))
    limits = f"--tokenizer {shlex.quote(config.tokenizer)} --slots {tokenizer.slots}"
    commands = " and ".join(
        f"'qwenvl data lint {shlex.quote(name)} {limits} --length {config.length}'"
        for name, rows in unusable.items()
        if len(rows) and Path(name).suffix.lower() in CONVERSATIONS
    )
    listed = f" ({commands} lists them all)" if commands else ""
    return f"the first of them: {named}; mend them{listed}"


def read_sample(
    source: Source, name: str, index: int, tokenizer: Tokenizer, config: DataConfig
) -> Example | Hole:
    """Returns a row as a sample that fits a row of the batch, its pictures not yet decoded."""
    try:
        record = source[index]
    except (DataError, OSError) as error:
        return Hole(f"{name}[{index}]", "row", str(error), name)
    try:
        example = example_of(record, tokenizer, config.mask)
        image_slots(example, tokenizer)
    except DataError as error:
        return Hole(record.key, "sample", str(error), name)
    try:
        check_fits(example, config.length, config.max_images)
    except DataError as error:
        return Hole(record.key, "length", str(error), name)
    return example


def canvas_shape(config: DataConfig, num_rows: int) -> tuple[int, ...]:
    """Returns the shape of the pictures of so many rows, [B, I, Y, X, C]."""
    return num_rows, config.max_images, config.image_size, config.image_size, 3


class RowMaker:
    """Makes the batch of any step: `maker(step)` returns (Batch, Notes). Goes to other processes.

    `rows` are the rows of the global batch that are made, in rising order; `canvases`, of
    `canvas_shape`, are for their pictures. Threads may share it.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        opened: OpenRows,
        rows: Sequence[int],
        canvases: Canvases,
    ):
        self._config, self._tokenizer, self._canvases = config, tokenizer, canvases
        self._order, self._sources = opened.order, list(opened.sources.items())
        self._rows = np.array(rows, np.int64)

    def __call__(self, step: int) -> tuple[Batch, Notes]:
        config = self._config
        keep_buffers(_BUFFERS)
        slots = self._order.rows(step * config.rows + self._rows)
        canvas = self._canvases.take()
        first_of_row = np.searchsorted(slots.row, slots.row)
        first_image = np.cumsum(slots.pictures) - slots.pictures
        first_image -= first_image[first_of_row]  # within its row
        places = [
            canvas[row, first : first + pictures]
            for row, pictures, first in zip(
                *(part.tolist() for part in (slots.row, slots.pictures, first_image)), strict=True
            )
        ]
        # All samples are read before the first picture is decoded: pictures sweep the processor's
        # caches, after which one reading takes three times as long.
        wanted = (part.tolist() for part in (slots.source, slots.index, slots.tokens))
        samples = list(map(self._read, *wanted, map(len, places)))
        rows: list[list[Example]] = [[] for _ in self._rows]
        holes = []
        numbers = step * config.rows + self._rows[slots.row]
        within = np.arange(len(slots.row)) - first_of_row
        names = [self._sources[number][0] for number in slots.source.tolist()]
        decoded = map(self._decode, samples, names, places, numbers.tolist(), within.tolist())
        for row, sample in zip(slots.row.tolist(), decoded, strict=True):
            if isinstance(sample, Hole):
                holes.append(sample)
            else:
                rows[row].append(sample)
        batch = pack(
            rows,
            config.length,
            config.max_images,
            config.image_size,
            self._tokenizer,
            config.attend_across,
            canvas,
        )
        return batch, Notes(len(slots.row), tuple(holes), keys_of(rows))

    def _read(self, number: int, index: int, tokens: int, pictures: int) -> Example | Hole:
        """Returns row `index` of source `number`, if it is no larger than planned."""
        name, source = self._sources[number]
        example = read_sample(source, name, index, self._tokenizer, self._config)
        if isinstance(example, Hole):
            return example
        if len(example.ids) > tokens or len(example.images) > pictures:
            detail = (
                f"sample {example.key} is larger than when rows were planned: got "
                f"{counted(len(example.ids), 'token')} and "
                f"{counted(len(example.images), 'picture')}, expected at most "
                f"{tokens} and {pictures}; its source has changed since, so prepare it again"
            )
            return Hole(example.key, "length", detail, name)
        return example

    def _decode(
        self, sample: Example | Hole, name: str, places: np.ndarray, row: int, within: int
    ) -> Example | Hole:
        """Returns the sample with its pixels written to its places, views of the batch's images.

        It is sample `within` of row `row`, counted from the start of training: pictures vary by
        that and by the seed, whoever decodes them.
        """
        if isinstance(sample, Hole):
            return sample
        strength, size = self._config.vary_pictures, self._config.image_size
        rng = random.Random(f"vary/{self._order.seed}/{row}/{within}") if strength else None
        try:
            for place, image in zip(places, sample.images, strict=False):  # fewer need fewer
                decoded = pixels(sample, image, size)
                place[...] = decoded if rng is None else varied(decoded, strength, rng)
        except DataError as error:
            return Hole(sample.key, "picture", str(error), name)
        return sample._replace(images=tuple(places[: len(sample.images)]))
