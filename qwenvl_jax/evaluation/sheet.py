"""A contact sheet: pictures with the boxes of the answers, and beside each what was asked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from qwenvl_jax.prompt.boxes import parse_boxes, strip_boxes
from qwenvl_jax.prompt.draw import draw_boxes
from qwenvl_jax.prompt.fonts import font_for

PICTURE_SIDE = 360
TEXT_WIDTH = 620
MARGIN = 24
TEXT_SIZE = 20
LINE_HEIGHT = 29
MAX_LINES = 3  # of one prompt or answer
PAPER = (252, 252, 250)
INK = (25, 25, 30)
FAINT = (120, 120, 128)
GOOD = (20, 130, 60)
BAD = (190, 40, 40)

Colour = tuple[int, int, int]


class Exchange(NamedTuple):
    """One prompt about a picture and its answer; `expected` is what would have been right."""

    asked: str
    answer: str  # with its tags
    is_right: bool
    expected: str  # with its tags


class Sitting(NamedTuple):
    image_YXC: np.ndarray  # uint8
    exchanges: Sequence[Exchange]


def draw_sheet(title: str, sittings: Sequence[Sitting]) -> Image.Image:
    """Returns the sheet: one row a picture, boxes drawn on it, prompts and answers to its right.

    Green is right, red is wrong, of texts and of boxes.
    """
    texts = [[line for exchange in one.exchanges for line in _lines(exchange)] for one in sittings]
    pictures = [_picture(one) for one in sittings]
    pairs = zip(pictures, texts, strict=True)
    heights = [max(picture.height, LINE_HEIGHT * len(lines)) for picture, lines in pairs]
    width = PICTURE_SIDE + TEXT_WIDTH + 3 * MARGIN
    sheet = Image.new(
        "RGB", (width, sum(heights) + MARGIN * (len(heights) + 2) + LINE_HEIGHT), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    _write(draw, (MARGIN, MARGIN), title, FAINT)
    top = 2 * MARGIN + LINE_HEIGHT
    for picture, lines, height in zip(pictures, texts, heights, strict=True):
        sheet.paste(picture, (MARGIN, top))
        for i, (text, colour) in enumerate(lines):
            _write(draw, (PICTURE_SIDE + 2 * MARGIN, top + i * LINE_HEIGHT), text, colour)
        top += height + MARGIN
    return sheet


def _picture(sitting: Sitting) -> Image.Image:
    picture = Image.fromarray(sitting.image_YXC)
    picture = ImageOps.contain(picture, (PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
    boxes = [box for exchange in sitting.exchanges for box in _boxes(exchange)]
    return draw_boxes(picture, boxes)


def _boxes(exchange: Exchange) -> list[dict[str, Any]]:
    """Returns the boxes of an answer, green or red as its text, and of the right one beside it."""
    said, right = parse_boxes(exchange.answer), parse_boxes(exchange.expected)
    colour = GOOD if exchange.is_right else BAD
    boxes = [box | {"colour": colour} for box in said]
    return boxes if exchange.is_right else [*boxes, *(box | {"colour": GOOD} for box in right)]


def _lines(exchange: Exchange) -> list[tuple[str, Colour]]:
    """Returns the lines of one exchange: prompt, answer, the truth where it is another; a gap."""
    answer_colour = GOOD if exchange.is_right else BAD
    texts = [(exchange.asked, INK), (_readable(exchange.answer), answer_colour)]
    if not exchange.is_right:
        texts.append((f"right would be: {_readable(exchange.expected)}", FAINT))
    lines = [
        (line, colour) for text, colour in texts for line in wrap(text, TEXT_WIDTH)[:MAX_LINES]
    ]
    return [*lines, ("", INK)]


def _readable(answer: str) -> str:
    """Returns the answer without tags; a place without a phrase is said to be drawn."""
    places = parse_boxes(answer)
    return strip_boxes(answer) or ("(see the box)" if places else "(nothing)")


def wrap(text: str, width: int) -> list[str]:
    """Returns the text in lines no wider than so many pixels.

    Lines end between words; a word that is wider than a line, as Chinese is, ends anywhere.
    """
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _width(longer) <= width:
            lines[-1] = longer
        elif _width(word) <= width:
            lines.append(word)
        else:
            lines[-1:] = _broken(longer, word, width)
    return lines


def _broken(line: str, word: str, width: int) -> list[str]:
    """Returns a line that ends in a wide word, cut inside that word only."""
    lines = [line[: len(line) - len(word)]]
    for char in word:
        if lines[-1] and _width(lines[-1] + char) > width:
            lines.append("")
        lines[-1] += char
    return [part.rstrip() for part in lines]


def _width(text: str) -> float:
    font, writable = font_for(text, TEXT_SIZE)
    return font.getlength(writable)


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, colour: Colour) -> None:
    font, writable = font_for(text, TEXT_SIZE)
    draw.text(corner, writable, fill=colour, font=font)
