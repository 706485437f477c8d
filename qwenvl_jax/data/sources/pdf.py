"""Pages of PDF files as pictures, with their lines and words and where these lie.

PDFium reads and draws (`pdf_page.py`). The paper used PyMuPDF, whose licence (AGPL)
would bind everything that is built on this package. Source: paper A.4; its thresholds are not
published, so those here are our own.
"""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.pdf_page import Box, PdfPage, open_pdf, pdfium, read_page
from qwenvl_jax.data.sources.stream import FoundFiles, Refusal
from qwenvl_jax.prompt.boxes import quad_from_pixels

ENDINGS = (".pdf",)
_VERSION = 1  # raise it when the same file gives other rows
_QUALITY = 90  # of the JPEG
_LATIN_EXTENDED = re.compile("[\u0100-\u024f]")  # A and B
_PRIVATE_USE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]")


@dataclasses.dataclass(frozen=True)
class PageLimits:
    """Which pages are kept, by the paper's rules."""

    min_side: int = 224  # pixels of the page's shorter side as drawn
    min_characters: int = 20
    max_characters: int = 1500  # with their quads, more do not fit into 2048 tokens
    latin_extended: bool = False  # True keeps pages with letters as in Polish or Turkish


def reason_against(page: PdfPage, limits: PageLimits) -> tuple[str, str] | None:
    """Returns a short reason and its detail where a page is to be left out, None for a good one."""
    text = page.text
    if min(page.image.size) < limits.min_side:
        return "small picture", f"got {page.image.size}, expected sides from {limits.min_side}"
    if len(text) < limits.min_characters:
        return "few characters", f"got {len(text)}, expected at least {limits.min_characters}"
    if len(text) > limits.max_characters:
        return "many characters", f"got {len(text)}, expected at most {limits.max_characters}"
    if not limits.latin_extended and (found := _LATIN_EXTENDED.search(text)):
        return "Latin Extended characters", f"got U+{ord(found[0]):04X}"
    if found := _PRIVATE_USE.search(text):
        return "Private Use characters", f"got U+{ord(found[0]):04X}: its font has its own signs"
    return None


@dataclasses.dataclass(frozen=True)
class PdfPages:
    """A Stream of the pages below a folder (or of one file) as rows of the task ocr.

    `side` is the longer side of the pictures in pixels, `unit` what a quad goes around. Pages that
    `limits` leave out, encrypted and damaged files are yielded as refusals with their reasons.

    Raises: DataError where there is no PDF file, or pypdfium2 is not installed.
    """

    path: Path
    side: int = 1024
    unit: Literal["line", "word"] = "line"
    limits: PageLimits = dataclasses.field(default_factory=PageLimits)

    def __post_init__(self) -> None:
        pdfium()
        _ = self._files  # so that missing ones are noticed at once

    @property
    def _files(self) -> FoundFiles:
        return FoundFiles(self.path, ENDINGS)

    @property
    def fingerprint(self) -> str:
        settings = {"side": self.side, "unit": self.unit, "limits": repr(self.limits)}
        return self._files.fingerprint(kind="pdf", version=_VERSION, **settings)

    def shards(self) -> list[str]:
        """Returns one shard for each file."""
        return self._files.names()

    def read(self, shard: str) -> Iterator[Record | DataError]:
        """Yields the file's pages in order. Raises: OSError where it cannot be read."""
        data = (self._files.root / shard).read_bytes()
        try:
            with contextlib.closing(open_pdf(data, shard)) as document:
                for number in range(len(document)):
                    yield self._row(document, number, f"{shard}#{number + 1}")
        except Refusal as refusal:
            yield refusal

    def _row(self, document: Any, number: int, key: str) -> Record | Refusal:
        try:
            page = read_page(document, number, self.side)
        except DataError as error:
            return Refusal(key, "unreadable page", str(error))
        against = reason_against(page, self.limits)
        if against is not None:
            return Refusal(key, *against)
        pieces = page.words if self.unit == "word" else page.lines
        lines = [[text, _quad(box, page.image.size)] for text, box in pieces]
        data = io.BytesIO()
        page.image.save(data, "JPEG", quality=_QUALITY)
        return Record(key, "ocr", {"lines": lines}, (data.getvalue(),))


def _quad(box: Box, size: tuple[int, int]) -> list[list[int]]:
    x1, y1, x2, y2 = box
    quad = quad_from_pixels(((x1, y1), (x2, y1), (x2, y2), (x1, y2)), *size)
    return [list(point) for point in quad]
