"""One page of a PDF file through PDFium (pypdfium2, Apache 2.0 or BSD): picture, lines and words.

PDFium gives characters in the order of the file, with a box each, and marks where lines end. Boxes
go through the page's own matrix, so turned and cropped pages come out as people see them.

Axes: M points, D the two coordinates x and y.
"""

import ctypes
import math
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.sources.stream import Refusal

MAX_SIDE = 4096  # pixels
_COLUMN_GAP = 2.0  # character heights: further apart, two pieces of a line are two lines
_TURNED = 0.05  # radians: text that leans more in the picture has no upright box
_FINE = 1 << 12  # device units of a page's side: PDFium's positions are whole numbers
_HYPHENS = "\x02\ufffe"  # PDFium's signs for a hyphen at the end of a line

Box = tuple[float, float, float, float]  # x1, y1, x2, y2


class Placed(NamedTuple):
    """A piece of text and its box in pixels of the picture."""

    text: str
    box: Box


class PdfPage(NamedTuple):
    """A page as people see it, with its text in the order of the file."""

    image: Image.Image
    lines: list[Placed]
    words: list[Placed]

    @property
    def text(self) -> str:
        return "\n".join(line.text for line in self.lines)


def pdfium() -> Any:
    """Returns the module pypdfium2.

    Raises: DataError where it is not installed.
    """
    try:
        import pypdfium2
    except ImportError as error:
        raise DataError(
            "PDF pages need the package pypdfium2: it is not installed; pip install '.[generate]'"
        ) from error
    return pypdfium2


def open_pdf(data: bytes, name: str) -> Any:
    """Returns the PdfDocument of a file's bytes; the caller closes it.

    Raises: Refusal (a DataError) for encrypted and damaged files.
    """
    library = pdfium()
    try:
        return library.PdfDocument(data)
    except library.PdfiumError as error:
        if error.err_code in (library.raw.FPDF_ERR_PASSWORD, library.raw.FPDF_ERR_SECURITY):
            detail = "the file needs a password; save it without one"
            raise Refusal(name, "encrypted PDF", detail) from error
        detail = f"the file cannot be opened ({error}); expected a whole PDF file"
        raise Refusal(name, "damaged PDF", detail) from error


def read_page(document: Any, number: int, side: int) -> PdfPage:
    """Returns page `number` (from 0), drawn so that its longer side has `side` pixels.

    Text that leans, lies outside of the page or has no size is left out of lines and words.

    Raises: DataError for a page that PDFium cannot read.
    """
    library = pdfium()
    if not 0 < side <= MAX_SIDE:
        raise DataError(f"a page's side must be 1..{MAX_SIDE} pixels: got {side}")
    try:
        page = document[number]
        width, height = page.get_size()
        if not (0 < width < 1e5 and 0 < height < 1e5):
            raise DataError(f"page {number + 1} has no usable size: got {width} x {height} points")
        image = page.render(scale=side / max(width, height)).to_pil().convert("RGB")
        pieces = list(_pieces(library.raw, page, page.get_textpage(), image.size))
    except library.PdfiumError as error:
        raise DataError(f"page {number + 1} cannot be read: {error}") from error
    return PdfPage(image, _joined(pieces, {"line"}), _joined(pieces, {"line", "word"}))


class _Sign(NamedTuple):
    """A character with its box, or an end: text "" and what ends, "word" or "line"."""

    text: str
    box: Box
    ends: str = ""


def _pieces(raw: Any, page: Any, textpage: Any, size: tuple[int, int]) -> Iterator[_Sign]:
    to_pixels, turn = _matrix(raw, page, size), math.radians(page.get_rotation())
    before: Box | None = None
    for index in range(textpage.count_chars()):
        char = chr(raw.FPDFText_GetUnicode(textpage, index))
        char = "-" if char in _HYPHENS else char
        if char in "\r\n":
            yield _Sign("", (0, 0, 0, 0), "line")
            before = None
        elif char.isspace() or unicodedata.category(char) == "Cc":
            yield _Sign("", (0, 0, 0, 0), "word")
        else:
            leans = math.remainder(raw.FPDFText_GetCharAngle(textpage, index) + turn, math.tau)
            box = _char_box(raw, textpage, index, to_pixels)
            if box is None or abs(leans) > _TURNED or not _is_inside(box, size):
                continue
            if before is not None and _is_apart(before, box):
                yield _Sign("", (0, 0, 0, 0), "line")
            before = box
            yield _Sign(char, box)


def _matrix(raw: Any, page: Any, size: tuple[int, int]) -> np.ndarray:
    """Returns float [3, 2] that takes (x, y, 1) in points to pixels, from three corners."""
    x, y = ctypes.c_int(), ctypes.c_int()
    width, height = page.get_size()
    reach = max(width, height)
    seen = []
    for corner in ((0, 0), (reach, 0), (0, reach)):
        raw.FPDF_PageToDevice(page, 0, 0, _FINE, _FINE, 0, *corner, x, y)
        seen.append((x.value / _FINE * size[0], y.value / _FINE * size[1]))
    corners = np.array([[0, 0, 1], [reach, 0, 1], [0, reach, 1]], float)
    return np.linalg.solve(corners, np.array(seen))


def _char_box(raw: Any, textpage: Any, index: int, to_pixels: np.ndarray) -> Box | None:
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    if not raw.FPDFText_GetCharBox(textpage, index, left, right, bottom, top):
        return None
    ends = np.array([[left.value, bottom.value, 1], [right.value, top.value, 1]]) @ to_pixels
    (x1, y1), (x2, y2) = ends.min(0).tolist(), ends.max(0).tolist()
    return (x1, y1, x2, y2) if x2 - x1 > 0.1 and y2 - y1 > 0.1 else None


def _is_inside(box: Box, size: tuple[int, int]) -> bool:
    x1, y1, x2, y2 = box
    return x1 > -1 and y1 > -1 and x2 < size[0] + 1 and y2 < size[1] + 1


def _is_apart(before: Box, box: Box) -> bool:
    height = max(before[3] - before[1], box[3] - box[1])
    return box[0] - before[2] > _COLUMN_GAP * height or box[2] < before[0] - 0.5 * height


def _joined(pieces: list[_Sign], ends: set[str]) -> list[Placed]:
    """Returns the signs as lines or words, each with the box around all of its signs."""
    found: list[Placed] = []
    text, boxes = "", []
    for sign in [*pieces, _Sign("", (0, 0, 0, 0), "line")]:
        if sign.text:
            text += sign.text
            boxes.append(sign.box)
        elif sign.ends not in ends:
            text += " " if text and not text.endswith(" ") else ""
        elif boxes:
            around = np.array(boxes)
            x1, y1 = around[:, :2].min(0).tolist()
            x2, y2 = around[:, 2:].max(0).tolist()
            found.append(Placed(unicodedata.normalize("NFC", text.strip()), (x1, y1, x2, y2)))
            text, boxes = "", []
    return found
