"""What a thing is called in English and in Chinese, as sentences need it: countable nouns.

Names come from the Unicode emoji list or from the captions of a folder of pictures; what does not
parse as one countable noun is left out, since no sentence could be made with it.
"""

import functools
import re
from typing import Any, NamedTuple

from qwenvl_jax.data.example import DataError

# English and Chinese; the first eight are those that shapes are drawn in.
COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "black": "黑色",
    "white": "白色",
    "brown": "棕色",
    "pink": "粉色",
    "gray": "灰色",
}
_SPELLINGS = {"grey": "gray", "violet": "purple"}
_ZH_COLOURS = {"红": "red", "黄": "yellow", "绿": "green", "青": "green", "蓝": "blue"} | {
    "紫": "purple",
    "黑": "black",
    "白": "white",
    "橙": "orange",
    "灰": "gray",
    "棕": "brown",
}

CATEGORIES = ("animals", "vehicles", "flowers", "trees")
NEUTRAL = "个"  # the measure word that fits when nothing better is known
# By the category that a source says, then by how the noun ends; the longest ending wins.
_CATEGORY_MEASURES = {"animals": "只", "vehicles": "辆", "flowers": "朵", "trees": "棵"}
_ENDING_MEASURES = {
    ending: measure
    for measure, endings in {
        "匹": "斑马 骏马 木马 小马 马",
        "头": "牛 猪 大象 象 狮子 驴 驴子 驼鹿 犀牛",
        "只": "章鱼 鳄鱼 恐龙 鲍鱼 甲鱼 海象 海马 河马 蜗牛 豪猪 天牛 海狮 鞋 靴子 手套 袜子 手表",
        "条": "独木舟 鱼 蛇 龙 鲸 鲨 鲨鱼 裙 裤 裙子 裤子 领带 围巾 毛巾 泥鳅 鳗鱼 皮带",
        "朵": "花 玫瑰 郁金香 向日葵 云",
        "棵": "树 草 仙人掌 白菜",
        "艘": "船 舰 艇 轮船 帆船 快艇 游轮",
        "架": "飞碟 飞机 直升机 钢琴 战斗机 滑翔机 航天飞机",
        "辆": "车 汽车 摩托 自行车 卡车 坦克 拖拉机",
        "枚": "火箭 邮票 硬币 奖牌 导弹 戒指",
        "把": "伞 椅子 钥匙 刀 剪刀 锤子 吉他 剑 斧头 扫帚 梳子 铲子 扳手 提琴 叉子 锁 锯 尺子",
        "个": "苹果 梨 桃 橙子 蛋糕 信封 热气球 标志 车轮 美人鱼 松树花",
        "台": "电脑 相机 电视 电视机 洗衣机 打印机 冰箱 显微镜 望远镜 照相机 收音机 电话",
        "部": "手机 电话机",
        "座": "山 塔 桥 城堡 房子 教堂 医院 学校 工厂 灯塔 喷泉 大教堂 火山 小屋 木屋 风车",
        "顶": "帽 帽子 礼帽 皇冠 王冠 帐篷 头盔",
        "件": "衣服 衬衫 毛衣 上衣 外套 礼物",
        "支": "笔 铅笔 蜡烛 钢笔 温度计 玫瑰花",
        "根": "香蕉 胡萝卜 黄瓜 玉米 棒棒糖 骨头 羽毛 法棍",
        "颗": "草莓 樱桃 钉子 螺丝 糖 栗子 花生 钻石 星星 星 核桃",
        "片": "叶 叶子 雪花 枫叶 面包片",
        "盏": "灯 台灯 油灯 灯笼",
        "本": "书 笔记本 书本",
        "扇": "门 窗户",
        "张": "床 桌子 沙发 桌",
        "块": "饼干 奶酪 拼图 巧克力 手绢 砖",
        "面": "旗 旗子 鼓 镜子",
        "封": "信",
        "所": "大学",
        "道": "彩虹",
        "株": "盆栽 植物",
        "副": "眼镜",
    }.items()
    for ending in endings.split()
}
# Captions of the stamps that Debian has, where the Chinese says another thing than the English.
_BETTER_CHINESE = {
    "lion": "狮子",
    "bear": "熊",
    "yak": "牦牛",
    "prune": "李子",
    "pink cake": "粉色蛋糕",
    "sliced lime": "切开的青柠",
    "wishing well": "许愿井",
    "fishery": None,
    "xanthia": None,
    "dreidel": "陀螺",
    "headstone": "墓碑",
    "rhea": "美洲鸵",
    "pine wreath": "松枝花环",
    "pili nut tree": None,
    "lark": "百灵鸟",
    "chile pepper": "辣椒",
    "sea lion": "海狮",
    "emperor tamarin": "皇狨",
    "orange": "橙子",
    "camel": "骆驼",
    "drum kit": "架子鼓",
    "electric kettle": "电水壶",
    "scream balloon": "喊叫气泡",
    "thought balloon": "思考气泡",
    "party horn": "派对喇叭",
    "sitting gnu": None,
}
_MAX_HAN = 6
_NUMERAL = re.compile(
    r"^一([只个头匹条朵棵辆艘架枚把台部座顶件支枝根颗片盏本扇张块面封道株副位串盆])"
)
_HAN_ONLY = re.compile(r"[\u4e00-\u9fff]+")
_ENGLISH = re.compile(r"^(?:an?|one)\s+([a-z][a-z-]*(?: [a-z-]+){0,2})\s*[.!]*$", re.IGNORECASE)
# A phrase with one of these says more than a name, and its plural would be a guess.
_NO_NAMES = frozenset(
    "with in on for that which called and or to from at by of lot few couple pair very is was not "
    "little small large big huge tiny giant".split()
)
# Participles that are nouns: any other `-ing` after the first word begins a clause.
_THINGS_IN_ING = frozenset("ring king wing string swing building earring pudding crossing".split())


class Noun(NamedTuple):
    """A countable noun, without article or colour; `zh` is None where only English is known."""

    en: str
    plural: str
    article: str  # "a" or "an": not always as its first letter says
    zh: str | None
    measure: str


class Name(NamedTuple):
    """What a thing is called: a noun, and its colour where that is known and said."""

    noun: Noun
    colour: str | None = None

    @property
    def english(self) -> str:
        return f"{self.colour} {self.noun.en}" if self.colour else self.noun.en


@functools.cache
def _grammar() -> Any:
    """Returns the inflect engine, imported here as drawn shapes do not need it."""
    try:
        import inflect
    except ImportError as error:
        raise DataError(
            "plurals of emoji and of captions need the package inflect: it is not installed; "
            "pip install '.[generate]'"
        ) from error
    return inflect.engine()


def noun(en: str, zh: str | None, category: str = "", measure: str | None = None) -> Noun:
    """Returns the noun; plural and article from the `inflect` package, the measure word from here.

    Raises: DataError where `inflect` is not installed.
    """
    grammar = _grammar()
    article = grammar.a(en).split()[0]
    return Noun(en, grammar.plural_noun(en), article, zh, measure_word(zh, category, measure))


def measure_word(zh: str | None, category: str = "", said: str | None = None) -> str:
    """Returns the measure word of a Chinese noun: by its ending, as a caption says, by category.

    >>> measure_word("山羊", "animals"), measure_word("热带鱼", "animals"), measure_word("锚")
    ('只', '条', '个')
    """
    for start in range(len(zh or "")):
        if zh and zh[start:] in _ENDING_MEASURES:
            return _ENDING_MEASURES[zh[start:]]
    return said or _CATEGORY_MEASURES.get(category, NEUTRAL)


def name_from_captions(en: str, zh: str | None, category: str = "") -> Name | None:
    """Returns the name that a picture's captions give, or None where they do not name one thing.

    `A red apple.` and `一只红苹果。` are a red apple; `Sad!`, `A frog on a log.` name nothing that
    can be counted. A colour is taken off the noun only if both languages start with it.

    Raises: DataError where `inflect` is not installed.
    """
    match = _ENGLISH.match(en.strip())
    if match is None:
        return None
    words = match[1].split()
    if not _is_name(words):
        return None
    chinese, measure = _chinese_noun(zh)
    first = _SPELLINGS.get(words[0].lower(), words[0].lower())
    colour = first if first in COLOURS and len(words) > 1 else None
    chinese = _BETTER_CHINESE.get(words[-1] if len(words) == 1 else " ".join(words), chinese)
    if colour is not None:
        bare = None if chinese is None else _without_colour(chinese, colour)
        if chinese is not None and bare is None:
            colour = None
        else:
            words, chinese = words[1:], bare
    return Name(noun(" ".join(words), chinese, category, measure), colour)


def _is_name(words: list[str]) -> bool:
    """Lower case but for a name before the noun (`Asian elephant`), and not yet a plural."""
    last = words[-1]
    if _NO_NAMES & {word.lower() for word in words} or not last.islower():
        return False
    if any(word.endswith(("ing", "ed")) for word in words[1:-1]):
        return False
    if len(words) > 1 and last.endswith("ing") and last not in _THINGS_IN_ING:
        return False
    # The grammar takes some nouns for pronouns (mine, ours).
    plural = _grammar().plural_noun(last)
    return not _grammar().singular_noun(last) and plural[0] == last[0]


def _chinese_noun(caption: str | None) -> tuple[str | None, str | None]:
    """Returns the noun of a Chinese caption and the measure word that the caption itself uses."""
    text = (caption or "").strip().rstrip("。！!.").strip()
    numeral = _NUMERAL.match(text)
    measure = None
    if numeral is not None:
        text, measure = text[numeral.end() :], numeral[1].replace("枝", "支")
    is_noun = _HAN_ONLY.fullmatch(text) and len(text) <= _MAX_HAN and text[0] not in "一两二三这那"
    return (text, measure) if is_noun else (None, None)


def _without_colour(chinese: str, colour: str) -> str | None:
    if _ZH_COLOURS.get(chinese[0]) != colour:
        return None
    bare = chinese[1:].removeprefix("色").removeprefix("的")
    return bare if len(bare) > 1 else None  # one sign alone (`椒`, `旗`) is rarely a word
