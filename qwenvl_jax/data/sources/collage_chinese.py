"""Collages in Chinese words. `collage_english` has the same functions."""

import random

from qwenvl_jax.data.sources.collage_facts import Asked, Link, Reference
from qwenvl_jax.data.sources.composition import Thing
from qwenvl_jax.data.sources.nouns import COLOURS, Name

NUMBERS = "零一两三四五六七八九十"
YES, NO = "是", "不是"
NOTHING, SAME, WHICH = "没有", "一样多", "图{}"
JOINTS, SPACE = (
    ("、", "和"),
    "",
)  # of a list: before each but the last, before the last; before a word

_LINKS: dict[Link, str] = {"left": "左边", "right": "右边", "above": "上方", "below": "下方"}
_HOW = {
    "bigger": "较大的{}",
    "smaller": "较小的{}",
    "left": "左边的{}",
    "right": "右边的{}",
    "above": "上面的{}",
    "below": "下面的{}",
    "most left": "最左边的{}",
    "most right": "最右边的{}",
    "most above": "最上面的{}",
    "most below": "最下面的{}",
}
_PLACES = {
    (-1, -1): "左上角",
    (0, -1): "上方",
    (1, -1): "右上角",
    (-1, 0): "左边",
    (0, 0): "中间",
    (1, 0): "右边",
    (-1, 1): "左下角",
    (0, 1): "下方",
    (1, 1): "右下角",
}

DESCRIBE = ("描述这张图片。", "图中有什么？", "你看到了什么？")
DESCRIBE_BOXES = ("描述这张图片，并给出位置。", "图中有什么？请框出来。")
FIND = ("找出{}。", "{}在哪里？请框出来。", "框出图中{}的位置。")
FIND_ALL = ("找出所有的{}。", "框出图中所有的{}。")
NAME_BOX = ("{}里是什么？", "{}中有什么？")
FIND_IN = "在图{1}中找出{0}。"
WHICH_MORE = ("哪张图里的{}更多？", "哪张图有更多的{}？")
ONLY_IN = ("图{}有而图{}没有的是什么？", "什么东西在图{}里，但不在图{}里？")
COMMON = ("两张图里都有什么？", "两张图有什么共同的东西？")
IN_BOTH = "两张图里都有{}吗？"
COUNT_IN = "图{1}中有几个{0}？"
COUNT_EACH, EACH = "两张图里有几个{}？", "{}和{}"
EXISTS_IN = "图{1}中有{0}吗？"
DESCRIBE_ONE = "图{}中有什么？"


def singular(name: Name) -> str:
    """Returns `红色的苹果`."""
    return f"{COLOURS[name.colour]}的{name.noun.zh}" if name.colour else str(name.noun.zh)


def plural(name: Name) -> str:
    """Returns the same as `singular`: Chinese nouns have one form."""
    return singular(name)


def counted(name: Name, count: int) -> str:
    """Returns `一个红色的苹果`, `两只狗`."""
    number = NUMBERS[count] if count < len(NUMBERS) else str(count)
    return f"{number}{name.noun.measure}{singular(name)}"


def the(name: Name, count: int) -> str:
    """Returns the same as `singular`: Chinese has no article."""
    return singular(name)


def all_of(name: Name, count: int) -> str:
    """Returns `狗` of one, `所有的狗` of more."""
    return singular(name) if count == 1 else f"所有的{singular(name)}"


def phrase(reference: Reference) -> str:
    """Returns `红色的苹果`, `较大的苹果`, `狗上方的苹果`."""
    name = singular(reference.name)
    if reference.how == "name":
        return name
    if reference.link is not None and reference.anchor is not None:
        return f"{singular(reference.anchor)}{_LINKS[reference.link]}的{name}"
    return _HOW[reference.how].format(name)


def related(one: Thing, way: Link, other: Thing) -> str:
    """Returns `一只狗的左边有一个苹果` of an apple to the left of a dog."""
    return f"{counted(other.name, 1)}的{_LINKS[way]}有{counted(one.name, 1)}"


def question(asked: Asked, rng: random.Random) -> str:
    """Returns the question in words."""
    name = asked.name
    named = [phrase(reference) for reference in asked.references]
    way = _LINKS[asked.link] if asked.link else ""
    match asked.kind:
        case "count" if name:
            start = rng.choice(("图中有", "一共有"))
            return f"{start}多少{name.noun.measure}{singular(name)}？"
        case "total":
            return rng.choice(("图中一共有多少个物体？", "图里有几个东西？"))
        case "colour":
            return f"{named[0]}是什么颜色的？"
        case "exists" if name:
            return f"图中有{singular(name)}吗？"
        case "relation":
            return f"{named[0]}在{named[1]}的{way}吗？"
        case "neighbour":
            return f"{named[0]}的{way}是什么？"
        case "where":
            return rng.choice(("{}在图中的什么位置？", "{}在哪里？")).format(named[0])
        case "more" if name and asked.other:
            return f"{singular(name)}比{singular(asked.other)}多吗？"
    raise ValueError(f"unknown kind of question: got {asked.kind!r}")


def answer(asked: Asked) -> str:
    """Returns the answer: a number, yes or no as the question's verb asks, a colour, a place."""
    value = asked.answer
    if isinstance(value, bool):
        if asked.kind == "exists":
            return "有" if value else "没有"
        return YES if value else NO
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Name):
        return COLOURS[str(value.colour)] if asked.kind == "colour" else counted(value, 1)
    return _PLACES[value]
