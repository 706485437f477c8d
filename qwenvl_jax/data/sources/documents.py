"""Rows about photographed documents: all lines with their quads, and questions that need reading.

`Documents(num, split)` is a Source of any length: row `i` is a pure function of `i`, the split, the
settings and the material (fonts, corpus, photos). In the manner of SynthDoG, with its published
default ranges; the quad of each line is followed through every step that moves a point.

    Documents(1_000_000, "train", corpus=Path("my_texts"))
"""

import dataclasses
import functools
import hashlib
import io
import random
from pathlib import Path

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources import page_rows
from qwenvl_jax.data.sources.backgrounds import photo_files
from qwenvl_jax.data.sources.composition import Split
from qwenvl_jax.data.sources.corpus import Corpus, open_corpus
from qwenvl_jax.data.sources.font_files import fonts_of
from qwenvl_jax.data.sources.page_photo import Document, PageSettings, photograph

TASKS = ("ocr", "ocr_vqa", "vqa", "chat")
LETTERS = "letters"  # one more, only where it is named: what stands in each cell of the picture
LANGUAGES = ("en", "zh")
_VERSION = 2  # raise it when the same settings give other rows
_QUALITY = (50, 95)  # of the JPEG, as published


@dataclasses.dataclass(frozen=True)
class Documents:
    """A Source of `num` rows.

    `tasks` and `languages` are equally likely; a document that settles no question becomes a row
    of ocr, as does one of letters with a line that is not labelled. `fonts` is a folder of font
    files (None: those of this machine, so pages differ between machines), `corpus` one of text
    files (None: built-in sentences), `photos` one of backgrounds.

    Raises: DataError for settings that cannot be, and material that is missing.
    """

    num: int
    split: Split
    languages: tuple[str, ...] = LANGUAGES
    tasks: tuple[str, ...] = TASKS
    page: PageSettings = dataclasses.field(default_factory=PageSettings)
    fonts: Path | None = None
    corpus: Path | None = None
    photos: Path | None = None

    def __post_init__(self) -> None:
        for setting, chosen, possible in (
            ("languages", self.languages, LANGUAGES),
            ("tasks", self.tasks, (*TASKS, LETTERS)),
            ("split", (self.split,), ("train", "heldout")),
        ):
            if not chosen or not set(chosen) <= set(possible):
                raise DataError(
                    f"{setting} of documents must be of {', '.join(possible)}: got "
                    f"{chosen or 'none'}"
                )
        if self.num < 0 or self.page.short_side[0] < 64 or self.page.max_lines < 1:
            raise DataError(
                "documents need a number of rows, pictures of at least 64 pixels and a line: got "
                f"num {self.num}, short_side {self.page.short_side}, max_lines "
                f"{self.page.max_lines}"
            )
        _ = self.fingerprint  # reads all folders, so that missing material is noticed at once

    @property
    def fingerprint(self) -> str:
        """Digest of the settings and of the material they name."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        """Digest of the settings and of the material's names and sizes; paths do not matter."""
        settings = (self.num, self.split, self.languages, self.tasks, self.page)
        digest = hashlib.blake2b(repr((_VERSION, *settings)).encode(), digest_size=16)
        fonts = [path for language in self.languages for path in self._fonts(language)]
        texts = [path for files in self._corpus.files.values() for path, _ in files]
        for path in (*fonts, *texts, *photo_files(self.photos)):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def _fonts(self, language: str) -> tuple[Path, ...]:
        return fonts_of(language, self.fonts)

    @property
    def _corpus(self) -> Corpus:
        return open_corpus(self.corpus)

    def __len__(self) -> int:
        return self.num

    def document(self, index: int) -> tuple[Document, str, str, random.Random]:
        """Returns the picture of row `index`, its task, its language and the stream for words."""
        if not 0 <= index < self.num:
            raise IndexError(f"row {index} of {self.num} documents")
        rng = random.Random(f"documents/{self.split}/{index}")
        task, language = rng.choice(self.tasks), rng.choice(self.languages)
        text = self._corpus.text(language, self.split, rng)
        made = photograph(self.page, text, self._fonts(language), photo_files(self.photos), rng)
        return made, task, language, rng

    def __getitem__(self, index: int) -> Record:
        """Returns row `index`.

        Raises: IndexError past the end, DataError where a file of the material cannot be read.
        """
        made, task, language, rng = self.document(index)
        task, fields = page_rows.fields_of(task, made, language, rng)
        data = io.BytesIO()
        made.image.save(data, "JPEG", quality=rng.randint(*_QUALITY))
        key = f"documents/{self.split}/{index}"
        return Record(key, task, {**fields, "language": language}, (data.getvalue(),))
