"""Drawn scenes as rows, so that they can be prepared and mixed with other data.

`Scenes(num, split)` is a Source of any length: row `i` is a pure function of `i`, the split and the
settings. A row says the same as the sample that `scene_rows.scene_example` makes of its key.

    Scenes(100_000, "train", side=112)
"""

import dataclasses
import hashlib
import io
import random
from collections.abc import Sequence
from typing import Any

from PIL import Image

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources import scene_language as language
from qwenvl_jax.data.sources import scene_rows
from qwenvl_jax.data.sources.scenes import Scene, Split
from qwenvl_jax.data.tasks import PICTURE

TASKS = (
    "caption",
    "vqa",
    "ocr_vqa",
    "grounded_caption",
    "ref_grounding",
    "grounded_captioning",
    "ocr",
    "chat",
)
_VERSION = 1  # raise it when the same settings give other rows


@dataclasses.dataclass(frozen=True)
class Scenes:
    """A Source of `num` rows in English; `tasks` are equally likely, and kinds of `questions`.

    Raises: DataError for settings that cannot be.
    """

    num: int
    split: Split
    side: int = 112
    tasks: tuple[str, ...] = TASKS
    questions: tuple[str, ...] = language.ASKED_KINDS

    def __post_init__(self) -> None:
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise DataError(
                f"tasks of scenes must be of {', '.join(TASKS)}: got {self.tasks or 'none'}"
            )
        if not self.questions or not set(self.questions) <= set(language.CHOICES):
            raise DataError(
                f"questions of scenes must be of {', '.join(language.CHOICES)}: "
                f"got {self.questions or 'none'}"
            )
        if self.num < 0 or self.side < 56:
            raise DataError(
                "scenes need a number of rows and a side of at least 56 pixels: got num "
                f"{self.num}, side {self.side}"
            )

    @property
    def fingerprint(self) -> str:
        """Digest of the settings."""
        settings = (_VERSION, self.num, self.split, self.side, self.tasks)
        if self.questions != Scenes.questions:  # so that older digests stay
            settings = (*settings, self.questions)
        return hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Record:
        """Returns row `index`. Raises: IndexError past the end."""
        if not 0 <= index < self.num:
            raise IndexError(f"row {index} of {self.num} scenes")
        rng = random.Random(f"scenes/{self.split}/{index}")
        task, key = rng.choice(self.tasks), rng.getrandbits(48)
        return scene_record(task, key, self.split, self.side, self.questions)


def scene_record(
    task: str,
    key: int,
    split: Split,
    side: int,
    questions: Sequence[str] = language.ASKED_KINDS,
) -> Record:
    """Returns the row of a task about the scene of a key; its picture is PNG, which loses nothing.

    Raises: ValueError for a task that is not in `TASKS`.
    """
    shown = scene_rows.scene_of(task, key, split, side)
    rng = random.Random(f"words/{split}/{key}/{task}")  # as `scene_rows.scene_example`
    picture = io.BytesIO()
    Image.fromarray(shown.image).save(picture, "PNG")
    fields = _fields(task, shown, split, rng, questions)
    return Record(f"{shown.key}/{task}", task, fields, (picture.getvalue(),))


def _fields(
    task: str, shown: Scene, split: Split, rng: random.Random, questions: Sequence[str]
) -> dict[str, Any]:
    match task:
        case "caption":
            return {"text": language.caption(shown, rng), "language": "en"}
        case "vqa":
            asked = language.question(shown, split, rng, questions)
            return {"question": asked.text, "answer": asked.answer, "kind": asked.kind}
        case "grounded_caption":
            phrases = scene_rows.grounded_phrases(shown)
            return {"phrases": [[text, [list(box) for box in boxes]] for text, boxes in phrases]}
        case "ref_grounding":
            thing = rng.choice(shown.things)
            phrase = language.phrase(shown, thing, rng)
            return {"phrase": phrase, "boxes": [list(scene_rows.thing_box(shown, thing))]}
        case "grounded_captioning":
            thing = rng.choice(shown.things)
            box = list(scene_rows.thing_box(shown, thing))
            return {"box": box, "text": language.describe(thing)}
        case "chat":
            turns = scene_rows.dialogue(shown, split, rng, questions)
            marks = [f"Picture 1: {PICTURE}\n", *[""] * (len(turns) - 1)]
            said = zip(marks, turns, strict=True)
            return {
                "conversations": [
                    {"from": role, "value": text}
                    for mark, (question, answer) in said
                    for role, text in (("user", mark + question), ("assistant", answer))
                ]
            }
    asked, writing = language.reading_question(shown, rng), shown.writing
    if task not in ("ocr_vqa", "ocr") or asked is None or writing is None:
        raise ValueError(f"unknown task of the scenes: got {task!r}, expected one of {TASKS}")
    if task == "ocr_vqa":
        return {"question": asked.text, "answer": asked.answer, "kind": asked.kind}
    quad = scene_rows.writing_quad(shown, writing)
    return {"lines": [[writing.text, [list(point) for point in quad]]]}
