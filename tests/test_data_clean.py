"""The cleaning rules, one by one and on text that nobody expects."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared_rows import picture

from qwenvl_jax.config import ConfigError
from qwenvl_jax.data import clean as rules
from qwenvl_jax.data.clean import ACADEMIC, WEB, Limits, chain, clean, language_of
from qwenvl_jax.data.record import FIELDS, Record, encode_record
from qwenvl_jax.data.sources.stream import Refusal


def caption(text: str, image: bytes | None = None, **fields) -> Record:
    fields = {"text": text, "language": "en"} | fields
    return Record("k", "caption", fields, () if image is None else (image,))


def outcome(row: Record, chosen=WEB, **limits) -> str:
    """Returns the text that is left, or the name of the rule that refused the row."""
    try:
        after, _ = clean(row, chosen, Limits(**limits))
    except Refusal as refusal:
        return f"!{refusal.reason}"
    return after.fields["text"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((300, 100), "a red star"),
        ((310, 100), "!aspect_ratio"),
        ((100, 310), "!aspect_ratio"),
        ((64, 64), "a red star"),
        ((63, 70), "!small_picture"),
    ],
)
def test_pictures_too_long_or_too_small(size, expected):
    assert outcome(caption("a red star", picture(*size))) == expected


def test_broken_picture():
    assert outcome(caption("a red star", b"<html>")) == "!picture"


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (0.28, "a red star"),
        (0.27, "!clip_score"),
        (float("nan"), "!clip_score"),
        (None, "a red star"),
    ],
)
def test_scores_where_there_are_any(score, expected):
    assert outcome(caption("a red star", clip_score=score)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red star", "a red star"),
        ("一颗红星", "一颗红星"),
        ("红星", "红星"),
        ("星", "!text_length"),
        ("star", "!text_length"),
        ("x" * 1000, "x" * 1000),
        ("x" * 1001, "!text_length"),
        ("Красная звезда", "!foreign_letters"),
        ("赤い星です", "!foreign_letters"),
        ("a café table", "!foreign_letters"),
        ("نجمة حمراء", "!foreign_letters"),
        ("a red star \ud83d", "!foreign_letters"),
        ("a private \ue000 sign", "!foreign_letters"),
        ("a red star 🌟", "!emoji"),
        ("a red heart ❤", "!emoji"),
        ("flag \U0001f1e8\U0001f1f3 here", "!emoji"),
        ("Coke® and Pepsi™, 20 °C — “fine”…", "Coke® and Pepsi™, 20 °C — “fine”…"),
        ("价格：￥30（含税）〜", "价格：￥30（含税）〜"),
        ("<p>a <b>red</b> star</p>", "a red star"),
        ("Tom &amp; Jerry &#39;live&#39;", "Tom & Jerry 'live'"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("a\x00 red\u200b\tstar \n now", "a red star now"),
        ("see http://x.y/z?a=b now here", "see now here"),
        ("红色的猫www.a.com坐在桌子上，很可爱", "红色的猫坐在桌子上，很可爱"),
        ("详见https://t.cn/Ab1。一只白色的狗", "详见。一只白色的狗"),
        ("a red cat (https://x.org/a) on a mat", "a red cat on a mat"),
        ("a cat, http://x.org/a, on a mat", "a cat, , on a mat"),
        ("great!!!!!! so great", "great!!! so great"),
        ("a star () here [ ]", "a star here"),
        ("a\u202ered star", "ared star"),
        ("   ", "!text_length"),
        ("", "!text_length"),
    ],
)
def test_texts(text, expected):
    assert outcome(caption(text)) == expected


def test_the_longest_of_several_texts_stays():
    row = caption("short one", texts=["short one", "a much longer one", "other"])
    after, changed = clean(row, ACADEMIC, Limits())
    assert after.fields == {"text": "a much longer one", "language": "en"}
    assert changed == ["longest_text"]
    row = caption("红星", texts=["红星", "a star that is red"])
    assert clean(row, ACADEMIC, Limits())[0].fields["language"] == "en"


@pytest.mark.parametrize("tag", ["<PERSON>", "<unk>", "[UNK]"])
def test_hidden_names_are_refused_in_academic_sets(tag):
    assert outcome(caption(f"{tag} on a stage"), ACADEMIC) == "!special_tags"
    assert outcome(caption("a person on a stage"), ACADEMIC) == "a person on a stage"


def test_grounded_captions_are_judged_and_never_mended():
    phrases = [["a  dog", [[1, 2, 3, 4]]], [" &amp; a cat", []]]
    row = Record("k", "grounded_caption", {"phrases": phrases})
    assert clean(row, WEB, Limits()) == (row, [])
    phrases[1][0] = " 🌟 and a cat"
    with pytest.raises(Refusal, match="its text holds U\\+1F31F"):
        clean(row, WEB, Limits())


@pytest.mark.parametrize("task", [name for name in FIELDS if "caption" not in name.split("_")])
def test_other_tasks_pass(task):
    row = Record("k", task, dict.fromkeys(FIELDS[task], "🌟 <b>звезда</b>"))
    assert clean(row, WEB + ACADEMIC, Limits()) == (row, [])


def test_thresholds_are_settings():
    assert outcome(caption("a café table"), max_foreign_letters=1) == "a café table"
    assert outcome(caption("a red star", picture(60, 60)), min_side=32) == "a red star"


def test_chains_and_single_rules_are_named():
    assert chain(["web"]) == WEB
    assert chain(["emoji", "academic"]) == (rules.emoji, *ACADEMIC)
    with pytest.raises(
        ConfigError, match="unknown cleaning rules: got emojis, expected some of none"
    ):
        chain(["emojis"])


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a cat", "en"),
        ("一只猫", "zh"),
        ("iPhone 手机壳", "zh"),
        ("the 龙 dragon", "en"),
        ("", "en"),
    ],
)
def test_language(text, language):
    assert language_of(text) == language


@given(
    st.text(st.characters(exclude_categories=()), max_size=200)
    | st.text("<>/!-&;#ab \n", max_size=80)
)
def test_any_text_is_kept_or_refused_and_what_is_kept_stays(text):
    row = caption(text)
    reasons = set()
    for chosen in (WEB, ACADEMIC, (rules.strip_html,), (rules.irregular,)):
        try:
            after, changed = clean(row, chosen, Limits())
        except Refusal as refusal:
            reasons.add(refusal.reason)
            continue
        assert (after == row) == (not changed)
        if chosen is WEB:
            assert encode_record(after)
            assert 2 <= len(after.fields["text"]) <= 1000
    assert reasons <= {rule.__name__ for rule in (*WEB, *ACADEMIC)}


@pytest.mark.parametrize(
    "part", ["a", "<", "<!--", "&amp;", "(", "!", "\u202e", "http://", "🌟", " "]
)
def test_ten_megabytes_are_refused_at_once_and_long_texts_in_one_pass(part):
    text = part * (10_000_000 // len(part))
    start = time.perf_counter()
    assert outcome(caption(text)) == "!text_length"
    assert outcome(caption(text[: rules.MAX_RAW]), (*WEB, *ACADEMIC)).startswith("!")
    assert time.perf_counter() - start < 5  # a pattern that goes back would take hours
