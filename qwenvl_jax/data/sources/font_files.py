"""Font files of this machine, and which of them can write a language.

Folders are those that fontconfig, macOS and Windows search. A font counts for a language only if it
has a glyph for every sign of a probe, so that no page shows boxes where letters should be.
"""

import functools
import os
from pathlib import Path

from qwenvl_jax.data.example import DataError
from qwenvl_jax.prompt.fonts import SHIPPED_FONT, has_glyph

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_PROBES = {
    "en": "".join(map(chr, range(33, 127))),
    "zh": "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能"
    "而子那得于着下自之年过发后作里，。：！？“”（）",
}
# Their letters look like something else, or carry decoration that hides them.
_NOT_TEXT = ("emoji", "symbol", "dingbat", "icon", "awesome", "math", "music", "braille", "barcode")


def _folders() -> list[Path]:
    home = Path.home()
    data = os.environ.get("XDG_DATA_HOME") or home / ".local" / "share"
    fixed = ("/usr/share/fonts", "/usr/local/share/fonts", "/System/Library/Fonts")
    more = ("/Library/Fonts", "C:/Windows/Fonts")
    return [*map(Path, fixed + more), Path(data) / "fonts", home / ".fonts"]


@functools.lru_cache(maxsize=8)
def font_files(folder: Path | None = None) -> tuple[Path, ...]:
    """Returns the font files below a folder, or of this machine, sorted by name.

    Raises: DataError for a folder that does not exist.
    """
    if folder is not None and not folder.is_dir():
        raise DataError(
            f"the folder of fonts {folder} does not exist; give a folder of .ttf or .otf files"
        )
    folders = [folder] if folder is not None else [path for path in _folders() if path.is_dir()]
    found = {path for top in folders for path in top.rglob("*") if path.suffix.lower() in SUFFIXES}
    return tuple(sorted(found, key=lambda path: (path.name, str(path))))


@functools.lru_cache(maxsize=16)
def fonts_of(language: str, folder: Path | None = None) -> tuple[Path, ...]:
    """Returns fonts that can write "en" or "zh"; the package's own where nothing else can.

    Raises: DataError for a folder that does not exist.
    """
    probe = _PROBES[language]
    named = [
        path
        for path in font_files(folder)
        if not any(word in path.stem.lower() for word in _NOT_TEXT)
    ]
    fitting = tuple(path for path in named if all(has_glyph(str(path), char) for char in probe))
    return fitting or (Path(SHIPPED_FONT),)
