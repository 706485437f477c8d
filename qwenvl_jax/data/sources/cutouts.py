"""The objects that collages are made of: drawn shapes, emoji, and a folder of cut-out pictures.

An object is known by its name ("red star", "dog"); several pictures may show it. Whether training
may see it hangs on a hash of the English name alone, so it holds on every machine, for every folder
and for denials as well ("Is there a dog? no").
"""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.sources import emoji_objects, nouns
from qwenvl_jax.data.sources.drawing import SHAPES, shape_mask
from qwenvl_jax.data.sources.nouns import Name, Noun
from qwenvl_jax.data.sources.scenes import COLOURS
from qwenvl_jax.image.decode import check_size

HELD_OUT_SHARE = 8  # one object of so many is never seen in training
_ZH_SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "heart": "心形",
    "diamond": "菱形",
    "cross": "十字形",
    "ring": "圆环",
}
SOLID = 128  # alpha from which a pixel shows the thing rather than what lies behind
_MAX_CUTOUT = 512  # pixels kept of a larger picture: no collage shows an object larger
_MIN_CUTOUT = 32  # pixels: a smaller picture is a smudge where it is enlarged
_MAX_PIXELS = 25_000_000


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of object. `pictures` are shapes, glyphs or files, as `origin` says."""

    name: Name
    origin: str  # "drawn", "emoji" or "folder"
    pictures: tuple[str, ...]
    font: Path | None = None  # of emoji

    @property
    def noun(self) -> Noun:
        return self.name.noun

    @property
    def is_held_out(self) -> bool:
        """Whether no training scene shows or names it."""
        return is_held_out(self.name.english)

    def picture(self, rng: random.Random, pixels: int) -> Image.Image:
        """Returns one of its pictures as RGBA, its longer side so many pixels long.

        Raises: DataError where a file has gone or is damaged.
        """
        chosen = rng.choice(self.pictures)
        if self.origin == "drawn":
            return _drawn(chosen, str(self.name.colour), pixels, rng)
        cut = _file(chosen) if self.font is None else _glyph(chosen, self.font)
        scale = pixels / max(cut.size)
        size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
        return cut.resize(size, Image.Resampling.BICUBIC)


def is_held_out(english: str) -> bool:
    """Returns whether the object of that name is kept out of training."""
    digest = hashlib.blake2b(english.lower().encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def drawn_kinds() -> list[Kind]:
    """Returns each shape in each colour, which are there on every machine."""
    return [
        Kind(
            Name(Noun(shape, _plural(shape), "a", _ZH_SHAPES[shape], nouns.NEUTRAL), colour),
            "drawn",
            (shape,),
        )
        for shape in SHAPES
        for colour in COLOURS
    ]


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def merged(kinds: Iterable[Kind]) -> list[Kind]:
    """Returns the kinds with one name for each English name: the first that knows Chinese.

    So a dog of the emoji and a dog of a folder are counted, asked for and held out as one thing.
    """
    kinds = list(kinds)
    names: dict[str, Name] = {}
    for kind in sorted(kinds, key=lambda kind: kind.noun.zh is None):
        names.setdefault(kind.name.english.lower(), kind.name)
    return [dataclasses.replace(kind, name=names[kind.name.english.lower()]) for kind in kinds]


def emoji_kinds(font: Path | None = None) -> list[Kind]:
    """Returns the emoji that show one thing and that the font has.

    Raises: DataError where a package or a font is missing.
    """
    path = font or emoji_objects.find_emoji_font()
    return [
        Kind(name, "emoji", (glyph,), path)
        for glyph, name in emoji_objects.emoji_names()
        if emoji_objects.emoji_picture(glyph, path) is not None
    ]


def folder_kinds(folder: Path) -> list[Kind]:
    """Returns the objects of a folder of PNG files with a caption file beside each.

    The caption file has the same name and ends in .txt: its first line is English, and lines
    `zh_CN.utf8=...` (or `zh.utf8=...`) are Chinese. Pictures of one name are one object. A picture
    whose caption names no countable thing, or that is no readable cut-out, is passed over.

    Raises: DataError where the folder does not exist or nothing in it can be used.
    """
    if not folder.is_dir():
        raise DataError(
            f"the folder of cut-out pictures {folder} does not exist; give a folder of PNG files "
            "with .txt captions (Debian and Ubuntu: apt-get install tuxpaint-stamps-default)"
        )
    found: dict[str, tuple[Name, list[str]]] = {}
    for caption in sorted(folder.rglob("*.txt")):
        picture = caption.with_suffix(".png")
        if picture.is_file():
            name = _name_of(caption, folder)
            if name is not None and _is_cutout(str(picture)):
                found.setdefault(name.english.lower(), (name, []))[1].append(str(picture))
    if not found:
        raise DataError(
            f"nothing in the folder {folder} can be used: expected PNG files, each with a .txt "
            "file of the same name whose first line is like `A red apple.`"
        )
    return [Kind(name, "folder", tuple(files)) for name, files in found.values()]


def _name_of(caption: Path, top: Path) -> Name | None:
    lines = caption.read_text(encoding="utf-8", errors="replace").splitlines()
    chinese = {
        key: text for key, equals, text in (line.partition(".utf8=") for line in lines) if equals
    }
    zh = chinese.get("zh_CN") or chinese.get("zh")
    category = next(
        (part for part in reversed(caption.relative_to(top).parts) if part in nouns.CATEGORIES), ""
    )
    return nouns.name_from_captions(lines[0] if lines else "", zh, category)


def _drawn(shape: str, colour: str, pixels: int, rng: random.Random) -> Image.Image:
    mask, box = shape_mask(shape, pixels)
    shade = tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in COLOURS[colour])
    picture = Image.new("RGBA", mask.size, (*shade, 0))
    picture.putalpha(mask)
    return picture.crop((int(box[0]), int(box[1]), round(box[2]), round(box[3])))


@functools.lru_cache(maxsize=512)
def _glyph(glyph: str, font: Path) -> Image.Image:
    picture = emoji_objects.emoji_picture(glyph, font)
    if picture is None:
        raise DataError(f"the font {font} no longer has the emoji {glyph}; open the source again")
    return picture


@functools.lru_cache(maxsize=512)
def _file(path: str) -> Image.Image:
    """Returns a cut-out as RGBA cut to what can be seen of it.

    Raises: DataError for a file that is no PNG, is damaged, or has nothing cut out.
    """
    try:
        with open(path, "rb") as stream:
            image = PngImagePlugin.PngImageFile(stream)
            check_size(image.size, f"picture {path}", _MAX_PIXELS)
            cut = image.convert("RGBA")
    except MemoryError:
        raise
    except Exception as error:  # on damaged data Pillow raises nearly every builtin exception
        raise DataError(f"the cut-out {path} cannot be read: {error}; expected a PNG") from error
    alpha_YX = np.asarray(cut.getchannel("A"))
    low, high = int(alpha_YX.min()), int(alpha_YX.max())
    if not low < SOLID <= high:
        raise DataError(
            f"the picture {path} is no cut-out: got alpha {low} to {high}, expected transparent "
            "pixels around a thing; cut it out of its background"
        )
    cut.thumbnail((_MAX_CUTOUT, _MAX_CUTOUT))
    return cut.crop(cut.getchannel("A").point(_solid_table()).getbbox())


@functools.cache
def _solid_table() -> list[int]:
    return [255 * (alpha >= SOLID) for alpha in range(256)]


def _is_cutout(path: str) -> bool:
    try:
        return max(_file(path).size) >= _MIN_CUTOUT
    except DataError:
        return False
