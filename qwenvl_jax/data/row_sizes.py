"""How long a source's rows are, and how full packed rows of such samples would be.

Sizes: N rows.
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.plan import Classes, pack_classes
from qwenvl_jax.data.record import Source
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.data.turns import fit_turns
from qwenvl_jax.prompt.tokenizer import Tokenizer


class RowSizes(NamedTuple):
    """Rows that were measured. Unusable ones have -1 tokens, and a reason each."""

    tokens: np.ndarray  # int32 [N], with the slots of pictures
    learnt: np.ndarray  # int32 [N], tokens that carry loss
    pictures: np.ndarray  # int32 [N]
    tasks: list[str]  # of each row; empty for an unusable one
    reasons: list[str]
    packed: np.ndarray  # int32 [2, N], tokens and pictures that go into a packed row


class PredictedFill(NamedTuple):
    """How many rows samples would fill, and how well, as fractions.

    `cut` ones lose their last turns for it, `too_long` ones fit none.
    """

    rows: int
    tokens: float
    images: float
    samples_per_row: float
    too_long: int
    cut: int


def measure_rows(
    source: Source,
    tokenizer: Tokenizer,
    indices: Sequence[int],
    cut_to: int | None,
    rows: range,
) -> RowSizes:
    """Returns the sizes of `indices[rows]`; pictures are not opened.

    Dialogues of more tokens than `cut_to` are packed without their last turns.
    """
    sizes_3N = np.full((3, len(rows)), -1, np.int32)
    packed_2N = np.full((2, len(rows)), -1, np.int32)
    tasks, reasons = [], []
    for place, row in enumerate(rows):
        try:
            record = source[int(indices[row])]
            example = example_of(record, tokenizer)
        except DataError as error:
            tasks.append("")
            reasons.append(str(error))
            continue
        tasks.append(example.task)
        num_learnt = np.count_nonzero(example.is_target)
        sizes_3N[:, place] = len(example.ids), num_learnt, len(example.images)
        if cut_to is not None and len(example.ids) > cut_to:
            with contextlib.suppress(DataError):  # not even the first turn fits: it is too long
                example = example_of(fit_turns(record, tokenizer, cut_to), tokenizer)
        packed_2N[:, place] = len(example.ids), len(example.images)
    tokens, learnt, pictures = sizes_3N
    return RowSizes(tokens, learnt, pictures, tasks, reasons, packed_2N)


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
    packed_2N = np.concatenate([np.stack([none_N, none_N]), *(p.packed for p in parts)], axis=1)
    reasons = [reason for part in parts for reason in part.reasons]
    return RowSizes(tokens, learnt, pictures, tasks, reasons, packed_2N)


def predicted_fill(sizes: RowSizes, length: int, max_images: int) -> PredictedFill:
    """Returns how full rows of these limits would be, packed as training plans them.

    Nothing that fits: all 0.
    """
    packed_N, pictures_N = sizes.packed.astype(np.int64)
    usable = packed_N > 0
    fits = usable & (packed_N <= length) & (pictures_N <= max_images)
    too_long = int(np.count_nonzero(usable & ~fits))
    cut = int(np.count_nonzero(fits & (packed_N < sizes.tokens)))
    tokens, pictures = packed_N[fits], pictures_N[fits]
    if len(tokens) == 0:
        return PredictedFill(0, 0.0, 0.0, 0.0, too_long, cut)
    classes, _ = _classes(tokens, pictures)
    num_rows = pack_classes(classes, length, max_images).num_rows
    return PredictedFill(
        rows=num_rows,
        tokens=int(tokens.sum()) / (num_rows * length),
        images=int(pictures.sum()) / (num_rows * max_images) if max_images else 1.0,
        samples_per_row=len(tokens) / num_rows,
        too_long=too_long,
        cut=cut,
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
