"""Samples to rows of static shape, under two limits at once: tokens and pictures.

Rows are filled from a small look-ahead: the oldest sample opens a row, then the longest one that
fits follows, until none does. A sample is never cut. Samples of a row are told apart by `segment`,
positions restart with each, and no target reaches from one into the next. With `attend_across` they
are one segment with running positions, as the paper's few-shot use wants, still without a target
from one into the next.

Axes: B rows, L text length with picture slots, I pictures of a row, Y X C pixels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qwenvl_jax.config import NO_IMAGE
from qwenvl_jax.data.example import (
    NO_TASK,
    TASKS,
    Batch,
    DataError,
    Example,
    Picture,
)
from qwenvl_jax.image.decode import ImageError
from qwenvl_jax.image.load import open_image
from qwenvl_jax.image.transform import to_square
from qwenvl_jax.prompt.tokenizer import Tokenizer
from qwenvl_jax.words import counted

LOOK_AHEAD = 8  # samples; more fills rows better and drops more at the end of a batch
_PATIENCE = 1000  # samples refused one after the other, where there may be no end of them
TASK_NUMBERS = {name: number for number, name in enumerate(TASKS)}


class Fill(NamedTuple):
    """How full a batch is, as fractions."""

    tokens: float
    images: float


def fill_rows(
    examples: Iterator[Example], num_rows: int, length: int, max_images: int
) -> tuple[list[list[Example]], list[DataError]]:
    """Returns rows of samples that keep both limits, and the refusals of samples that no row holds.

    What is left in the look-ahead after the last row is dropped: at most `LOOK_AHEAD` samples. Rows
    at the end are empty where the samples run out, or so many are refused that they never would.
    """
    waiting: list[Example] = []
    refusals: list[DataError] = []
    rows: list[list[Example]] = []
    refused = 0  # since the last that fits
    for _ in range(num_rows):
        row: list[Example] = []
        tokens_left, images_left = length, max_images
        while True:
            while (
                len(waiting) < LOOK_AHEAD
                and refused < _PATIENCE
                and (example := next(examples, None)) is not None
            ):
                try:
                    check_fits(example, length, max_images)
                except DataError as refusal:
                    refusals.append(refusal)
                    refused += 1
                else:
                    waiting.append(example)
                    refused = 0
            fitting = [
                i
                for i, example in enumerate(waiting)
                if len(example.ids) <= tokens_left and len(example.images) <= images_left
            ]
            if not fitting:
                break
            best = max(fitting, key=lambda i: len(waiting[i].ids)) if row else 0
            example = waiting.pop(best)
            row.append(example)
            tokens_left -= len(example.ids)
            images_left -= len(example.images)
        rows.append(row)
    return rows, refusals


def check_fits(example: Example, length: int, max_images: int) -> None:
    """Raises DataError where a sample alone is more than a row holds."""
    if len(example.ids) > length or len(example.images) > max_images:
        raise DataError(
            f"sample {example.key} does not fit into a row: got "
            f"{counted(len(example.ids), 'token')} and {counted(len(example.images), 'picture')}, "
            f"expected at most {length} and {max_images}; raise data.length or "
            "data.max_images, or drop the sample"
        )


def pack(
    rows: Sequence[Sequence[Example]],
    length: int,
    max_images: int,
    image_size: int,
    tokenizer: Tokenizer,
    attend_across: bool = False,
    canvas: np.ndarray | None = None,
) -> Batch:
    """Returns the batch of given rows; padding holds `<|endoftext|>` in segment 0.

    `canvas` becomes the batch's images, uint8 [B, I, Y, X, C]: pictures that are views of it are
    already there, or move to the front of their row.

    Raises: DataError, with the sample's key, where a row overflows or a picture and its slots do
    not match.
    """
    B, L, I = len(rows), length, max_images
    tokens_BL = np.full((B, L), tokenizer.endoftext_id, np.int32)
    targets_BL = np.full((B, L), tokenizer.endoftext_id, np.int32)
    loss_weight_BL = np.zeros((B, L), np.float32)
    segment_BL = np.zeros((B, L), np.int32)
    position_BL = np.zeros((B, L), np.int32)
    if canvas is None:  # empty: numpy asks for huge pages only where it does not clear
        canvas = np.empty((B, I, image_size, image_size, 3), np.uint8)
    images_BIYXC = canvas
    image_start_BI = np.full((B, I), NO_IMAGE, np.int32)
    task_BL = np.full((B, L), NO_TASK, np.int32)
    for b, row in enumerate(rows):
        start, num_images = 0, 0
        for number, example in enumerate(row, 1):
            slots = image_slots(example, tokenizer)
            size = len(example.ids)
            check_fits(example, length - start, max_images - num_images)
            end = start + size
            tokens_BL[b, start:end] = example.ids
            targets_BL[b, start : end - 1] = example.ids[1:]
            loss_weight_BL[b, start : end - 1] = example.is_target[1:]
            segment_BL[b, start:end] = 1 if attend_across else number
            position_BL[b, start:end] = np.arange(size) + (start if attend_across else 0)
            task_BL[b, start:end] = TASK_NUMBERS.get(example.task, NO_TASK)
            for image, slot in zip(example.images, slots, strict=True):
                place = images_BIYXC[b, num_images]
                picture = pixels(example, image, image_size)
                if picture.ctypes.data != place.ctypes.data:
                    place[...] = picture
                image_start_BI[b, num_images] = start + slot
                num_images += 1
            start = end
        images_BIYXC[b, num_images:] = 0
    return Batch(
        tokens=tokens_BL,
        targets=targets_BL,
        loss_weight=loss_weight_BL,
        segment=segment_BL,
        position=position_BL,
        images=images_BIYXC,
        image_start=image_start_BI,
        task=task_BL,
    )


def image_slots(example: Example, tokenizer: Tokenizer) -> list[int]:
    """Returns where the slots of each picture begin in a sample's ids.

    Raises: DataError where spans are not whole, or their number is not that of the pictures.
    """
    ids = example.ids
    starts = np.flatnonzero(ids == tokenizer.image_start_id) + 1
    num_pads = int(np.count_nonzero(ids == tokenizer.image_pad_id))
    ends = starts + tokenizer.slots
    is_whole = (
        num_pads == len(starts) * tokenizer.slots
        and bool(np.all(ends < len(ids)))
        and bool(np.all(ids[ends] == tokenizer.image_end_id))
        and np.count_nonzero(ids == tokenizer.image_end_id) == len(starts)
    )
    if not is_whole or len(starts) != len(example.images):
        raise DataError(
            f"sample {example.key} has pictures and slots that do not match: got "
            f"{counted(len(example.images), 'picture')}, {len(starts)} <img>, {num_pads} <imgpad>; "
            f"expected <img>, {tokenizer.slots} <imgpad> and </img> for each picture"
        )
    return starts.tolist()


def pixels(example: Example, image: Picture, image_size: int) -> np.ndarray:
    """Returns a picture of a sample as uint8 [image_size, image_size, 3].

    An array has to have this form already; a file is decoded and made square here, after packing.

    Raises: DataError, with the sample's key, for a picture that cannot be.
    """
    if isinstance(image, np.ndarray):
        if image.shape != (image_size, image_size, 3) or image.dtype != np.uint8:
            raise DataError(
                f"sample {example.key} has a picture of another form: got {image.dtype} "
                f"{image.shape}, expected uint8 {(image_size, image_size, 3)}"
            )
        return image
    try:
        return to_square(open_image(image), image_size)
    except (ImageError, OSError) as error:
        raise DataError(f"sample {example.key} has a picture that cannot be read: {error}") from (
            error
        )


def fill(batch: Batch) -> Fill:
    """Returns the share of token places and of picture slots in use."""
    return Fill(
        tokens=float(np.mean(batch.segment > 0)),
        images=float(np.mean(batch.image_start != NO_IMAGE)) if batch.image_start.size else 1.0,
    )
