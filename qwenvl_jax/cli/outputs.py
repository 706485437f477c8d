"""Where commands write: places are tried before the work, and no file is spoilt by a failure."""

import io
import itertools
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_jax.cli.errors import one_line
from qwenvl_jax.config import ConfigError
from qwenvl_jax.files import replace

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# What a picture's name may end in, and Pillow's name for it.
DRAWN_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}


def check_output(path: Path, sources: Sequence[str] = ()) -> None:
    """Raises ConfigError when no picture can be written there; asked before the model runs.

    Neither over one of the pictures that are read, which are the person's own.
    """
    if path.is_dir():
        raise ConfigError(
            f"the picture's place is a folder: got {str(path)!r}; name a file in it, such as "
            f"{str(path / 'answer.png')!r}"
        )
    if path.suffix.lower() not in DRAWN_FORMATS:
        raise ConfigError(
            f"the picture's name must end in one of {', '.join(DRAWN_FORMATS)}: got {str(path)!r}"
        )
    for source in sources:  # which may be an address, and then does not exist
        if path.exists() and os.path.exists(source) and os.path.samefile(path, source):
            raise ConfigError(
                f"the boxes would be drawn over the picture itself: got {str(path)!r}, which "
                f"--image reads as {source!r}; name another file"
            )
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raises ConfigError when no file can be made in the folder."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise ConfigError(f"no folder to write to: {str(there)!r} is a file; name another place")
    if there != folder:
        raise ConfigError(f"no folder to write to: got {str(folder)!r}; make {folder} first")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".qwenvl-"):
            pass
    except OSError as error:
        raise ConfigError(
            f"the folder cannot be written to: got {str(folder)!r}, {error.strerror}; name "
            "another place, or change its permissions"
        ) from error


def first_free(folder: Path, names: Iterable[str]) -> Path:
    """Returns the first of the names that nothing in the folder has, no broken link either."""
    return next(folder / name for name in names if not os.path.lexists(folder / name))


def numbered(first: int) -> Iterable[str]:
    """Yields answer-1.png, answer-2.png and so on, from a number on."""
    return (f"answer-{number}.png" for number in itertools.count(first))


def save_drawn(image_YXC: "np.ndarray", boxes: list[dict[str, Any]], path: Path) -> None:
    """Writes the picture with its boxes; raises as `save_picture`."""
    from qwenvl_jax.prompt.draw import draw_boxes

    save_picture(draw_boxes(image_YXC, boxes), path)


def save_picture(picture: "Image.Image", path: Path) -> None:
    """Writes the picture in the format that its name says, or leaves what was there.

    Raises:
        ConfigError: the format does not take it, as WEBP beyond 16383 pixels a side.
        OSError: the place cannot be written.
    """
    kind, encoded = DRAWN_FORMATS[path.suffix.lower()], io.BytesIO()
    try:
        picture.save(encoded, kind)
    except (OSError, ValueError) as error:
        width, height = picture.size
        raise ConfigError(
            f"{kind} does not take the picture: got {width} x {height} pixels for {str(path)!r} "
            f"({one_line(error)}); use .png"
        ) from error
    replace(path, lambda beside: beside.write_bytes(encoded.getvalue()))
