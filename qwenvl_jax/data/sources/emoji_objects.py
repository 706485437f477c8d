"""Emoji as objects of a collage: single glyphs that show one countable thing, with their names.

Names are the Unicode short names in English and Chinese, from the PyPI package `emoji`; glyphs come
from a colour font of this machine. The table only says which emoji are things, and of what kind.
"""

import functools
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.sources.font_files import font_files
from qwenvl_jax.data.sources.nouns import COLOURS, Name, noun

GLYPHS = {
    "animals": (
        "🐕🐈🐅🐆🐎🐄🐖🐐🐘🐁🐇🦔🦇🐓🦅🦆🦉🐸🐊🐢🦎🐍🐬🐟🦈🐙🐌🦋🐜🐝🕷🦂🐧🦜🦢🦩🦚🐒🦍🦒🦘🦓🐼🦊🐺🦁🐻🐨🐿🦏"
        "🦛🦃🦞🦀🦐🦑🐞🦗🦟🦦🦥🦝🦨🦡🦕🦭🐡🐠🦙🦌"
    ),
    "food": "🍉🍋🍌🍍🍐🍑🍓🍅🥥🥑🍆🥔🥕🥒🍄🥐🥨🍔🌭🥪🌮🥚🍩🍪🎂🧁🥧🍭🍎🍏🍊🥭🌰🥯🥟",
    "vehicles": "🚗🚕🚌🚎🏎🚓🚑🚒🚐🚚🚜🏍🛵🚲🚂🚁✈🚀🛸⛵🚤🛶🚢🛴",
    "flowers": "🌹🌻🌷",
    "trees": "🌵🌴🌲🌳",
    "things": (
        "⚽🏀⚾🎾🏐🎸🎺🎻🎷🪕🔑🔨🪓📷📺💻🖨☎📻🔦🕯💡📎✏🖌🧲🔭🔬🧹🪑🚪🛏🚽🛁🧸🪁🎈🎁🏆👑🎩👟👗👜🎒"
        "☂⚓🔔⏰⌚🧭🪜🪣🧺📦✉🧯🧩🔋🪴🍁🌙☁❄🌈🏠🏰⛺⛪🏥🏭⛲🎡🗿🛒🪂🪃🪞🪟🧃🥁🎳🛹🪗🩺🪝📌🔍🧳🚦🗑🏹"
    ),
}
# Where the official name is not what people say of the picture, or is not a noun that counts.
_RENAMED = {
    "🚗": ("car", "汽车"),
    "🎾": ("tennis ball", "网球"),
    "🧳": ("suitcase", "行李箱"),
    "🦙": ("llama", "羊驼"),
    "🦀": ("crab", "螃蟹"),
    "🏰": ("castle", "城堡"),
    "🐢": ("turtle", "乌龟"),
    "🥚": ("egg", "鸡蛋"),
    "🎁": ("gift", "礼物"),
    "🐟": ("fish", "鱼"),
    "🐿": ("squirrel", "松鼠"),
    "🐞": ("ladybug", "瓢虫"),
    "🐡": ("pufferfish", "河豚"),
    "🦕": ("dinosaur", "恐龙"),
    "🎳": ("bowling ball", "保龄球"),
    "🔍": ("magnifying glass", "放大镜"),
    "🚦": ("traffic light", "红绿灯"),
    "🗑": ("trash can", "垃圾桶"),
    "🏹": ("bow", "弓"),
    "🧃": ("juice box", "盒装果汁"),
    "🏥": ("hospital", "医院"),
    "🌳": ("tree", "树"),
    "🌲": ("pine tree", "松树"),
    "🦌": ("deer", "鹿"),
    "🏎": ("race car", "赛车"),
    "🍆": ("eggplant", "茄子"),
    "🏠": ("house", "房子"),
    "🚑": ("ambulance", "救护车"),
    "☎": ("telephone", "电话"),
    "🗿": ("stone head", "石像"),
    "🐻": ("bear", "熊"),
    "🍩": ("donut", "甜甜圈"),
    "🪟": ("window", "窗户"),
    "🎒": ("backpack", "背包"),
    "🌙": ("moon", "月亮"),
    "🎡": ("Ferris wheel", "摩天轮"),
    "🐆": ("leopard", "豹子"),
}
_SIZE = 109  # pixels: the one size of bitmap colour fonts, and a good one for outline fonts
_FONT_NAMES = ("notocoloremoji", "noto color emoji", "apple color emoji", "twemoji", "joypixels")
PACKAGE = "fonts-noto-color-emoji"


def emoji_names() -> list[tuple[str, Name]]:
    """Returns each glyph with its name.

    Raises: DataError where the packages `emoji` and `inflect` are not installed.
    """
    try:
        import emoji
    except ImportError as error:
        raise DataError(
            "names of emoji need the package emoji: it is not installed; pip install '.[generate]'"
        ) from error
    emoji.config.load_language("zh")
    return [
        (glyph, _name(glyph, category, emoji.EMOJI_DATA))
        for category, glyphs in GLYPHS.items()
        for glyph in glyphs
    ]


def _name(glyph: str, category: str, data: dict[str, dict[str, str]]) -> Name:
    entry = data.get(glyph) or data[f"{glyph}\ufe0f"]  # some names are of the emoji presentation
    en, zh = (entry[language].strip(":").replace("_", " ") for language in ("en", "zh"))
    en, zh = _RENAMED.get(glyph, (en, zh))
    colour, _, rest = en.partition(" ")
    if colour in COLOURS and rest:  # red apple, 红苹果
        return Name(noun(rest, zh[1:], category), colour)
    return Name(noun(en, zh, category))


def find_emoji_font() -> Path:
    """Returns a colour emoji font of this machine.

    Raises: DataError where there is none, with what to install.
    """
    for path in font_files():
        if any(name in path.stem.lower() for name in _FONT_NAMES):
            return path
    raise DataError(
        "no colour emoji font was found on this machine: got none of "
        f"{', '.join(_FONT_NAMES)}; install one (Debian and Ubuntu: apt-get install {PACKAGE}) or "
        "give its file as emoji_font"
    )


@functools.lru_cache(maxsize=4)
def _font(path: Path) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(path, _SIZE)
    except OSError as error:
        raise DataError(
            f"the emoji font {path} cannot be used: {error}; expected a font with glyphs of "
            f"{_SIZE} pixels, as the Debian package {PACKAGE} has"
        ) from error


def emoji_picture(glyph: str, font: Path) -> Image.Image | None:
    """Returns the glyph as RGBA cut to its ink, or None where the font lacks it.

    Raises: DataError for a file that is no such font.
    """
    canvas = Image.new("RGBA", (2 * _SIZE, 2 * _SIZE))
    ImageDraw.Draw(canvas).text(
        (_SIZE // 3, _SIZE // 3), glyph, font=_font(font), embedded_color=True
    )
    box = canvas.getchannel("A").getbbox()
    if box is None:
        return None
    cut = canvas.crop(box)
    # A missing glyph is a box in the text's own colour, white; a picture has colours or shades.
    colours = cut.convert("RGB").getcolors(maxcolors=8)
    return cut if colours is None or len(colours) > 2 else None
