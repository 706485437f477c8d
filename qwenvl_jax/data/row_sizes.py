"""How long a source's rows are, and how full packed rows of such samples would be.

Sizes: N rows.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwenvl_jax.data.example import DataError, Example
from qwenvl_jax.data.packing import fill_rows
from qwenvl_jax.data.record import Source
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.prompt.tokenizer import Tokenizer

_MAX_PACKED = 20_000  # samples that a prediction packs; more change it little
_MIN_ROWS = 64  # fewer would show the end of a row's look-ahead rather than its middle


class RowSizes(NamedTuple):
    """Rows that were measured. Unusable ones have -1 tokens, and a reason each."""

    tokens: np.ndarray  # int32 [N], with the slots of pictures
    learnt: np.ndarray  # int32 [N], tokens that carry loss
    pictures: np.ndarray  # int32 [N]
    tasks: list[str]  # of each row; empty for an unusable one
    reasons: list[str]


class PredictedFill(NamedTuple):
    """How full packed rows would be, as fractions; `too_long` rows fit into none."""

    tokens: float
    images: float
    samples_per_row: float
    too_long: int


def measure_rows(
    source: Source, tokenizer: Tokenizer, indices: Sequence[int], rows: range
) -> RowSizes:
    """Returns the sizes of `indices[rows]`; pictures are not opened."""
    sizes_3N = np.full((3, len(rows)), -1, np.int32)
    tasks, reasons = [], []
    for place, row in enumerate(rows):
        try:
            example = example_of(source[int(indices[row])], tokenizer)
        except DataError as error:
            tasks.append("")
            reasons.append(str(error))
            continue
        tasks.append(example.task)
        num_learnt = np.count_nonzero(example.is_target)
        sizes_3N[:, place] = len(example.ids), num_learnt, len(example.images)
    tokens, learnt, pictures = sizes_3N
    return RowSizes(tokens, learnt, pictures, tasks, reasons)


def join_sizes(parts: Sequence[RowSizes]) -> RowSizes:
    none_N = np.zeros(0, np.int32)
    tokens, learnt, pictures = (
        np.concatenate([none_N, *arrays])
        for arrays in (
            [part.tokens for part in parts],
            [part.learnt for part in parts],
            [part.pictures for part in parts],
        )
    )
    tasks = [task for part in parts for task in part.tasks]
    return RowSizes(tokens, learnt, pictures, tasks, [r for part in parts for r in part.reasons])


def predicted_fill(sizes: RowSizes, length: int, max_images: int, seed: int) -> PredictedFill:
    """Returns how full rows of these limits would be, from packing the samples in a random order.

    At most `_MAX_PACKED` samples are packed, again from the first where they are too few for
    `_MIN_ROWS` rows. Nothing that fits: all 0.
    """
    usable = sizes.tokens >= 0
    is_fitting = usable & (sizes.tokens <= length) & (sizes.pictures <= max_images)
    too_long = int(np.count_nonzero(usable & ~is_fitting))
    order = np.random.default_rng(seed).permutation(np.flatnonzero(is_fitting))[:_MAX_PACKED]
    if len(order) == 0:
        return PredictedFill(0.0, 0.0, 0.0, too_long)
    samples = [_stand_in(int(sizes.tokens[i]), int(sizes.pictures[i])) for i in order]
    num_rows = max(_MIN_ROWS, int(sizes.tokens[order].sum()) // length)
    rows, _ = fill_rows(itertools.cycle(samples), num_rows, length, max_images)
    packed = [example for row in rows for example in row]
    num_images = sum(len(example.images) for example in packed)
    return PredictedFill(
        tokens=sum(len(example.ids) for example in packed) / (num_rows * length),
        images=num_images / (num_rows * max_images) if max_images else 1.0,
        samples_per_row=len(packed) / num_rows,
        too_long=too_long,
    )


def _stand_in(num_tokens: int, num_images: int) -> Example:
    """Returns a sample of that size with nothing in it; its ids take no memory."""
    ids = np.broadcast_to(np.int32(0), num_tokens)
    return Example(ids, np.broadcast_to(np.False_, num_tokens), (b"",) * num_images, "", "")
