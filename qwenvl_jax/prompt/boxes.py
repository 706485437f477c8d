"""The text form of places in a picture: `<ref>`, `<box>` and `<quad>` tags, and pixels.

Coordinates in text are integers 0..999, relative to the picture's width (x) and height (y).
Nothing here raises on text that a model or a user wrote: what is not a place is not reported.

The rule between pixels and text, used everywhere in this package:

    to text     n = floor(1000 * pixel / side), at most 999
    to pixels   pixel = side * n / 999          so 0 is one edge and 999 the other

`n` survives text -> pixels -> text exactly; a pixel survives pixels -> text -> pixels to within
side / 1000.
Source: released fine-tuning data (1000 * pixel / side) and grounding evaluation (n / 999 * side).
Differs: the released drawing helper divides by 1000, so its boxes never reach the far edge.
"""

import math
import operator
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

Box = tuple[int, int, int, int]  # x1, y1, x2, y2
Point = tuple[int, int]
Quad = tuple[Point, Point, Point, Point]

FULL_SIDE = 999  # the largest coordinate in text: the far edge of the picture

_TAG = re.compile(r"<(?P<closing>/?)(?P<kind>img|ref|box|quad)>")
_NUMBER = re.compile(r"\s*[-+]?\d{1,9}(?:\.\d{0,20})?\s*")
_FULL_WIDTH = str.maketrans("（），", "(),")
_NO_COMMA = re.compile(r"\)\s*\(")
_UNFINISHED = re.compile(r"<(?:box|quad)>[\d\s(),.\-]*(?:</?[a-z]*)?\Z")
_ANY_TAG = re.compile(r"</?(?:ref|box|quad)>")


class Span(NamedTuple):
    """A piece of text: `kind` is "text", "image", "ref", "box" or "quad"; `body` has no tags."""

    kind: str
    body: str


def scan(text: str) -> list[Span]:
    """Returns the text cut into spans, in order; tags that do not close stay in the text.

    Empty pieces of text are left out. An `<img>` reaches to the first `</img>`, whatever is inside;
    the other tags never nest, so an unclosed one ends where the next tag begins.
    Source: released `to_list_format`. Differs: never raises, and an unclosed tag does not swallow
    the well-formed box after it.
    """
    last_image_end = text.rfind("</img>")
    spans: list[Span] = []
    done = 0  # everything before is in `spans`
    opened: re.Match[str] | None = None
    for tag in _TAG.finditer(text):
        kind = tag["kind"]
        if opened is not None and tag["closing"] and kind == opened["kind"]:
            if opened.start() > done:
                spans.append(Span("text", text[done : opened.start()]))
            body = text[opened.end() : tag.start()]
            spans.append(Span("image" if kind == "img" else kind, body))
            done, opened = tag.end(), None
        elif opened is None or opened["kind"] != "img":
            is_opening = not tag["closing"] and (kind != "img" or tag.end() <= last_image_end)
            opened = tag if is_opening else None
    if done < len(text):
        spans.append(Span("text", text[done:]))
    return spans


def _numbers(body: str, count: int) -> list[int] | None:
    """Returns exactly `count` integers written in a box or quad, or None."""
    body = _NO_COMMA.sub("),(", body.translate(_FULL_WIDTH))
    parts = body.replace("(", "").replace(")", "").split(",", count)
    if len(parts) != count or not all(_NUMBER.fullmatch(part) for part in parts):
        return None
    return [round(float(part)) for part in parts]


def parse_boxes(text: str, inherit_ref: bool = False) -> list[dict[str, Any]]:
    """Returns the boxes and quads of an answer, in order, numbers as written.

    Each item is `{"ref": str | None, "box": (x1, y1, x2, y2)}` or
    `{"ref": str | None, "quad": ((x, y), (x, y), (x, y), (x, y))}`. The phrase goes to the first
    place after it; `inherit_ref=True` gives it to every place that follows directly (one phrase,
    several boxes).

        >>> parse_boxes("<ref>dog</ref><box>(1,2),(30,40)</box>")
        [{'ref': 'dog', 'box': (1, 2, 30, 40)}]

    Total: places with another number of points, words in them or unclosed tags are left out;
    decimals are rounded; corners are not put in order and values outside 0..999 are kept
    (`box_to_pixels` does both).
    Source: released `_fetch_all_box_with_ref`. Differs: never raises, reads quads, and lets white
    space stand between a phrase and its place.
    """
    items: list[dict[str, Any]] = []
    ref: str | None = None
    for kind, body in scan(text):
        if kind == "ref":
            ref = body.strip()
        elif kind == "box" and (n := _numbers(body, 4)):
            items.append({"ref": ref, "box": (n[0], n[1], n[2], n[3])})
            ref = ref if inherit_ref else None
        elif kind == "quad" and (n := _numbers(body, 8)):
            points = tuple((n[i], n[i + 1]) for i in range(0, 8, 2))
            items.append({"ref": ref, "quad": points})
            ref = ref if inherit_ref else None
        elif kind != "text" or body.strip():
            ref = None
    return items


def strip_boxes(text: str) -> str:
    """Returns plain text: phrases without their tags, boxes and quads gone, ends trimmed.

    An unfinished box at the very end (an answer cut short) goes too.
    """
    kept = [
        body if kind != "image" else f"<img>{body}</img>"
        for kind, body in scan(text)
        if kind not in ("box", "quad")
    ]
    return _ANY_TAG.sub("", _UNFINISHED.sub("", "".join(kept))).strip()


# --- writing ------------------------------------------------------------------------------------


def points_text(coordinates: Iterable[SupportsIndex]) -> str:
    """Returns `(x1,y1),(x2,y2),...` for a flat run of coordinates, unchecked."""
    flat = [operator.index(v) for v in coordinates]
    return ",".join(f"({x},{y})" for x, y in zip(flat[::2], flat[1::2], strict=True))


def box_text(box: Iterable[SupportsFloat]) -> str:
    """Returns `(x1,y1),(x2,y2)`.

    Raises: ValueError where it is not four whole numbers 0..999.
    """
    return points_text(_checked(box, 4, "box"))


def quad_text(quad: Iterable[Iterable[SupportsFloat]]) -> str:
    """Returns `(x1,y1),...,(x4,y4)`.

    Raises: ValueError where it is not four points of whole numbers 0..999.
    """
    return points_text(_checked([v for point in quad for v in point], 8, "quad"))


def format_box(box: Iterable[SupportsFloat]) -> str:
    """Returns `<box>(x1,y1),(x2,y2)</box>`; raises as `box_text`."""
    return f"<box>{box_text(box)}</box>"


def format_quad(quad: Iterable[Iterable[SupportsFloat]]) -> str:
    """Returns `<quad>(x1,y1),(x2,y2),(x3,y3),(x4,y4)</quad>`; raises as `quad_text`."""
    return f"<quad>{quad_text(quad)}</quad>"


def format_ref(phrase: str) -> str:
    """Returns `<ref>phrase</ref>`; a leading space is part of the phrase, as in the released data.

    Raises: ValueError where the phrase itself holds one of these tags.
    """
    if _TAG.search(phrase):
        raise ValueError(f"a phrase must not hold img, ref, box or quad tags: got {phrase!r}")
    return f"<ref>{phrase}</ref>"


def _checked(values: Iterable[SupportsFloat], count: int, name: str) -> list[int]:
    numbers = [_as_float(v) for v in values]
    if len(numbers) != count or not all(v.is_integer() for v in numbers):
        raise ValueError(f"a {name} needs {count} whole numbers: got {numbers}")
    if not all(0 <= v <= FULL_SIDE for v in numbers):
        raise ValueError(
            f"{name} coordinates must lie in 0..{FULL_SIDE}: got {numbers}; "
            f"turn pixels into them with {name}_from_pixels"
        )
    return [int(v) for v in numbers]


def _as_float(value: SupportsFloat) -> float:
    try:
        return float(value)
    except OverflowError as error:  # an integer of hundreds of digits
        raise ValueError("a number is too large for a coordinate") from error


# --- pixels -------------------------------------------------------------------------------------


def coordinate_from_pixel(pixel: SupportsFloat, side: SupportsFloat) -> int:
    """Returns 0..999 for a position along a side of that many pixels, clipped to the picture.

    Raises: ValueError where a value is not finite or the side not positive.
    """
    pixel, side = _as_float(pixel), _as_float(side)
    if not 0 < side < 1e300 or not math.isfinite(pixel):
        raise ValueError(
            f"a position needs a finite pixel and a positive side: got {pixel} of {side}"
        )
    pixel = min(max(pixel, 0.0), side)  # first, so that the product below stays finite
    return min(math.floor(1000 * pixel / side), FULL_SIDE)


def pixel_from_coordinate(coordinate: SupportsFloat, side: SupportsFloat) -> float:
    """Returns the position in pixels, 0..side; a coordinate outside 0..999 is clipped."""
    return float(side) * (min(max(float(coordinate), 0.0), FULL_SIDE) / FULL_SIDE)


def box_from_pixels(
    box: Iterable[SupportsFloat], width: SupportsFloat, height: SupportsFloat
) -> Box:
    """Returns the 0..999 box of pixel corners (x1, y1, x2, y2), corners put in order."""
    x1, y1, x2, y2 = box
    left, right = sorted(coordinate_from_pixel(x, width) for x in (x1, x2))
    top, bottom = sorted(coordinate_from_pixel(y, height) for y in (y1, y2))
    return left, top, right, bottom


def box_to_pixels(
    box: Iterable[SupportsFloat], width: SupportsFloat, height: SupportsFloat
) -> tuple[float, float, float, float]:
    """Returns pixel corners (x1 <= x2, y1 <= y2) inside the picture, as floats; NaN stays NaN."""
    x1, y1, x2, y2 = box
    left, right = sorted(pixel_from_coordinate(x, width) for x in (x1, x2))
    top, bottom = sorted(pixel_from_coordinate(y, height) for y in (y1, y2))
    return left, top, right, bottom


def quad_from_pixels(
    quad: Iterable[Iterable[SupportsFloat]], width: SupportsFloat, height: SupportsFloat
) -> Quad:
    """Returns the 0..999 quad of four pixel points, in the order given."""
    a, b, c, d = (
        (coordinate_from_pixel(x, width), coordinate_from_pixel(y, height)) for x, y in quad
    )
    return a, b, c, d


def quad_to_pixels(
    quad: Iterable[Iterable[SupportsFloat]], width: SupportsFloat, height: SupportsFloat
) -> list[tuple[float, float]]:
    """Returns the four points in pixels, inside the picture, in the order given."""
    return [(pixel_from_coordinate(x, width), pixel_from_coordinate(y, height)) for x, y in quad]
