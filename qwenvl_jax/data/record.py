"""One row of any source before it is tokenised: what is said, and its pictures still encoded.

A task says which fields a row has; places are in 0..999 (`prompt/boxes.py` converts from pixels).

    task                  fields
    caption               text, language ("en" or "zh")
    vqa, ocr_vqa          question, answer
    grounded_caption      phrases: [[text, [box, ...]], ...], joined they are the caption
    ref_grounding         phrase, boxes
    grounded_captioning   box, text
    ocr                   lines: [[text, quad], ...]
    text                  text
    chat                  conversations: [{"from": "user" or "assistant", "value": text}, ...], and
                          maybe system
    letters               firsts, seconds: a character for each cell of the picture, row by row

A box is [x1, y1, x2, y2], a quad four [x, y]. Rows of `chat` mark their pictures in the text, as
`<img>...</img>`; those of other tasks have none or one picture, which the task puts in its place.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgpack
import numpy as np

from qwenvl_jax.data.example import DataError, Picture

FIELDS: dict[str, tuple[str, ...]] = {
    "caption": ("text", "language"),
    "vqa": ("question", "answer"),
    "ocr_vqa": ("question", "answer"),
    "grounded_caption": ("phrases",),
    "ref_grounding": ("phrase", "boxes"),
    "grounded_captioning": ("box", "text"),
    "ocr": ("lines",),
    "text": ("text",),
    "chat": ("conversations",),
    "letters": ("firsts", "seconds"),
}
_FORMAT = 1  # of the bytes that `encode_record` writes


class Record(NamedTuple):
    """One row. `images` are encoded files as bytes, paths of files, or uint8 [Y, X, 3]."""

    key: str  # names the row in every error: file and number, or the source's own id
    task: str
    fields: Mapping[str, Any]
    images: tuple[Picture, ...] = ()


@runtime_checkable
class Source(Protocol):
    """Rows that can be read in any order, which is what training needs."""

    @property
    def fingerprint(self) -> str:
        """Digest of what the rows are: another one means that the data have changed."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Returns a row. Raises: DataError for one that cannot be read, IndexError past the end."""
        ...


def check_record(record: Record) -> None:
    """Raises DataError where a row's task is unknown or a field of it is missing."""
    if record.task not in FIELDS:
        raise DataError(
            f"row {record.key} has an unknown task: got {record.task!r}, expected one of "
            f"{', '.join(FIELDS)}"
        )
    missing = [name for name in FIELDS[record.task] if name not in record.fields]
    if missing:
        raise DataError(
            f"row {record.key} of task {record.task} lacks {', '.join(missing)}: got "
            f"{', '.join(record.fields) or 'no fields'}, expected "
            f"{', '.join(FIELDS[record.task])}"
        )


class PictureUnreadable(DataError):
    """A picture that a row names by its path cannot be read."""


def encode_record(record: Record) -> bytes:
    """Returns a row as msgpack bytes, with its pictures inside.

    Pictures given as paths are read; those given as arrays must have been encoded before.

    Raises: DataError for a row that does not fit its task, or has a value that cannot be stored
    (half of a surrogate pair); PictureUnreadable for a picture file that cannot be read.
    """
    check_record(record)
    images = [_image_bytes(record, image) for image in record.images]
    try:
        packed = msgpack.packb([_FORMAT, record.key, record.task, dict(record.fields), images])
    except (ValueError, TypeError, OverflowError) as error:
        # half of a surrogate pair is no UTF-8; other types come from a source's own code
        raise DataError(
            f"row {record.key!r} cannot be stored: {error}; expected text that is valid Unicode, "
            "numbers, lists and mappings"
        ) from error
    return bytes(packed or b"")


def decode_record(data: bytes, name: str) -> Record:
    """Returns the row of `encode_record`; `name` says in errors where the bytes come from.

    Raises: DataError where they are damaged or of a later format.
    """
    try:
        version, *rest = msgpack.unpackb(data)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise DataError(f"row {name} is damaged: {error}; prepare its file again") from error
    if version != _FORMAT or len(rest) != 4:
        raise DataError(
            f"row {name} has another format: got {version!r}, expected {_FORMAT}; prepare the data "
            "again with this version"
        )
    key, task, fields, images = rest
    return Record(key, task, fields, tuple(images))


def _image_bytes(record: Record, image: Picture) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        raise DataError(
            f"row {record.key} has a picture as an array: got {image.dtype} {image.shape}, "
            "expected an encoded file; write it as PNG or JPEG first"
        )
    try:
        return Path(image).read_bytes()
    except (OSError, ValueError) as error:  # a name that is no path, as "a\0b", is a ValueError
        raise PictureUnreadable(
            f"row {record.key} has a picture that cannot be read: {error}"
        ) from error
