"""The two row schemas of the data room: one sample, and one batch of packed samples.

Axes: B rows, L text length with picture slots, I pictures of a row, Y X C pixels.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

# Every task that a sample can be of; `Batch.task` holds places in this list, so its order stays.
TASKS = (
    "caption",
    "vqa",
    "ocr_vqa",
    "grounded_caption",
    "ref_grounding",
    "grounded_captioning",
    "ocr",
    "text",
    "chat",
    "map",  # this one and the next two: lists of what lies in each cell of a drawn scene
    "letters",
    "edges",
)
NO_TASK = -1  # `Batch.task` of padding, and of a sample whose task is not listed

# An encoded file's bytes or its path, decoded only after packing; or uint8 [Y, X, 3], square.
Picture = bytes | Path | np.ndarray


class DataError(ValueError):
    """A sample that cannot be trained on: which one, what is wrong, how to mend it."""


class Example(NamedTuple):
    """One sample: ids with their loss mark, and the pictures that fill its slots, in reading order.

    `is_target[i]` says that token i is predicted (so the loss sits at position i - 1 once shifted).
    """

    ids: np.ndarray  # int32 [L]
    is_target: np.ndarray  # bool [L]
    images: tuple[Picture, ...]
    task: str
    key: str  # names the sample in every error


class Batch(NamedTuple):
    """Packed rows of static shape, ready for a train step.

    `segment` counts the samples of a row from 1; 0 is padding. `position` restarts with each
    sample. `targets[b, i]` is `tokens[b, i + 1]` inside one segment; `loss_weight` is 0 wherever
    nothing is predicted. `image_start` is the first slot (the place after `<img>`) of each picture.
    `task` says of each token which of `TASKS` its sample is of; without it losses have no tasks.
    """

    tokens: np.ndarray  # int32 [B, L]
    targets: np.ndarray  # int32 [B, L]
    loss_weight: np.ndarray  # float32 [B, L]
    segment: np.ndarray  # int32 [B, L]
    position: np.ndarray  # int32 [B, L]
    images: np.ndarray  # uint8 [B, I, Y, X, C]
    image_start: np.ndarray  # int32 [B, I]
    task: np.ndarray | None = None  # int32 [B, L]
