"""Text for generated pages: a folder of text files, or sentences that this package writes.

A file is cut into blocks; a hash of its name and of the block's number says whether the block is
for training, so held-out pages never show training's text, however large the corpus is. Blocks are
read where they lie: nothing is loaded ahead.
"""

import dataclasses
import functools
import hashlib
import random
import re
import unicodedata
from pathlib import Path

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.sources.composition import Split
from qwenvl_jax.data.sources.written_text import sentence
from qwenvl_jax.words import counted

HELD_OUT_SHARE = 10  # one block of so many
_BLOCK = 1 << 14  # bytes
_HEAD = 1 << 15  # bytes of a file that tell its language
_TRIES = 200
_SUFFIXES = (".txt", ".md", ".rst", ".text")
_MIN_TEXT = 200  # characters that a block must have, to be more than a title
_SPACES = re.compile(r"\s+")


def is_for(split: Split, name: str) -> bool:
    """Returns whether a piece of text of that name may be used for a split."""
    digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
    is_held_out = int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0
    return is_held_out == (split == "heldout")


def written_in(text: str) -> str | None:
    """Returns "zh" or "en" by the share of Chinese signs and of Latin letters; None for others.

    Stricter than `clean.language_of`: a page is drawn in its language.
    """
    letters = [char for char in text if char.isalpha()]
    if not letters:
        return None
    han = sum("\u4e00" <= char <= "\u9fff" for char in letters) / len(letters)
    latin = sum(char.isascii() for char in letters) / len(letters)
    return "zh" if han > 0.4 else "en" if latin > 0.95 else None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text files by language with their sizes; a language without files is written here."""

    files: dict[str, tuple[tuple[Path, int], ...]]

    def text(self, language: str, split: Split, rng: random.Random) -> str:
        """Returns a run of text of some thousand characters, one space between words.

        Raises: DataError where a file cannot be read, or no block of it fits.
        """
        files = self.files.get(language, ())
        if not files:
            return _written(language, split, rng)
        weights = _weights(files)
        for _ in range(_TRIES):
            path, size = rng.choices(files, cum_weights=weights)[0]
            number = rng.randrange(-(-size // _BLOCK))
            if not is_for(split, f"{path.name}/{number}"):
                continue
            text = _read(path, number)
            if len(text) >= _MIN_TEXT and written_in(text) == language:
                start = rng.randrange(len(text) // 2)
                return text[start:] if language == "zh" else text[start:].partition(" ")[2]
        raise DataError(
            f"no {language} text for the split {split} was found in the corpus: got "
            f"{counted(len(files), 'file')} and {_TRIES} tries; give more text, or none "
            "to use built-in sentences"
        )


@functools.lru_cache(maxsize=8)
def _weights(files: tuple[tuple[Path, int], ...]) -> list[int]:
    total, found = 0, []
    for _, size in files:
        total += -(-size // _BLOCK)
        found.append(total)
    return found


@functools.lru_cache(maxsize=8)
def open_corpus(folder: Path | None) -> Corpus:
    """Returns the corpus of a folder's text files; None gives the built-in sentences only.

    Raises: DataError where the folder does not exist or holds no text in English or Chinese.
    """
    if folder is None:
        return Corpus({})
    if not folder.is_dir():
        raise DataError(f"the corpus {folder} does not exist; give a folder of text files")
    found: dict[str, list[tuple[Path, int]]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _SUFFIXES and path.is_file():
            with open(path, "rb") as stream:
                language = written_in(stream.read(_HEAD).decode("utf-8", "ignore"))
            if language is not None:
                found.setdefault(language, []).append((path, path.stat().st_size))
    if not found:
        raise DataError(
            f"the corpus {folder} holds no text: expected files {', '.join(_SUFFIXES)} in English "
            "or Chinese (UTF-8) somewhere below it"
        )
    return Corpus({language: tuple(files) for language, files in found.items()})


def _read(path: Path, number: int) -> str:
    """Returns the text of a block, without the cut line at its start and its end."""
    try:
        with open(path, "rb") as stream:
            stream.seek(number * _BLOCK)
            block = stream.read(_BLOCK).decode("utf-8", "ignore")
    except OSError as error:
        raise DataError(f"the corpus file {path} cannot be read: {error}") from error
    if number:
        block = block[block.find("\n") + 1 :]
    return cleaned(block)


def cleaned(text: str) -> str:
    """Returns the text in NFC, without control signs, one space for each run of white space."""
    text = _SPACES.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(char for char in text if unicodedata.category(char)[0] != "C").strip()


def _written(language: str, split: Split, rng: random.Random) -> str:
    space = "" if language == "zh" else " "
    parts: list[str] = []
    while len(parts) < 60:
        said = sentence(language, rng)
        if is_for(split, said):
            parts.append(said)
    return space.join(parts)
