"""Generated sources by name, for commands: collages of objects and photographed documents.

open_generated("documents", 100_000, GeneratedOptions(corpus=Path("my_texts")))
"""

import dataclasses
from pathlib import Path
from typing import Any

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.sources.collages import Collages
from qwenvl_jax.data.sources.composition import Split
from qwenvl_jax.data.sources.documents import Documents
from qwenvl_jax.data.sources.page_photo import PageSettings

NAMES = ("collages", "documents")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedOptions:
    """What is made; what does not concern the chosen source must stay as it is."""

    split: Split = "train"
    """train, or heldout: other rows, which also show objects and text that training never has."""
    languages: tuple[str, ...] = ("en", "zh")
    """Equally likely."""
    tasks: tuple[str, ...] = ()
    """Equally likely; none given: all that the source has."""
    photos: Path | None = None
    """A folder of pictures for backgrounds."""
    side: int | None = None
    """Collages: pixels of a side, 448 if not given."""
    emoji: bool = False
    """Collages: emoji are objects too."""
    emoji_font: Path | None = None
    """Collages: a colour font, if not this machine's."""
    objects: Path | None = None
    """Collages: a folder of cut-out PNG files with .txt captions."""
    corpus: Path | None = None
    """Documents: a folder of text files; built-in sentences if not given."""
    fonts: Path | None = None
    """Documents: a folder of fonts; this machine's if not given."""
    page: PageSettings = dataclasses.field(default_factory=PageSettings)
    """Documents: sizes of picture and text."""


_ONLY = {
    "collages": ("side", "emoji", "emoji_font", "objects"),
    "documents": ("corpus", "fonts", "page"),
}


def open_generated(
    name: str, num: int, options: GeneratedOptions | None = None
) -> Collages | Documents:
    """Returns the Source of `num` rows called "collages" or "documents".

    Raises: DataError for another name, an option without effect, and missing material.
    """
    if name not in NAMES:
        raise DataError(
            f"no generated data of that name: got {name!r}, expected {' or '.join(NAMES)}"
        )
    chosen = options or GeneratedOptions()
    idle = [
        option
        for other, names in _ONLY.items()
        for option in names
        if other != name and getattr(chosen, option) != getattr(GeneratedOptions(), option)
    ]
    if idle:
        raise DataError(f"{', '.join(idle)} has no effect on {name}; leave it out")
    shared: dict[str, Any] = {"languages": chosen.languages, "photos": chosen.photos}
    if chosen.tasks:
        shared["tasks"] = chosen.tasks
    if name == "documents":
        own = {"page": chosen.page, "corpus": chosen.corpus, "fonts": chosen.fonts}
        return Documents(num, chosen.split, **own, **shared)
    own = {"emoji": chosen.emoji, "emoji_font": chosen.emoji_font, "folder": chosen.objects}
    if chosen.side is not None:
        own["side"] = chosen.side
    return Collages(num, chosen.split, **own, **shared)
