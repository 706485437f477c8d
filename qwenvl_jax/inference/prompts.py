"""Prompts of ids and pictures, checked on the host and laid out as one padded batch.

Axes: B rows  L text length with slots  I pictures of a row  Q adapter queries  D text width
      Y X C picture rows, columns, channels.
Nothing that reaches the device can be misaligned: every complaint of this file names the row and
the position.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from qwenvl_jax.config import NO_IMAGE, ModelConfig
from qwenvl_jax.inference.cache import bucket, prompt_bucket
from qwenvl_jax.inference.errors import InputError, whole_number
from qwenvl_jax.words import counted

# `row`: each row's rotary base and log-n scale come from its own prompt, so that a batch equals
# its rows alone. `reference`: from the longest prompt and from left-padded places, as released.
LongContext = Literal["row", "reference"]


class Prompts(NamedTuple):
    """A right-padded batch. Rows of length 0 are there to fill the bucket."""

    tokens_BL: np.ndarray  # int32
    length_B: np.ndarray  # int32: tokens of the row without padding
    ntk_length_B: np.ndarray  # int32: the length that the rotary base is chosen from
    position_start_B: np.ndarray  # int32: the position of the row's first token
    visual_BIQD: np.ndarray | None  # compute dtype: what replaces the slots
    image_start_BI: np.ndarray | None  # int32: first slot of each picture, or NO_IMAGE


def check_ids(tokens: Any, config: ModelConfig, row: str) -> np.ndarray:
    """Returns the ids as int32 [L].

    Raises:
        InputError: not a non-empty list of whole numbers, or an id outside the vocabulary.
    """
    try:
        ids = np.asarray(tokens)
    except ValueError as error:  # lists of several lengths
        raise InputError(
            f"{row}: tokens must be one list of ids: got lists of several lengths; one row is one "
            "list, see generate_batch"
        ) from error
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(
            f"{row}: tokens must be a non-empty list of ids: "
            f"got shape {ids.shape} of {ids.dtype}; one row is one list, see generate_batch"
        )
    outside = np.flatnonzero((ids < 0) | (ids >= config.decoder.vocab_size))
    if outside.size:
        raise InputError(
            f"{row}: ids must lie in 0 .. {config.decoder.vocab_size - 1}: "
            f"got {ids[outside[0]]} at position {outside[0]}"
        )
    return ids.astype(np.int32)


def check_stop_tokens(tokens: Sequence[int], config: ModelConfig) -> tuple[int, ...]:
    """Returns the ids that end an answer; InputError where the model has no such id."""
    tokens = [whole_number("stop_tokens", token) for token in tokens]
    for token in tokens:
        if not 0 <= token < config.decoder.vocab_size:
            raise InputError(
                f"stop_tokens must lie in 0 .. {config.decoder.vocab_size - 1}: got {token}; "
                "leave it out"
            )
    return tuple(tokens)


def check_images(images: Any, config: ModelConfig, row: str) -> np.ndarray:
    """Returns the pictures as uint8 [n, Y, X, 3]; None is no picture.

    Raises:
        InputError: not uint8, not square RGB, sides that differ, or a side that is no multiple of
            the patch size.
    """
    patch = config.vision.patch_size
    how = f"give uint8 [n, Y, X, 3], square, side a multiple of {patch}"
    if images is None or len(images) == 0:
        return np.zeros((0, patch, patch, 3), np.uint8)
    if not isinstance(images, np.ndarray):
        sides = [np.shape(image) for image in images]
        if len(set(sides)) > 1:
            raise InputError(
                f"{row}: pictures of one call must have the same size: got {sides}; resize them, "
                "or call once for each size"
            )
        images = np.stack([np.asarray(image) for image in images])
    if images.dtype != np.uint8:
        raise InputError(f"{row}: pictures must be uint8: got {images.dtype}; {how}")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(f"{row}: pictures have the wrong shape: got {images.shape}; {how}")
    height, width = images.shape[1:3]
    if height != width or height % patch or height == 0:
        raise InputError(f"{row}: pictures have the wrong size: got {height} x {width}; {how}")
    return images


def find_pictures(ids: np.ndarray, num_images: int, config: ModelConfig, row: str) -> np.ndarray:
    """Returns the index of the first slot of each picture, in reading order.

    A picture is `<img>`, one `<imgpad>` a slot, `</img>`. An `<img>` or `</img>` that belongs to no
    such span is ordinary text: the model itself may write one.

    Raises:
        InputError: a span of the wrong length or content, or more or fewer spans than pictures.
    """
    slots = config.adapter.num_queries
    start_id, end_id, pad_id = config.image_start_id, config.image_end_id, config.image_pad_id
    # First: a path is followed by <imgpad>, which would be told as a span too short.
    for begin in np.flatnonzero(ids == start_id):
        end = begin + slots + 1
        if end < len(ids) and ids[end] == end_id and ids[begin + 1] != pad_id:
            raise InputError(
                f"{row}: the picture at position {begin} must hold <imgpad> (id {pad_id}) in every "
                f"slot: got id {ids[begin + 1]}; paths inside ids, as the released tokenizer "
                "writes them, are not read: pass the pictures as arrays"
            )
    is_pad = np.concatenate([[False], ids == pad_id, [False]])
    first = np.flatnonzero(is_pad[1:] & ~is_pad[:-1])  # runs of <imgpad>
    past = np.flatnonzero(is_pad[:-1] & ~is_pad[1:])
    for begin, end in zip(first, past, strict=True):
        if begin == 0 or ids[begin - 1] != start_id:
            raise InputError(
                f"{row}: <imgpad> at position {begin} does not follow <img> (id {start_id})"
            )
        if end - begin != slots or end == len(ids) or ids[end] != end_id:
            after = f"id {ids[end]}" if end < len(ids) else "the end"
            raise InputError(
                f"{row}: the picture at position {begin - 1} must be <img>, {slots} <imgpad>, "
                f"</img> (id {end_id}): got {end - begin} <imgpad>, then {after}"
            )
    if len(first) != num_images:
        raise InputError(
            f"{row}: {counted(len(first), 'picture span')} in the tokens, at positions "
            f"{(first - 1).tolist()}, and {counted(num_images, 'picture')} given; they must be as "
            "many"
        )
    return first.astype(np.int32)


def check_length(length: int, max_new_tokens: int, config: ModelConfig, row: str) -> None:
    """Raises InputError when the prompt and its answer do not fit the model."""
    limit = config.decoder.max_positions
    if whole_number("max_new_tokens", max_new_tokens) < 0:
        raise InputError(f"max_new_tokens must be 0 or more: got {max_new_tokens}")
    if length + max_new_tokens > limit:
        raise InputError(
            f"{row}: the prompt and the answer must fit {limit:,} positions: got "
            f"{counted(length, 'prompt token')} + {counted(max_new_tokens, 'new token')} = "
            f"{length + max_new_tokens:,}; shorten the prompt or lower max_new_tokens"
        )


def lay_out(
    ids: Sequence[np.ndarray],
    image_starts: Sequence[np.ndarray],
    features: Sequence[np.ndarray],
    config: ModelConfig,
    *,
    rows: int,
    long_context: LongContext = "row",
) -> Prompts:
    """Returns checked prompts as one batch of `rows` rows, padded to bucket sizes.

    `image_starts[b]` is int32 [n], `features[b]` [n, Q, D].

    Raises:
        InputError: a `long_context` that does not exist.
    """
    if long_context not in get_args(LongContext):
        raise InputError(
            f"long_context must be one of {get_args(LongContext)}: got {long_context!r}"
        )
    lengths = [len(row) for row in ids]
    longest = max(lengths)
    tokens_BL = np.zeros((rows, prompt_bucket(longest, config)), np.int32)
    length_B = np.zeros(rows, np.int32)
    length_B[: len(ids)] = lengths
    for b, row in enumerate(ids):
        tokens_BL[b, : len(row)] = row
    if long_context == "reference":
        ntk_length_B = np.full(rows, longest, np.int32)
        position_start_B = longest - length_B
    else:
        ntk_length_B, position_start_B = length_B.copy(), np.zeros(rows, np.int32)

    most_pictures = max(len(starts) for starts in image_starts)
    visual_BIQD = image_start_BI = None
    if most_pictures:
        num_slots = bucket(most_pictures, 1)
        queries, width = config.adapter.num_queries, config.decoder.width
        dtype = next(f.dtype for f in features if len(f))
        visual_BIQD = np.zeros((rows, num_slots, queries, width), dtype)
        image_start_BI = np.full((rows, num_slots), NO_IMAGE, np.int32)
        for b, (starts, feature) in enumerate(zip(image_starts, features, strict=True)):
            image_start_BI[b, : len(starts)] = starts
            visual_BIQD[b, : len(starts)] = feature
    return Prompts(
        tokens_BL=tokens_BL,
        length_B=length_B,
        ntk_length_B=ntk_length_B,
        position_start_B=position_start_B,
        visual_BIQD=visual_BIQD,
        image_start_BI=image_start_BI,
    )
