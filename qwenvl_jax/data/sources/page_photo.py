"""One document as a picture: a laid-out page on paper, bent, on a background, photographed.

`photograph(...)` is pure in its settings and its random stream. A line is labelled if its quad lies
in the picture and can be read; the others stay in the picture and are counted.
"""

import dataclasses
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from qwenvl_jax.data.sources import page_effects
from qwenvl_jax.data.sources.backgrounds import background, muted
from qwenvl_jax.data.sources.page_layout import Page, PageLine, Range, lay_out
from qwenvl_jax.data.sources.page_warp import Box, Warp, random_warp

_FULLSCREEN = 0.5  # of the pages fill the picture
_PAGE_SHARE = (0.667, 1.0)  # of the picture's shorter side, by the page's: 480..1024 of 720..1024
_ASPECT = (1.0, 2.0)  # of a page, long to short side
_LANDSCAPE = 0.5
_OVERHANG = 0.06  # of a page's side may lie outside of the picture
_BACKGROUND_BLUR = (0.0, 10.0)  # sigma, pixels
_FULL_SIZE = 720  # pixels: amounts in pixels are for pictures of at least this shorter side
_SHRINK = 4  # a blurred background is made so many times smaller

OUTSIDE = 0.1  # of a line's height: a quad that leaves the picture further is not labelled
MIN_HEIGHT = 6.0  # pixels in the picture: a lower line is not labelled


@dataclasses.dataclass(frozen=True)
class PageSettings:
    """What documents look like. The defaults are SynthDoG's, in this module and its neighbours."""

    short_side: tuple[int, int] = (720, 1024)  # pixels of the picture
    aspect: Range = (1.0, 2.0)  # of the picture, long to short side
    text_scale: Range = (0.0334, 0.1)  # of a line's height to the page's shorter side
    max_lines: int = 24  # with their quads they fit into 2048 tokens beside the picture


@dataclasses.dataclass(frozen=True)
class Line:
    """A line that can be read: its quad [4][2] in pixels, clockwise from its own top left."""

    text: str
    quad: np.ndarray
    column: int


@dataclasses.dataclass(frozen=True)
class Document:
    """A picture with its lines in reading order; `unlabelled` more are cut off or too small."""

    image: Image.Image
    lines: tuple[Line, ...]
    unlabelled: int
    page: Page
    warp: Warp


def photograph(
    settings: PageSettings,
    text: str,
    fonts: tuple[Path, ...],
    photos: tuple[Path, ...],
    rng: random.Random,
) -> Document:
    """Returns a document that shows text, with at least one line labelled.

    Raises: DataError for a font or a photo that cannot be used.
    """
    while True:
        size = _sides(rng.randint(*settings.short_side), settings.aspect, rng)
        box = _place(size, rng)
        page_size = (round(box[2] - box[0]), round(box[3] - box[1]))
        page = lay_out(page_size, text, fonts, settings.text_scale, settings.max_lines, rng)
        warp = random_warp(page_size, size, box, rng)
        found = [_labelled(line, warp) for line in page.lines]
        lines = tuple(line for line in found if line is not None)
        if lines:
            image = _drawn(page, warp, photos, rng)
            return Document(image, lines, len(found) - len(lines), page, warp)


def _sides(short: int, aspect: Range, rng: random.Random) -> tuple[int, int]:
    long = round(short * rng.uniform(*aspect))
    return (long, short) if rng.random() < _LANDSCAPE else (short, long)


def _place(size: tuple[int, int], rng: random.Random) -> Box:
    """Returns where in the picture the page lies before perspective shrinks it."""
    width, height = size
    if rng.random() < _FULLSCREEN:
        return (0, 0, width, height)
    share, aspect = rng.uniform(*_PAGE_SHARE), rng.uniform(*_ASPECT)
    page_width = page_height = share * min(size)
    if rng.random() < _LANDSCAPE:
        page_width = min(width, page_width * aspect)
    else:
        page_height = min(height, page_height * aspect)
    over = _OVERHANG * min(page_width, page_height)
    x = rng.uniform(-over, max(0.0, width - page_width) + over)
    y = rng.uniform(-over, max(0.0, height - page_height) + over)
    return (x, y, x + page_width, y + page_height)


def _labelled(line: PageLine, warp: Warp) -> Line | None:
    """Returns the line with its quad cut to the picture, or None where it is not labelled."""
    quad = warp.quad(line.box)
    height = min(np.hypot(*(quad[3] - quad[0])), np.hypot(*(quad[2] - quad[1])))
    inside = np.clip(quad, 0, np.array(warp.picture))
    if height < MIN_HEIGHT or np.abs(inside - quad).max() > OUTSIDE * height:
        return None
    return Line(line.text, inside, line.column)


def _drawn(page: Page, warp: Warp, photos: tuple[Path, ...], rng: random.Random) -> Image.Image:
    size = warp.picture
    scale = min(1.0, min(size) / _FULL_SIZE)
    small = (max(1, size[0] // _SHRINK), max(1, size[1] // _SHRINK))
    blur = ImageFilter.GaussianBlur(rng.uniform(*_BACKGROUND_BLUR) * scale / _SHRINK)
    image = (
        background(rng, small, muted(rng), photos)
        .filter(blur)
        .resize(size, Image.Resampling.BILINEAR)
    )
    sheet = page_effects.paper(size, rng)
    for colour in dict.fromkeys(line.colour for line in page.lines):
        ink = page_effects.roughened(warp.apply(page.ink(colour)), rng, scale)
        sheet.paste(colour, (0, 0, *size), ink)
    sheet = page_effects.grain(sheet, rng)
    image.paste(sheet, (0, 0), warp.apply(Image.new("L", page.size, 255)))
    return page_effects.photographed(image, rng, scale)
