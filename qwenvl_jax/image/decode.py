"""One encoded picture, or one PIL image, to upright RGB: what every pixel of the system passes.

Pillow's own `Image.open(...).convert("RGB")` clips 16-bit gray, shows colours hidden under alpha 0,
ignores EXIF orientation, warns instead of refusing a decompression bomb, and puts object addresses
into its messages. Each of these is decided here once.

Axes: Y rows, X columns, C colours (see `qwenvl_jax.axes`).
"""

import io
import logging
import struct
from typing import NamedTuple

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

logger = logging.getLogger(__name__)

SNIFF_BYTES = 512

ORIENTATION_TAG = 0x0112
TURN_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {TURN_BY_ORIENTATION[tag] for tag in (5, 6, 7, 8)}


class ImageError(ValueError):
    """A picture that cannot be used: what is wrong, what was got, how to fix it."""


class Format(NamedTuple):
    """An encoding that is read: its name, how its bytes begin, Pillow's class for it."""

    name: str
    starts: tuple[bytes, ...]
    plugin: type[ImageFile.ImageFile]


# The classes are named here rather than found by `Image.open`: nothing outside this list can be
# reached (EPS would start Ghostscript), a JPEG with several pictures stays a plain JPEG, and
# Pillow's size check, which only warns below its own limit, gives way to ours.
FORMATS = (
    Format("JPEG", (b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
    Format("PNG", (b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
    Format("WEBP", (b"RIFF",), WebPImagePlugin.WebPImageFile),
    Format("GIF", (b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    Format("BMP", (b"BM",), BmpImagePlugin.BmpImageFile),
)
FORMAT_NAMES = ", ".join(f.name for f in FORMATS)

# What refused data most often turns out to be, for the message only.
OTHER_KINDS = (
    ("a TIFF picture", (b"II*\x00", b"MM\x00*")),
    ("a PDF document", (b"%PDF",)),
    ("a PostScript file", (b"%!", b"\xc5\xd0\xd3\xc6")),
    ("a Photoshop file", (b"8BPS",)),
    ("a JPEG 2000 picture", (b"\x00\x00\x00\x0cjP", b"\xff\x4f\xff\x51")),
    ("an icon file", (b"\x00\x00\x01\x00",)),
    ("a zip archive", (b"PK\x03\x04",)),
    ("gzip data", (b"\x1f\x8b",)),
    ("a Git LFS pointer (the picture itself was not downloaded)", (b"version https://git-lfs",)),
)


def keep_buffers(num: int) -> None:
    """Lets Pillow keep at least `num` freed buffers, of up to 16 MB each, for the next pictures.

    Of this process. Pillow gives each one back by default, and outside a process's first thread
    new memory pages then take a third of the time of decoding.
    """
    if Image.core.get_blocks_max() < num:
        Image.core.set_blocks_max(num)


def decode(stream: io.BufferedReader | io.BytesIO, name: str, max_pixels: int) -> Image.Image:
    """The upright RGB image of the encoded picture in a seekable binary stream.

    Of an animation the first frame is read. `name` says in messages which picture is meant.

    Raises:
      ImageError: unknown format, more pixels than `max_pixels` by the header (judged before any
        pixel is decoded), truncated or damaged data.
    """
    image, damaged = _opened(stream, name)
    with image:
        check_size(image.size, name, max_pixels)
        try:
            _scale_colour_key(image)
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # as in `_opened`
            raise ImageError(damaged) from error
        return to_rgb(image, name, max_pixels)


def upright_size(
    stream: io.BufferedReader | io.BytesIO, name: str, max_pixels: int
) -> tuple[int, int]:
    """Returns width and height of an encoded picture as people see it, from its header alone.

    Raises: ImageError as `decode`, except for what only the pixels show.
    Differs: a PNG whose EXIF block follows the pixels is taken as upright.
    """
    image, _ = _opened(stream, name)
    with image:
        check_size(image.size, name, max_pixels)
        width, height = image.size
        # a PNG may have its EXIF block behind the pixels, and Pillow would decode them to get there
        is_late = isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info
        tag = 1 if is_late else _orientation(image, name)
    is_turned = TURN_BY_ORIENTATION.get(tag) in _SWAPS_SIDES
    return (height, width) if is_turned else (width, height)


def _opened(stream: io.BufferedReader | io.BytesIO, name: str) -> tuple[ImageFile.ImageFile, str]:
    """Returns the picture with its pixels not yet read, and the message for when they cannot be."""
    head = stream.read(SNIFF_BYTES)
    stream.seek(0)
    kind = format_of(head)
    if kind is None:
        raise ImageError(
            f"{name} is not a picture that can be read: got {_looks_like(head)}, "
            f"expected {FORMAT_NAMES}; convert it, or check that this is the right file"
        )
    damaged = (
        f"{name} cannot be decoded: got {kind.name} data that is truncated or damaged, "
        "expected a whole picture; copy or save it again"
    )
    try:
        return kind.plugin(stream), damaged
    except MemoryError:
        raise
    except Exception as error:  # on damaged data Pillow raises nearly every builtin exception
        raise ImageError(damaged) from error


def to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """The upright RGB form of a PIL image of any 8-bit or 16-bit mode; maybe the image itself.

    Transparent pixels are laid over white, 16-bit gray is divided by 257, EXIF orientation is
    applied. Colour profiles are not: the released preprocessing ignores them too.
    """
    check_size(image.size, name, max_pixels)
    try:
        image.load()  # a PIL image may be open and not read, and its file no longer there
    except MemoryError:
        raise
    except Exception as error:  # as in `_opened`
        raise ImageError(
            f"{name} cannot be decoded: got one that is truncated, damaged or closed, expected a "
            "whole picture; open it again, or copy its file again"
        ) from error
    if image.mode in ("F", "I"):
        raise ImageError(
            f"{name} has an unknown brightness scale: got PIL mode {image.mode} (32 bits), "
            "expected 8 bits a colour, or 16-bit gray as mode I;16; scale it and convert it first"
        )
    try:
        turn = TURN_BY_ORIENTATION.get(_orientation(image, name))
        rgb = _over_white(_gray16_to_8(image) if image.mode.startswith("I;16") else image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(
            f"{name} cannot be turned into RGB: got PIL mode {image.mode}; convert it to RGB first"
        ) from error
    return rgb if turn is None else rgb.transpose(turn)


def check_size(size_XY: tuple[int, int], name: str, max_pixels: int) -> None:
    """Raises ImageError if a picture of this width and height is empty or over the limit."""
    width, height = size_XY
    if width < 1 or height < 1:
        raise ImageError(
            f"{name} has no pixels: got {width} x {height}, expected at least 1 x 1; check its "
            "source"
        )
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is too large: got {width} x {height} = {width * height} pixels, expected at "
            f"most {max_pixels}; make it smaller, or raise max_pixels if you trust it"
        )


def format_of(head: bytes) -> Format | None:
    """Returns what a file's first 16 bytes or more say that it is; None for what is not read."""
    for kind in FORMATS:
        # RIFF also begins WAV and AVI; the form type follows the length
        if head.startswith(kind.starts) and (kind.name != "WEBP" or head[8:12] == b"WEBP"):
            return kind
    return None


def _looks_like(head: bytes) -> str:
    """What the first bytes of refused data seem to be, in words, with no byte of it quoted."""
    if not head:
        return "no data at all (0 bytes)"
    for words, starts in OTHER_KINDS:
        if head.startswith(starts):
            return words
    if head[4:8] == b"ftyp":
        return "a HEIC, AVIF or video file"
    # a multi-byte letter may be cut at the end of the head, hence `ignore`
    text = head.decode("utf-8", "ignore")
    if len(text.encode()) < len(head) - 3 or any(c < " " and c not in "\t\n\r\f" for c in text):
        return "data of an unknown kind"
    start = text.lstrip("\ufeff \t\r\n").lower()
    if "<svg" in start:
        return "an SVG drawing"
    if start.startswith(("<!doctype html", "<html")):
        return "an HTML page"
    return "plain text"


def _scale_colour_key(image: ImageFile.ImageFile) -> None:
    """Brings the transparent colour of a PNG to the 8 bits that Pillow decodes its pixels to."""
    key = image.info.get("transparency")
    kinds = {tile.args for tile in image.tile if isinstance(tile.args, str)}
    if isinstance(key, tuple) and "RGB;16B" in kinds:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    for bits, kind in ((2, "L;2"), (4, "L;4")):
        if isinstance(key, int) and kind in kinds:
            most = (1 << bits) - 1
            image.info["transparency"] = (key & most) * (255 // most)


def _orientation(image: Image.Image, name: str) -> int:
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except (SyntaxError, struct.error, ValueError, OSError, KeyError, TypeError, IndexError):
        # the pixels are whole and only the hint is not: many cameras and editors write such files
        logger.warning("%s: its EXIF block cannot be read, so it is taken as upright", name)
        return 1


def _gray16_to_8(image: Image.Image) -> Image.Image:
    """An L or LA image of 16-bit gray: 257 v -> v, nearest otherwise."""
    gray_YX = np.asarray(image).astype(np.uint32)  # 32 bits, as 65535 + 128 overflows 16
    small = Image.fromarray(((gray_YX + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        small.putalpha(Image.fromarray(np.where(gray_YX == transparent, 0, 255).astype(np.uint8)))
    return small


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas
