"""Generated sources by name, for commands: collages, photographed documents, drawn scenes.

open_generated("documents", 100_000, GeneratedOptions(corpus=Path("my_texts")))
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.sources.collages import Collages
from qwenvl_jax.data.sources.composition import Split
from qwenvl_jax.data.sources.documents import Documents
from qwenvl_jax.data.sources.page_photo import PageSettings
from qwenvl_jax.data.sources.scene_records import Scenes

NAMES = ("collages", "documents", "scenes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedOptions:
    """What is made; what does not concern the chosen source must stay as it is."""

    split: Split = "train"
    """train, or heldout: other rows, which also show objects and text that training never has."""
    languages: tuple[str, ...] = ("en", "zh")
    """Equally likely; scenes are English."""
    tasks: tuple[str, ...] = ()
    """Equally likely, one named twice twice as likely; none given: all that the source has."""
    questions: tuple[str, ...] = ()
    """Collages and scenes: kinds of questions, equally likely; none given: all, as they come."""
    photos: Path | None = None
    """Collages and documents: a folder of pictures, which are then half of the backgrounds."""
    side: int | None = None
    """Collages and scenes: pixels of a side; 448 and 112 if not given."""
    most_kinds: int = 4
    """Collages: kinds of objects in a picture, at most."""
    emoji: bool = False
    """Collages: emoji are objects too."""
    emoji_font: Path | None = None
    """Collages: a colour font, if not this machine's."""
    objects: Path | None = None
    """Collages: a folder of cut-out PNG files with .txt captions, objects too."""
    corpus: Path | None = None
    """Documents: a folder of text files; built-in sentences if not given."""
    fonts: Path | None = None
    """Documents: a folder of fonts; this machine's if not given."""
    page: PageSettings = dataclasses.field(default_factory=PageSettings)
    """Documents: sizes of picture and text."""


_PICTURED = ("languages", "photos")
_OPTIONS = {
    "collages": (*_PICTURED, "questions", "side", "most_kinds", "emoji", "emoji_font", "objects"),
    "documents": (*_PICTURED, "corpus", "fonts", "page"),
    "scenes": ("questions", "side"),
}


def open_generated(
    name: str, num: int, options: GeneratedOptions | None = None
) -> Collages | Documents | Scenes:
    """Returns the Source of `num` rows called "collages", "documents" or "scenes".

    Raises: DataError for another name, an option without effect, and missing material.
    """
    if name not in NAMES:
        raise DataError(
            f"no generated data of that name: got {name!r}, expected {', '.join(NAMES)}"
        )
    chosen = options or GeneratedOptions()
    all_options = dict.fromkeys(itertools.chain.from_iterable(_OPTIONS.values()))
    idle = [
        option
        for option in all_options
        if option not in _OPTIONS[name]
        and getattr(chosen, option) != getattr(GeneratedOptions(), option)
    ]
    if idle:
        raise DataError(f"{', '.join(idle)} has no effect on {name}; leave it out")
    own: dict[str, Any] = {option: getattr(chosen, option) for option in _OPTIONS[name]}
    if chosen.tasks:
        own["tasks"] = chosen.tasks
    for option, unset in (("side", None), ("questions", ())):
        if own.get(option, 0) == unset:
            del own[option]
    if name == "documents":
        return Documents(num, chosen.split, **own)
    if name == "scenes":
        return Scenes(num, chosen.split, **own)
    return Collages(num, chosen.split, folder=own.pop("objects"), **own)
