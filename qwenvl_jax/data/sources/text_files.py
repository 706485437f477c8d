"""Plain text for the language task: .txt files, or .jsonl files with a field `text`."""

import json
from collections.abc import Iterator
from pathlib import Path

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.lines import ranges, read_lines, split
from qwenvl_jax.data.sources.stream import FoundFiles, Refusal

ENDINGS = (".txt", ".jsonl")
# A row of 2048 tokens holds about this many Chinese characters, and more English ones; samples are
# packed, so shorter pieces waste nothing.
MAX_CHARACTERS = 3000
MAX_DOCUMENT = 2**20  # bytes in memory at a time; a file without blank lines is cut here
_VERSION = 2  # raise it when the same files give other rows
_MARK = "\ufeff"  # which some editors write before the first line


class TextFiles:
    """A file or a folder of text as a Stream, cut into pieces of up to `MAX_CHARACTERS`.

    In a .txt file a document is a run of lines up to a blank one, in a .jsonl file one line.
    """

    def __init__(self, path: str | Path):
        """Raises: DataError where there is no such file."""
        self.files = FoundFiles(Path(path), ENDINGS)

    @property
    def fingerprint(self) -> str:
        return self.files.fingerprint(kind="text", characters=MAX_CHARACTERS, version=_VERSION)

    def shards(self) -> list[str]:
        return ranges(self.files.paths(), self.files.root)

    def read(self, shard: str) -> Iterator[Record | DataError]:
        name, *_ = split(shard)
        documents = self._json(shard) if name.lower().endswith(".jsonl") else self._plain(shard)
        for place, document in documents:
            if isinstance(document, Refusal):
                yield document
                continue
            for number, piece in enumerate(pieces(document)):
                yield Record(f"{name}@{place}.{number}", "text", {"text": piece})

    def _plain(self, shard: str) -> Iterator[tuple[int, str | Refusal]]:
        """Yields the documents that begin in a range; the last one may reach past its end."""
        name, start, end = split(shard)
        length = (self.files.root / name).stat().st_size
        begin, size = 0, 0
        lines: list[bytes] = []
        is_ours = False  # the document of the last line; parts of it may have been given out
        is_inside = start > 0 and not self._blank_before(name, start)
        for place, line in read_lines(f"{name}[{start}:{length}]", self.files.root):
            if line.strip():
                if place >= end and not is_ours:
                    return
                if is_inside:
                    continue
                begin, size = (begin, size + len(line)) if lines else (place, len(line))
                lines.append(line)
                is_ours = True
                if size >= MAX_DOCUMENT:
                    yield _decoded(name, begin, b"".join(lines))
                    lines = []
                continue
            if lines:
                yield _decoded(name, begin, b"".join(lines))
            lines, is_ours, is_inside = [], False, False
            if place >= end:
                return
        if lines:
            yield _decoded(name, begin, b"".join(lines))

    def _blank_before(self, name: str, start: int) -> bool:
        """Returns whether the line before the first one that begins at or behind `start` is blank.

        That line began in the range before, which reads on to the end of its last document.
        """
        with (self.files.root / name).open("rb") as file:
            back = max(start - 65_536, 0)
            file.seek(back)
            before = file.read(start - back)
            rest = b"" if before.endswith(b"\n") else file.readline()
        *_, last = (before + rest).removesuffix(b"\n").rsplit(b"\n", 1)
        return not last.strip()

    def _json(self, shard: str) -> Iterator[tuple[int, str | Refusal]]:
        name, *_ = split(shard)
        for place, line in read_lines(shard, self.files.root):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError(f"text is {type(text).__name__}")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                told = f"its line is no JSON object with a text: {error!r}"
                yield place, Refusal(f"{name}@{place}", "broken line", told)
            else:
                yield place, text


def _decoded(name: str, place: int, document: bytes) -> tuple[int, str | Refusal]:
    try:
        text = document.decode().replace("\r\n", "\n")
        return place, text if place else text.removeprefix(_MARK)
    except UnicodeDecodeError as error:
        return place, Refusal(f"{name}@{place}", "not UTF-8", f"its text is not UTF-8: {error}")


def pieces(document: str, max_characters: int = MAX_CHARACTERS) -> Iterator[str]:
    """Yields a document in pieces, cut at the last line end, sentence end or space that fits.

    >>> list(pieces("One two. Three four.", 12))
    ['One two.', 'Three four.']
    """
    document = document.strip()
    start = 0
    while len(document) - start > max_characters:
        head = document[start : start + max_characters + 1]
        cuts = (head.rfind(mark) + len(mark.rstrip()) for mark in ("\n", "。", ". ", " "))
        cut = next((cut for cut in cuts if cut > max_characters // 4), max_characters)
        cut = min(cut, max_characters)
        if piece := head[:cut].strip():
            yield piece
        start += cut
    if piece := document[start:].strip():
        yield piece
