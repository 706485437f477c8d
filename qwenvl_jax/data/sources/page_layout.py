"""A page of text before it is bent: lines in columns and blocks, each with the box of its ink.

Source: the published default ranges of SynthDoG (`config_en.yaml` of clovaai/donut); how they are
laid out is our own.
"""

import dataclasses
import functools
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qwenvl_jax.data.example import DataError
from qwenvl_jax.prompt.fonts import has_glyph

Colour = tuple[int, int, int]
Range = tuple[float, float]

_MARGIN = (0.0, 0.1)  # of the page, each side for itself
_MAX_ROWS, _MAX_COLUMNS = 10, 3  # of a block
_FILL = (0.5, 1.0)  # of a column's width, by a line; of the page's height, by its blocks
_FULL = 0.1  # of the pages are filled to the end
_SPACING = 0.0334  # between blocks, of the page's shorter side
_LEADING = 1.3  # of a line's height to its font's size
_GAP = 1.5  # font sizes between columns
_COLOURED = 0.2  # of the pages, and of the blocks, have ink other than black
_DARKEST = (0, 64)  # gray of such ink, before it is tinted
_PUNCTUATION_FIRST = "，。！？：；、”）》,.!?:;)"  # never starts a line of Chinese


@dataclasses.dataclass(frozen=True)
class PageLine:
    """One line as drawn: `box` is x1, y1, x2, y2 in page pixels, tight around its ink.

    `column` counts columns through the page, so that lines of one column follow each other.
    """

    text: str
    box: tuple[int, int, int, int]
    colour: Colour
    column: int
    ink: Image.Image  # "L", of the size of the box
    font: ImageFont.FreeTypeFont

    def middles(self) -> list[tuple[float, float]]:
        """Returns the page's x and y of the middle of each character, spaces included."""
        left, top, _, bottom = self.box
        start = left - self.font.getbbox(self.text)[0]  # where its first advance begins
        ends = [self.font.getlength(self.text[: n + 1]) for n in range(len(self.text))]
        return [
            (start + (before + after) / 2, (top + bottom) / 2)
            for before, after in zip([0.0, *ends], ends, strict=False)
        ]


@dataclasses.dataclass(frozen=True)
class Page:
    """Lines in reading order on a page of a width and a height."""

    size: tuple[int, int]
    lines: tuple[PageLine, ...]

    def ink(self, colour: Colour) -> Image.Image:
        """Returns the coverage ("L") of all ink of one colour."""
        layer = Image.new("L", self.size)
        for line in self.lines:
            if line.colour == colour:
                layer.paste(line.ink, line.box[:2])
        return layer


class _Text:
    """Text that is used up line by line, only in signs that a font has."""

    def __init__(self, text: str, is_chinese: bool):
        self.words = list(text) if is_chinese else text.split()
        self.space = "" if is_chinese else " "
        self.used = 0

    def line(self, font: ImageFont.FreeTypeFont, path: str, width: float) -> str:
        """Returns as many next words as fit; words wider than a line are left out."""
        taken: list[str] = []
        length = 0.0
        while self.used < len(self.words):
            word = "".join(c for c in self.words[self.used] if has_glyph(path, c))
            extra = font.getlength(self.space + word if taken else word)
            if word and taken and length + extra > width:
                break
            if word and extra > width:  # alone too wide for this column
                self.used += 1
                continue
            self.used += 1
            if word:
                taken.append(word)
                length += extra
        if self.used < len(self.words) and self.words[self.used] in _PUNCTUATION_FIRST and taken:
            self.used += 1
        return self.space.join(taken).strip()


@functools.lru_cache(maxsize=256)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise DataError(f"the font {path} cannot be used: {error}; remove it") from error


def lay_out(
    size: tuple[int, int],
    text: str,
    fonts: tuple[Path, ...],
    text_scale: Range,
    max_lines: int,
    rng: random.Random,
) -> Page:
    """Returns a page with at least one line and at most `max_lines`.

    `text_scale` is of a line's height to the page's shorter side.

    Raises: DataError for a font file that cannot be used.
    """
    width, height = size
    left, top = rng.uniform(*_MARGIN) * width, rng.uniform(*_MARGIN) * height
    right, bottom = width * (1 - rng.uniform(*_MARGIN)), height * (1 - rng.uniform(*_MARGIN))
    is_full = rng.random() < _FULL
    end = bottom if is_full else top + rng.uniform(*_FILL) * (bottom - top)
    source = _Text(text, " " not in text[:200] or language_is_chinese(text))
    main = _ink(rng) if rng.random() < _COLOURED else (0, 0, 0)
    lines: list[PageLine] = []
    y, column = top, 0
    while y < end and len(lines) < max_lines:
        block = _Block(rng, min(size), text_scale, fonts, main)
        if lines and y + block.line_height > end:
            break
        room = min(end, bottom) if lines else bottom
        added, y, column = block.fill(
            source, (left, y, right, room), max_lines - len(lines), column, is_full
        )
        if not added:
            break
        lines += added
        y += _SPACING * min(size)
    return Page(size, tuple(lines))


def language_is_chinese(text: str) -> bool:
    return any("\u4e00" <= char <= "\u9fff" for char in text[:200])


def _ink(rng: random.Random) -> Colour:
    gray = rng.randint(*_DARKEST)
    red, green, blue = (min(255, gray + rng.choice((0, 0, 40, 90))) for _ in "rgb")
    return red, green, blue


class _Block:
    """A group of columns in one font, size, colour and alignment."""

    def __init__(
        self,
        rng: random.Random,
        page_side: int,
        text_scale: Range,
        fonts: tuple[Path, ...],
        colour: Colour,
    ):
        self.rng = rng
        self.line_height = rng.uniform(*text_scale) * page_side
        self.path = str(rng.choice(fonts))
        self.font = _font(self.path, max(6, round(self.line_height / _LEADING)))
        self.colour = _ink(rng) if rng.random() < _COLOURED else colour
        self.align = rng.choice((0.0, 0.5, 1.0))  # left, centre, right

    def fill(
        self,
        source: _Text,
        area: tuple[float, float, float, float],  # left, top, right, bottom
        most: int,
        column: int,
        is_full: bool,
    ) -> tuple[list[PageLine], float, int]:
        """Returns the block's lines, column after column, where it ends, and the next column."""
        left, top, right, bottom = area
        gap = _GAP * self.font.size
        possible = max(1, min(_MAX_COLUMNS, int((right - left) / (8 * self.font.size))))
        columns = self.rng.randint(1, possible)
        rows = max(1, min(_MAX_ROWS, int((bottom - top) / self.line_height), most // columns))
        rows = rows if is_full else self.rng.randint(1, rows)
        shares = [self.rng.uniform(1, 1.6) for _ in range(columns)]
        x, lines = left, []
        for share in shares[:most]:
            width = share / sum(shares) * (right - left - gap * (columns - 1))
            for row in range(rows):
                line = self._line(source, x, top + row * self.line_height, width, column)
                lines += [] if line is None else [line]
            x += width + gap
            column += 1
        return lines, top + rows * self.line_height, column

    def _line(
        self, source: _Text, x: float, y: float, width: float, column: int
    ) -> PageLine | None:
        filled = self.rng.uniform(*_FILL) * width
        text = source.line(self.font, self.path, max(filled, min(width, 4.0 * self.font.size)))
        if not any(char.isalnum() for char in text):  # bullets and rules are no text
            return None
        x1, y1, x2, y2 = (int(edge) for edge in self.font.getbbox(text))
        tile = Image.new("L", (x2 - x1 + 4, y2 - y1 + 4))
        ImageDraw.Draw(tile).text((2 - x1, 2 - y1), text, fill=255, font=self.font)
        ink = tile.getbbox()
        if ink is None:
            return None
        left = round(x + self.align * max(0.0, width - (ink[2] - ink[0])))
        top = round(y) + y1 + ink[1] - 2
        box = (left, top, left + ink[2] - ink[0], top + ink[3] - ink[1])
        return PageLine(text, box, self.colour, column, tile.crop(ink), self.font)
