"""Sentences for pages where no corpus is given: English and Chinese, of a built-in vocabulary.

They make grammatical sense and little more. Numbers, dates and rare signs are frequent, so that a
model has to read rather than guess. For training at scale give a corpus: `corpus.py`. A corpus of
these sentences, whose lines then begin anywhere, is written by

    python -m qwenvl_jax.data.sources.written_text runs/nano/corpus
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

_NAMES = (
    "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Noah Olga Peter Rosa"
).split()
_PLACES = (
    "Lisbon Oslo Vienna Nairobi Lima Boston Kyoto Dublin Prague Cairo Quito Sydney Geneva".split()
)
_ROLES = (
    "teacher doctor farmer engineer baker painter captain driver student neighbour editor".split()
)
_THINGS = (
    "letter book table window garden engine bridge river market ticket camera bicycle kitchen "
    "picture station blanket candle journal lesson machine message mountain report recipe clock "
    "jacket box lamp suitcase contract street list ladder garage cellar umbrella"
).split()
_VERBS = "repaired painted opened sold carried described found measured moved photographed".split()
_TIMES = ("in the morning", "after lunch", "last week", "every evening", "on Sunday", "at dawn")
_REASONS = (
    "because the weather was cold|although nobody had asked|while the others waited outside|"
    "so that everyone could see it|before the train left|and then went home|but forgot the keys|"
    "when the music stopped|as the guide had explained|until the shop closed"
).split("|")
_MEASURES = "price weight length age height temperature year number".split()
_KINDS = "small red broken new wooden heavy long quiet".split()

_ZH_NAMES = "小明 李华 王芳 张伟 刘洋 陈静 老赵 周先生 孙老师 吴医生".split()
_ZH_PLACES = "北京 上海 广州 成都 西安 杭州 南京 苏州 昆明 大理 厦门 青岛".split()
_ZH_THINGS = (
    "信 书 地图 照片 机器 自行车 桌子 窗户 花园 车票 报告 箱子 灯 合同 茶杯 围巾 电影 故事 菜谱"
).split()
_ZH_VERBS = "修好了 画了 打开了 找到了 看见了 卖掉了 带走了 介绍了 拍下了 写完了".split()
_ZH_TIMES = "今天早上 昨天下午 上个星期 每天晚上 去年冬天 星期日 中午以前 春节期间".split()
_ZH_REASONS = (
    "因为天气很冷 虽然没有人问起 然后就回家了 大家都很高兴 可是忘了带钥匙 等到音乐停了下来"
).split()
# The commonest 3755 signs, in the order of the Chinese national standard GB 2312, level 1.
_ZH_SIGNS = bytes(
    byte
    for row in range(0xB0, 0xD8)
    for column in range(0xA1, 0xFF)
    if (row, column) < (0xD7, 0xFA)
    for byte in (row, column)
).decode("gb2312")
_ZH_SENSE = 0.6  # of the Chinese sentences


def sentence(language: str, rng: random.Random, *, has_senseless: bool = True) -> str:
    """Returns one sentence of "en" or "zh", with its full stop.

    `has_senseless`: two fifths of the Chinese ones are signs without sense, which show all of them.
    """
    return _chinese(rng, has_senseless) if language == "zh" else _english(rng)


def _english(rng: random.Random) -> str:
    thing = f"the {rng.choice(_THINGS)}"
    if rng.random() < 0.5:
        thing = f"{rng.choice(('a', 'the'))} {rng.choice(_KINDS)} {rng.choice(_THINGS)}"
    who = rng.choice(_NAMES)
    if rng.random() < 0.5:
        who = f"the {rng.choice(_ROLES)} from {rng.choice(_PLACES)}"
    kind = rng.random()
    if kind < 0.45:
        text = f"{who} {rng.choice(_VERBS)} {thing} {rng.choice(_TIMES)}"
        text += f" {rng.choice(_REASONS)}" if rng.random() < 0.5 else ""
    elif kind < 0.6:
        text = f"the {rng.choice(_MEASURES)} of {thing} is {_number(rng)}"
    elif kind < 0.7:
        text = f"please call {who} at {_digits(rng, 3)}-{_digits(rng, 4)} {rng.choice(_TIMES)}"
    elif kind < 0.8:
        text = f"{_day(rng)}: {rng.choice(_ROLES)} {rng.choice(_NAMES)}, room {rng.randint(1, 940)}"
    elif kind < 0.9:
        return f"“I {rng.choice(_VERBS[:4])} {thing} {rng.choice(_TIMES)},” said {who}."
    else:
        text = f"did {who} leave {thing} in {rng.choice(_PLACES)}"
    end = "?" if text.startswith("did ") else rng.choice("....!")
    return text[0].upper() + text[1:] + end


def _chinese(rng: random.Random, has_senseless: bool) -> str:
    who, thing = rng.choice(_ZH_NAMES), rng.choice(_ZH_THINGS)
    kind = rng.random() * (1.0 if has_senseless else _ZH_SENSE)
    if kind < 0.3:
        text = (
            f"{who}{rng.choice(_ZH_TIMES)}在{rng.choice(_ZH_PLACES)}{rng.choice(_ZH_VERBS)}{thing}"
        )
        text += f"，{rng.choice(_ZH_REASONS)}" if rng.random() < 0.6 else ""
    elif kind < 0.4:
        text = f"{thing}的价格是{rng.randint(1, 9999)}元，编号{_digits(rng, 6)}"
    elif kind < 0.5:
        day = f"{rng.randint(1950, 2030)}年{rng.randint(1, 12)}月{rng.randint(1, 28)}日"
        text = f"{day}，{who}到了{rng.choice(_ZH_PLACES)}"
    elif kind < _ZH_SENSE:
        text = f"{who}说：“{rng.choice(_ZH_REASONS)}，{rng.choice(_ZH_VERBS)}{thing}。”"
    else:  # signs without sense: sentences alone would show a few hundred of them
        text = "".join(rng.choice(_ZH_SIGNS) for _ in range(rng.randint(4, 18)))
        return text + rng.choice("，。")
    return text if text.endswith("”") else text + rng.choice("。。。！")


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _number(rng: random.Random) -> str:
    return rng.choice(
        (
            f"{rng.randint(2, 9999)}",
            f"{rng.uniform(0, 500):.2f}",
            f"${rng.uniform(0, 900):.2f}",
            f"{rng.randint(1, 99)} %",
            f"{rng.randint(2, 400)} kg",
            f"no. {_digits(rng, 5)}",
        )
    )


def _day(rng: random.Random) -> str:
    return f"{rng.randint(1, 28):02}/{rng.randint(1, 12):02}/{rng.randint(1960, 2030)}"


def write_corpus(folder: Path, sentences: int) -> None:
    """Writes `en.txt` and `zh.txt` of so many sentences, one a line, without senseless ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for language in ("en", "zh"):
        rng = random.Random(f"corpus/{language}")
        with open(folder / f"{language}.txt", "w", encoding="utf-8") as file:
            for _ in range(sentences):
                file.write(sentence(language, rng, has_senseless=False) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the corpus that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where en.txt and zh.txt are written")
    parser.add_argument("--sentences", type=int, default=40_000, help="of each language")
    arguments = parser.parse_args(argv)
    write_corpus(arguments.folder, arguments.sentences)


if __name__ == "__main__":
    main()
