"""A font that can write a label: Pillow's own, the shipped Chinese one, or one of this machine's.

Nothing is downloaded. Where no font has a character it loses its accent or becomes `?`, so a label
never fails.
"""

import functools
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SHIPPED_FONT = str(Path(__file__).parents[1] / "assets" / "fonts" / "WenQuanYiMicroHei-GB2312.ttf")

# Where Linux distributions, macOS and Windows keep fonts with accents, and with Chinese.
_LATIN_PATHS = (
    "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
    "/usr/share/fonts/TTF/DejaVuSans.ttf",
    "/usr/share/fonts/truetype/liberation/LiberationSans-Regular.ttf",
    "/System/Library/Fonts/Supplemental/Arial Unicode.ttf",
    "C:/Windows/Fonts/arial.ttf",
)
_CHINESE_PATHS = (
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/google-noto-cjk/NotoSansCJK-Regular.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-microhei.ttc",
    "/usr/share/fonts/truetype/wqy/wqy-zenhei.ttc",
    "/usr/share/fonts/truetype/arphic/uming.ttc",
    "/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf",
    "/System/Library/Fonts/PingFang.ttc",
    "/System/Library/Fonts/Hiragino Sans GB.ttc",
    "/System/Library/Fonts/STHeiti Light.ttc",
    "C:/Windows/Fonts/msyh.ttc",
    "C:/Windows/Fonts/simhei.ttf",
)
_NO_GLYPH = "\U0010fffe"  # no font draws a noncharacter
_PROBE_SIZE = 20


def font_for(text: str, size: int) -> tuple[Font, str]:
    """Returns a font of that size in pixels, and the text as that font can write it.

    The first font that has every character wins: Pillow's own, the shipped one, the machine's.
    Failing all, the one that has most of them is used.
    """
    best: tuple[int, str | None] = (-1, None)
    for path in (None, *_richer_fonts(text)):
        has = sum(has_glyph(path, char) for char in text)
        if has > best[0]:
            best = (has, path)
        if has == len(text):
            break
    path = best[1]
    return _load(path, size), "".join(_writable(path, char) for char in text)


def _richer_fonts(text: str) -> Iterator[str]:
    if not text.isascii():
        yield SHIPPED_FONT
        yield from _installed()  # late: asking the machine takes a process


@functools.cache
def _installed() -> tuple[str, ...]:
    """Returns font files of this machine, Latin ones first. Looked for once."""
    chinese = [*filter(_is_file, _CHINESE_PATHS)] or _listed_fonts()
    readable = (path for path in chinese if has_glyph(path, "中"))
    return (*filter(_is_file, _LATIN_PATHS), *readable)


def _is_file(path: str) -> bool:
    return Path(path).is_file()


def _listed_fonts() -> list[str]:
    """Returns files that fontconfig says know Chinese; none where it is not installed."""
    if shutil.which("fc-list") is None:
        return []
    try:
        listing = subprocess.run(
            ["fc-list", ":lang=zh", "file"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []  # a label in `?` is better than no picture
    return sorted(line.split(":")[0].strip() for line in listing.stdout.splitlines() if line)[:8]


def _writable(path: str | None, char: str) -> str:
    """Returns the character, its letter without accents, or `?`."""
    plain = unicodedata.normalize("NFKD", char)[0]
    return next((c for c in (char, plain) if has_glyph(path, c)), "?")


@functools.lru_cache(maxsize=64)
def _load(path: str | None, size: int) -> Font:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@functools.lru_cache(maxsize=1 << 17)  # signs of Chinese times the fonts of a machine
def has_glyph(path: str | None, char: str) -> bool:
    """Pillow does not expose a font's table: a missing glyph is drawn like a noncharacter."""
    if char == " ":
        return True
    try:
        return _drawn(path, char) != _drawn(path, _NO_GLYPH)
    except (OSError, UnicodeError):
        return False  # an unreadable font file, or a bitmap font without this character


def _drawn(path: str | None, char: str) -> bytes:
    paper = Image.new("L", (3 * _PROBE_SIZE, 3 * _PROBE_SIZE))
    ImageDraw.Draw(paper).text((_PROBE_SIZE, _PROBE_SIZE), char, 255, _load(path, _PROBE_SIZE))
    return paper.tobytes()
