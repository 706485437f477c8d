"""Boxes and quads of an answer, drawn over its picture with Pillow."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from qwenvl_jax.image.decode import to_rgb
from qwenvl_jax.prompt.boxes import box_to_pixels, quad_to_pixels
from qwenvl_jax.prompt.fonts import Font, font_for

MAX_BOXES = 300
_MAX_LABEL = 60  # characters

# Strong, apart from each other, and neither black nor white; then they repeat.
_PALETTE = (  # red and green last: on a sheet of answers they say wrong and right
    *((0, 130, 200), (245, 130, 48), (145, 30, 180), (0, 165, 165), (240, 50, 230)),
    *((150, 110, 0), (90, 90, 230), (200, 200, 0), (230, 25, 75), (60, 160, 60)),
)
_RIM = (255, 255, 255)
_BACKGROUND = (40, 40, 40)  # of the note about boxes that were left out

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels; the last two are outside


def draw_boxes(
    image: np.ndarray | Image.Image,
    boxes: Sequence[Mapping[str, Any]],
    max_boxes: int = MAX_BOXES,
) -> Image.Image:
    """Returns an RGB copy of the picture with the boxes and quads of `parse_boxes` drawn on it.

    `image` is uint8[Y, X, 3] or a PIL picture, drawn as the model sees it: upright, over white, 16
    bits scaled down. Coordinates are 0..999, clipped to it. Places of one phrase share a colour, in
    the order in which phrases appear (use `inherit_ref=True` when parsing so that all boxes of a
    phrase count as its own); an item may bring a "colour" of its own, (R, G, B). Lines and letters
    grow with the picture; labels stay inside it and avoid each other where they can. Beyond
    `max_boxes`, a note in the corner says how many are not drawn.

    Raises: ValueError for a picture of another kind, and an item without a box or quad.
    """
    canvas = _to_canvas(image)
    draw = ImageDraw.Draw(canvas)
    shown = boxes[:max_boxes]
    colours: dict[str | None, Colour] = {}
    for item in shown:
        colours.setdefault(item.get("ref"), _PALETTE[len(colours) % len(_PALETTE)])
    own = [item.get("colour", colours[item.get("ref")]) for item in shown]

    line = max(2, round(min(canvas.size) / 120))
    anchors = [
        _draw_place(draw, item, colour, line) for item, colour in zip(shown, own, strict=True)
    ]
    # Labels come after all lines, so that no line crosses a word.
    taken: list[Rectangle] = []
    for item, anchor, colour in zip(shown, anchors, own, strict=True):
        if item.get("ref"):
            _draw_label(draw, item["ref"], anchor, colour, taken)
    if len(boxes) > len(shown):
        corner = (0, canvas.height, 0, canvas.height)
        _draw_label(draw, f"{len(boxes) - len(shown)} more not drawn", corner, _BACKGROUND, taken)
    return canvas


def _to_canvas(image: np.ndarray | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        # By way of an array: what else the file said, as that it is to be turned, stays behind.
        image = np.asarray(to_rgb(image, "the picture to draw on", image.width * image.height))
    elif image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"a picture to draw on must be uint8[Y, X, 3]: got {image.dtype}{list(image.shape)}"
        )
    return Image.fromarray(image).copy()


def _draw_place(
    draw: ImageDraw.ImageDraw, item: Mapping[str, Any], colour: Colour, line: int
) -> Rectangle:
    """Draws one outline with a thin light rim; returns the rectangle around it."""
    width, height = draw.im.size
    if "box" in item:
        exact = box_to_pixels(item["box"], width - 1, height - 1)
        x1, y1, x2, y2 = (round(v) for v in exact)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_RIM, width=line + 2)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        return x1, y1, x2, y2
    if "quad" in item:
        exact = quad_to_pixels(item["quad"], width - 1, height - 1)
        corners = [(round(x), round(y)) for x, y in exact]
        path = [*corners, *corners[:2]]  # one side again, so that the first corner is joined too
        draw.line(path, fill=_RIM, width=line + 2, joint="curve")
        draw.line(path, fill=colour, width=line, joint="curve")
        xs, ys = zip(*corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)
    raise ValueError(f"an item to draw needs a box or a quad: got keys {sorted(item)}")


def _draw_label(
    draw: ImageDraw.ImageDraw,
    label: str,
    anchor: Rectangle,
    colour: Colour,
    taken: list[Rectangle],
) -> None:
    """Writes a label by its place, adding it to `taken`; nothing where it cannot fit."""
    width, height = draw.im.size
    size = min(max(round(min(width, height) / 24), 11), 44)
    pad = max(1, size // 6)
    font, text = font_for(" ".join(label.split())[:_MAX_LABEL], size)
    text = _shortened(draw, text, font, width - 2 * pad)
    left, top, right, bottom = (round(v) for v in draw.textbbox((0, 0), text, font))
    label_width, label_height = right - left + 2 * pad, bottom - top + 2 * pad
    if not text or label_width > width or label_height > height:
        return
    x = min(max(anchor[0], 0), width - label_width)
    above, below = anchor[1] - label_height, anchor[3] + 1
    inside = [anchor[1], anchor[3] - label_height]
    is_roomy = anchor[3] - anchor[1] > 3 * label_height  # a label inside hides little of it
    spots = [
        (x, y, x + label_width, y + label_height)
        for y in ([above, *inside, below] if is_roomy else [above, below, *inside])
        if 0 <= y <= height - label_height
    ]
    spots = spots or [(x, 0, x + label_width, label_height)]
    spot = next((s for s in spots if not any(_overlap(s, t) for t in taken)), spots[0])
    taken.append(spot)
    draw.rectangle((spot[0], spot[1], spot[2] - 1, spot[3] - 1), fill=colour)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = (0, 0, 0) if luminance > 140 else (255, 255, 255)
    draw.text((spot[0] + pad - left, spot[1] + pad - top), text, fill=ink, font=font)


def _shortened(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """Returns the text, cut and ended by two dots where it is wider than that many pixels."""
    cut = text
    while cut and draw.textlength(cut if cut == text else f"{cut}..", font) > width:
        cut = cut[:-1].rstrip()
    return cut if cut == text else f"{cut}.." if cut else ""


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
