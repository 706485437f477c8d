"""The one way a picture enters the system: path, bytes, PIL image, array or address -> pixels.

Axes: Y rows, X columns, C colours (see `qwenvl_jax.axes`).
"""

import base64
import binascii
import difflib
import io
import os
import stat
import urllib.parse
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qwenvl_jax.image.decode import (
    FORMAT_NAMES,
    ImageError,
    check_size,
    decode,
    to_rgb,
    upright_size,
)
from qwenvl_jax.image.fetch import fetch_bytes

MAX_BYTES = 256 * 2**20  # encoded; a whole 25-megapixel picture of 8 bytes a pixel still fits
MAX_NAMED = 5  # near names in a message
DATA_URL_TYPES = ("image/jpeg", "image/jpg", "image/png", "image/webp", "image/gif", "image/bmp")

ImageSource = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray


def load_image(
    source: ImageSource, *, max_pixels: int = 25_000_000, allow_fetch: bool = False
) -> UInt8[np.ndarray, "Y X 3"]:
    """Upright RGB pixels, uint8[Y, X, 3], of one picture; a fresh array that the caller owns.

    `source` is a path, the bytes of a file, a PIL image, a uint8 array ([Y, X] gray, [Y, X, 3] RGB
    or [Y, X, 4] RGBA), a `data:image/...;base64,` URL or, with `allow_fetch`, an http(s) address.
    Files may be JPEG, PNG, WEBP, GIF or BMP, whatever their names end in; an animation gives its
    first frame. EXIF orientation is applied once, so boxes refer to the picture as people see it.
    Transparency is laid over white, and 16-bit gray scaled down (65535 -> 255).

    >>> load_image(np.full((2, 3), 7, np.uint8)).shape
    (2, 3, 3)

    Raises:
      ImageError (a ValueError): anything that is not such a picture, or has over `max_pixels`
        (judged from the header, before decoding).
      TypeError: a source of another type.

    Differs: the released loader clips 16-bit gray, shows colours hidden under alpha, ignores
      orientation and fetches any address without a time limit.
    """
    return np.array(open_image(source, max_pixels=max_pixels, allow_fetch=allow_fetch))


def open_image(
    source: ImageSource, *, max_pixels: int = 25_000_000, allow_fetch: bool = False
) -> Image.Image:
    """The picture of `load_image` as a PIL image of mode RGB, to be read and not changed."""
    if isinstance(source, Image.Image):
        return to_rgb(source, "the PIL image", max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), "the picture given as bytes", max_pixels)
    if isinstance(source, os.PathLike):
        return _from_path(os.fspath(source), max_pixels)
    if not isinstance(source, str):
        raise TypeError(
            f"not a picture: got {type(source).__name__}, expected a path, bytes, a PIL image, a "
            "uint8 array or a data URL"
        )
    scheme = source[: source.find(":")].lower() if ":" in source else ""
    if scheme == "data":
        return _from_bytes(_data_url_bytes(source), "the picture in the data URL", max_pixels)
    if scheme in ("http", "https") and "//" in source:
        if not allow_fetch:
            raise ImageError(
                f"fetching is off: got the address {_short(source)}, expected a file or a data "
                "URL; download it first, or pass allow_fetch=True (infer.py: --allow-fetch)"
            )
        return _from_bytes(fetch_bytes(source), f"the picture at {_short(source)}", max_pixels)
    if scheme == "file" or "://" in source:
        raise ImageError(
            f"this kind of address is not opened: got {_short(source)}, expected a plain path or a "
            "data URL; give the path without its scheme"
        )
    return _from_path(source, max_pixels)


def image_size(encoded: bytes, *, max_pixels: int = 25_000_000) -> tuple[int, int]:
    """Returns width and height that `load_image` would give, without decoding a pixel.

    Raises: ImageError where `load_image` would raise one from the header alone.
    """
    name = "the picture given as bytes"
    _check_bytes(len(encoded), name)
    return upright_size(io.BytesIO(encoded), name, max_pixels)


def _from_array(pixels: np.ndarray, max_pixels: int) -> Image.Image:
    if pixels.dtype != np.uint8:
        raise ImageError(
            f"an array of pixels must be uint8 in 0..255: got {pixels.dtype}; scale it and use "
            ".astype(np.uint8)"
        )
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        is_channels_first = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4)
        fix = "move the channels last with .transpose(1, 2, 0)" if is_channels_first else "slice it"
        raise ImageError(
            f"an array of pixels has the wrong shape: got {pixels.shape}, expected (height, "
            f"width), (height, width, 3) or (height, width, 4); {fix}"
        )
    height, width = pixels.shape[:2]
    check_size((width, height), "the array of pixels", max_pixels)
    return to_rgb(Image.fromarray(np.ascontiguousarray(pixels)), "the array of pixels", max_pixels)


def _from_bytes(encoded: bytes, name: str, max_pixels: int) -> Image.Image:
    _check_bytes(len(encoded), name)
    return decode(io.BytesIO(encoded), name, max_pixels)


def _from_path(path: str | bytes, max_pixels: int) -> Image.Image:
    name = f"picture {_short(os.fsdecode(path))}"
    try:
        status = os.stat(path)
        # a pipe or a device would block or never end
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
            raise ImageError(f"{name} is not a file: got {what}, expected one picture file")
        _check_bytes(status.st_size, name)
        with open(path, "rb") as stream:
            return decode(stream, name, max_pixels)
    except FileNotFoundError as error:
        raise ImageError(
            f"{name} does not exist; {_near_names(Path(os.fsdecode(path)))}"
        ) from error
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(
            f"{name} cannot be opened: {error.strerror or 'the system refused'}; check the path "
            "and its permissions"
        ) from error
    except ValueError as error:  # a NUL byte, or a surrogate that the file system cannot hold
        raise ImageError(f"{name} is not a path: it holds a character no file name can") from error


def _near_names(path: Path) -> str:
    folder = path.parent
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:
        return f"its folder {_short(str(folder))} cannot be listed either; check the path"
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(path.name.lower(), by_lower, n=MAX_NAMED, cutoff=0.6)
    if not near:
        return f"no file in {_short(str(folder))} has a name like it; check the path"
    return "did you mean " + " or ".join(str(folder / by_lower[name]) for name in near) + "?"


def _data_url_bytes(url: str) -> bytes:
    """The decoded payload of a data URL.

    The media type must be one of ours, but only the bytes decide the format: clients often label
    a JPEG as PNG.
    """
    header, comma, payload = url[len("data:") :].partition(",")
    media_type, *parameters = (part.strip().lower() for part in header.split(";"))
    if not comma or "base64" not in parameters:
        raise ImageError(
            "the data URL is not base64: expected data:image/png;base64,... ; encode the file's "
            "bytes as base64"
        )
    if media_type not in DATA_URL_TYPES:
        raise ImageError(
            f"the data URL has the wrong type: got {_short(media_type) if media_type else 'none'}, "
            f"expected one of {', '.join(DATA_URL_TYPES)} ({FORMAT_NAMES})"
        )
    _check_bytes(len(payload) * 3 // 4, "the picture in the data URL")
    # an address may escape + / = and be folded over lines
    payload = "".join(urllib.parse.unquote(payload).split())
    if not payload:
        raise ImageError("the data URL is empty: got no data after the comma, expected base64")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            "the data URL's base64 is wrong: got other characters or a wrong length, expected "
            "A-Z a-z 0-9 + / with = padding to a multiple of four; encode the file's bytes again"
        ) from error


def _check_bytes(num_bytes: int, name: str) -> None:
    if num_bytes > MAX_BYTES:
        raise ImageError(
            f"{name} is too large: got {num_bytes} bytes, expected at most {MAX_BYTES}; shrink it"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:160] + "..." + text[-37:])
