"""Rows about collages of objects: captions, questions, places both ways, chat, two pictures.

`Collages(num, split)` is a Source of any length: row `i` is a pure function of `i`, the split and
the settings. Training never shows or names the objects that `cutouts.is_held_out` keeps back; of
the split "heldout" every second row shows one of them and asks about it.

    Collages(1_000_000, "train", emoji=True, folder=Path("/usr/share/tuxpaint/stamps"))
"""

import dataclasses
import functools
import hashlib
import io
import random
from pathlib import Path
from typing import Any

from PIL import Image

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources import (
    collage_cells,
    collage_chat,
    collage_facts,
    cutouts,
    emoji_objects,
)
from qwenvl_jax.data.sources.backgrounds import photo_files
from qwenvl_jax.data.sources.collage_rows import ENGLISH_ONLY, fields_of
from qwenvl_jax.data.sources.composition import (
    MOST_KINDS,
    Collage,
    Split,
    Thing,
    choose_groups,
    compose,
)
from qwenvl_jax.data.sources.cutouts import Kind

TASKS = (
    "caption",
    "vqa",
    "grounded_caption",
    "ref_grounding",
    "grounded_captioning",
    "chat",
    "compare",  # rows of the task chat with two pictures
)
# Only where they are asked for:
CELLS = "cells"  # rows of vqa that list what lies in each cell
EITHER = "either"  # rows of the task chat about one or the other of two pictures
_ENGLISH = (*ENGLISH_ONLY, CELLS)
_VERSION = 1  # raise it when the same settings give other rows
_QUALITY = (80, 95)  # of the JPEG


@dataclasses.dataclass(frozen=True)
class Collages:
    """A Source of `num` rows.

    `tasks` and `languages` ("en", "zh") are equally likely; without English, those that are written
    in English only are left out. `emoji` and a `folder` of cut-outs with
    captions add objects to the drawn shapes; `photos` is a folder of backgrounds. A picture shows
    up to `most_kinds` kinds of objects. `questions` are the kinds asked for in vqa and chat,
    equally likely; a picture that allows none of them is asked another. Objects whose Chinese name
    is not known appear in English rows only.

    Raises: DataError for settings that cannot be, and material that is missing.
    """

    num: int
    split: Split
    side: int = 448
    most_kinds: int = 4
    languages: tuple[str, ...] = ("en", "zh")
    tasks: tuple[str, ...] = TASKS
    emoji: bool = False
    emoji_font: Path | None = None
    folder: Path | None = None
    photos: Path | None = None
    questions: tuple[str, ...] = collage_facts.QUESTION_KINDS

    def __post_init__(self) -> None:
        _check_choice("languages", self.languages, ("en", "zh"))
        _check_choice("tasks", self.tasks, (*TASKS, CELLS, EITHER))
        _check_choice("questions", self.questions, collage_facts.QUESTION_KINDS)
        _check_choice("split", (self.split,), ("train", "heldout"))
        if self.num < 0 or self.side < 64 or not 1 <= self.most_kinds <= MOST_KINDS:
            raise DataError(
                f"collages need a number of rows, a side of at least 64 pixels and 1 to "
                f"{MOST_KINDS} kinds in a picture: got num {self.num}, side {self.side}, "
                f"most_kinds {self.most_kinds}"
            )
        if self.tasks not in (TASKS, self._tasks):
            english = sorted({task for task in self.tasks if task in _ENGLISH})
            raise DataError(
                f"{', '.join(english)} are written in English only: got the languages "
                f"{', '.join(self.languages)}, expected en among them; leave these tasks out"
            )
        photo_files(self.photos)
        if not self.kinds:  # made now, so that missing material is noticed at once
            raise DataError("no objects are left for collages; give emoji or a folder")

    @functools.cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Every object that this split may show or name."""
        found = cutouts.drawn_kinds()
        if self.emoji or self.emoji_font is not None:
            found += cutouts.emoji_kinds(self.emoji_font)
        if self.folder is not None:
            found += cutouts.folder_kinds(self.folder)
        allowed = cutouts.merged(found)
        return tuple(k for k in allowed if self.split == "heldout" or not k.is_held_out)

    @property
    def _tasks(self) -> tuple[str, ...]:
        """The tasks that can be written in the languages."""
        if "en" in self.languages:
            return self.tasks
        return tuple(task for task in self.tasks if task not in _ENGLISH)

    @property
    def fingerprint(self) -> str:
        """Digest of the settings and of the material they name."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        """Digest of the settings and of the material's names and sizes; paths do not matter."""
        digest = hashlib.blake2b(digest_size=16)
        settings = (self.num, self.split, self.side, self.languages, self._tasks)
        if self.most_kinds != Collages.most_kinds:  # so that older digests stay
            settings = (*settings, self.most_kinds)
        if self.questions != Collages.questions:
            settings = (*settings, self.questions)
        digest.update(repr((_VERSION, *settings)).encode())
        files = [Path(path) for k in self.kinds if k.origin == "folder" for path in k.pictures]
        if self.emoji or self.emoji_font is not None:
            files.append(self.emoji_font or emoji_objects.find_emoji_font())
        for path in (*files, *photo_files(self.photos)):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for kind in self.kinds:
            digest.update(f"{kind.name} {len(kind.pictures)}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Record:
        """Returns row `index`.

        Raises: IndexError past the end, DataError where a file of the material cannot be read.
        """
        if not 0 <= index < self.num:
            raise IndexError(f"row {index} of {self.num} collages")
        rng = random.Random(f"collages/{self.split}/{index}")
        task = rng.choice(self._tasks)
        language = "en" if task in _ENGLISH else rng.choice(self.languages)
        pool = self._pools[language]
        unseen = [kind for kind in pool if kind.is_held_out]
        first = rng.choice(unseen) if self.split == "heldout" and index % 2 and unseen else None
        if first is None:
            pool = [kind for kind in pool if not kind.is_held_out]
        objects = {"language": language, "objects": "seen" if first is None else "unseen"}
        key = f"collages/{self.split}/{index}"
        if task in ("compare", EITHER):
            shown, fields = self._of_two(task, language, pool, rng, first)
            return Record(key, "chat", fields | objects, tuple(_jpeg(c.image, rng) for c in shown))
        collage = self._composed(pool, rng, first)
        about = _first_of(collage, first)
        if task == CELLS:
            task, said = "vqa", collage_cells.cell_list(collage)
            fields = {"question": collage_cells.QUESTION, "answer": said, "kind": CELLS}
        elif task == "chat":
            turns = collage_chat.dialogue(collage, language, pool, rng, about, self.questions)
            fields = {"conversations": collage_chat.as_conversations(turns, 1)}
        else:
            fields = fields_of(task, collage, language, pool, rng, about, self.questions)
        return Record(key, task, fields | objects, (_jpeg(collage.image, rng),))

    @functools.cached_property
    def _pools(self) -> dict[str, list[Kind]]:
        chinese = [kind for kind in self.kinds if kind.noun.zh is not None]
        return {"en": list(self.kinds), "zh": chinese}

    def _composed(self, pool: list[Kind], rng: random.Random, first: Kind | None) -> Collage:
        """Returns a collage that does show `first`, which a crowded one may have no room for."""
        while True:
            groups = choose_groups(pool, rng, first, self.most_kinds)
            collage = compose(groups, self.side, rng, photo_files(self.photos))
            if first is None or _first_of(collage, first) is not None:
                return collage

    def _of_two(
        self, task: str, language: str, pool: list[Kind], rng: random.Random, first: Kind | None
    ) -> tuple[tuple[Collage, Collage], dict[str, Any]]:
        one = self._composed(pool, rng, first)
        groups = collage_chat.second_groups(collage_facts.shown(one), pool, rng)
        two = compose(groups, self.side, rng, photo_files(self.photos))
        if task == EITHER:
            turns = collage_chat.either(one, two, language, rng)
        else:
            turns = collage_chat.comparison(one, two, language, rng, first.name if first else None)
        return (one, two), {"conversations": collage_chat.as_conversations(turns, 2)}


def _first_of(collage: Collage, kind: Kind | None) -> Thing | None:
    return next((t for t in collage.things if kind is not None and t.name == kind.name), None)


def _jpeg(image: Image.Image, rng: random.Random) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=rng.randint(*_QUALITY))
    return data.getvalue()


def _check_choice(setting: str, chosen: tuple[str, ...], possible: tuple[str, ...]) -> None:
    if not chosen or not set(chosen) <= set(possible):
        raise DataError(
            f"{setting} of collages must be of {', '.join(possible)}: got {chosen or 'none'}"
        )
