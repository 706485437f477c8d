"""Coverage masks of shapes and of lines of text, antialiased, with exact places of their ink.

Everything is drawn `SUPERSAMPLE` times larger and averaged down, so places are finer than pixels.
"""

import functools
import itertools
import math

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
SUPERSAMPLE = 3


def _outline(shape: str) -> list[Point]:
    """Returns a polygon in the unit square (y down)."""
    if shape == "square":
        return [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)]
    if shape == "triangle":
        return [(0.5, 0.04), (1.0, 0.94), (0.0, 0.94)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)]
    if shape == "cross":
        a, b = 0.33, 0.67
        right = [(a, 0.0), (b, 0.0), (b, a), (1.0, a), (1.0, b), (b, b)]
        return [*right, (b, 1.0), (a, 1.0), (a, b), (0.0, b), (0.0, a), (a, a)]
    if shape == "star":
        radii = (0.53, 0.21)
        return [
            (
                0.5 + radii[i % 2] * math.sin(i * math.pi / 5),
                0.53 - radii[i % 2] * math.cos(i * math.pi / 5),
            )
            for i in range(10)
        ]
    if shape == "heart":
        angles = [2 * math.pi * i / 48 for i in range(48)]
        return [
            (
                0.5 + 0.5 * math.sin(t) ** 3,
                0.43
                - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                / 32,
            )
            for t in angles
        ]
    raise ValueError(f"unknown shape: got {shape!r}, expected one of {SHAPES}")


@functools.lru_cache(maxsize=2048)
def shape_mask(shape: str, pixels: int) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Returns a shape's antialiased coverage of a square of so many pixels, and its tight box."""
    fine = pixels * SUPERSAMPLE
    mask = Image.new("L", (fine, fine))
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, fine - 1, fine - 1), fill=255)
        if shape == "ring":
            rim = round(0.24 * fine)
            draw.ellipse((rim, rim, fine - 1 - rim, fine - 1 - rim), fill=0)
    else:
        draw.polygon([(x * (fine - 1), y * (fine - 1)) for x, y in _outline(shape)], fill=255)
    box = mask.getbbox()
    assert box is not None  # every outline covers pixels
    x1, y1, x2, y2 = (edge / SUPERSAMPLE for edge in box)
    return mask.reduce(SUPERSAMPLE), (x1, y1, x2, y2)


@functools.lru_cache(maxsize=64)
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(pixels)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "Pillow was built without FreeType: words cannot be drawn; install a Pillow wheel"
        )
    return font


def writing_mask(text: str, pixels: int, degrees: float) -> tuple[Image.Image, list[Point]]:
    """Returns the coverage of a line of text and the four corners of its ink, turned by an angle.

    `pixels` is the font size; positive degrees turn against the clock. Corners run clockwise from
    the text's own top left corner, in pixels of the returned mask.
    """
    font = _font(pixels * SUPERSAMPLE)
    stroke = max(1, pixels // 14)
    x1, y1, x2, y2 = (round(edge) for edge in font.getbbox(text, stroke_width=stroke))
    ink = Image.new("L", (x2 - x1, y2 - y1))
    ImageDraw.Draw(ink).text((-x1, -y1), text, fill=255, font=font, stroke_width=stroke)
    ink = ink.crop(ink.getbbox())
    half_w, half_h = ink.width / 2, ink.height / 2
    if degrees:
        ink = ink.rotate(degrees, resample=Image.Resampling.BILINEAR, expand=True)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    centre_x, centre_y = ink.width / 2, ink.height / 2
    corners = [
        (
            (centre_x + dx * cos + dy * sin) / SUPERSAMPLE,
            (centre_y - dx * sin + dy * cos) / SUPERSAMPLE,
        )
        for dx, dy in ((-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h))
    ]
    whole = Image.new("L", (_whole_pixels(ink.width), _whole_pixels(ink.height)))
    whole.paste(ink, (0, 0))
    return whole.reduce(SUPERSAMPLE), corners


def letter_places(text: str) -> list[float]:
    """Returns how far along its line each letter's middle lies: 0 the start, 1 the end."""
    font = _font(64)
    ends = [font.getlength(text[:i]) / font.getlength(text) for i in range(len(text) + 1)]
    return [(start + end) / 2 for start, end in itertools.pairwise(ends)]


def _whole_pixels(fine: int) -> int:
    """Returns a length rounded up to a multiple of `SUPERSAMPLE`."""
    return -(-fine // SUPERSAMPLE) * SUPERSAMPLE
