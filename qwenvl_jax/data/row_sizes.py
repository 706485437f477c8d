"""How long a source's rows are, and how full packed rows of such samples would be.

Sizes: N rows.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.plan import Classes, pack_classes
from qwenvl_jax.data.record import Source
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.prompt.tokenizer import Tokenizer


class RowSizes(NamedTuple):
    """Rows that were measured. Unusable ones have -1 tokens, and a reason each."""

    tokens: np.ndarray  # int32 [N], with the slots of pictures
    learnt: np.ndarray  # int32 [N], tokens that carry loss
    pictures: np.ndarray  # int32 [N]
    tasks: list[str]  # of each row; empty for an unusable one
    reasons: list[str]


class PredictedFill(NamedTuple):
    """How many rows samples would fill, and how well, as fractions; `too_long` ones fit none."""

    rows: int
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


def predicted_fill(sizes: RowSizes, length: int, max_images: int) -> PredictedFill:
    """Returns how full rows of these limits would be, packed as training plans them.

    Nothing that fits: all 0.
    """
    usable = sizes.tokens > 0
    fits = usable & (sizes.tokens <= length) & (sizes.pictures <= max_images)
    too_long = int(np.count_nonzero(usable & ~fits))
    tokens, pictures = sizes.tokens[fits].astype(np.int64), sizes.pictures[fits].astype(np.int64)
    if len(tokens) == 0:
        return PredictedFill(0, 0.0, 0.0, 0.0, too_long)
    classes, _ = _classes(tokens, pictures)
    num_rows = pack_classes(classes, length, max_images).num_rows
    return PredictedFill(
        rows=num_rows,
        tokens=int(tokens.sum()) / (num_rows * length),
        images=int(pictures.sum()) / (num_rows * max_images) if max_images else 1.0,
        samples_per_row=len(tokens) / num_rows,
        too_long=too_long,
    )


def planned_rows(
    tokens: Sequence[int], pictures: Sequence[int], length: int, max_images: int
) -> list[list[int]]:
    """Returns the samples of each row, by number, as training plans rows of these limits.

    Every sample must fit a row alone, and lies in one row.
    """
    if not tokens:
        return []
    classes, member_of = _classes(np.array(tokens, np.int64), np.array(pictures, np.int64))
    members = [np.flatnonzero(member_of == number) for number in range(len(classes.tokens))]
    plan = pack_classes(classes, length, max_images)
    rows: list[list[int]] = []
    for pattern, (start, end) in enumerate(itertools.pairwise(plan.row_start.tolist())):
        runs = range(plan.run_start[pattern], plan.run_start[pattern + 1])
        for j in range(end - start):
            row: list[int] = []
            for run in runs:
                times = int(plan.run_times[run])
                first = int(plan.run_first[run]) + j * times
                row += members[plan.run_class[run]][first : first + times].tolist()
            rows.append(row)
    return rows


def _classes(tokens_N: np.ndarray, pictures_N: np.ndarray) -> tuple[Classes, np.ndarray]:
    """Returns the samples by size, and the class of each."""
    sizes, member_of, count = np.unique(
        np.stack([tokens_N, pictures_N]), axis=1, return_inverse=True, return_counts=True
    )
    return Classes(sizes[0], sizes[1], count, np.zeros(len(count), np.int64)), member_of
