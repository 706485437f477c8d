"""The paper's cleaning of web pairs, as a chain of rules that are counted one by one.

A rule takes a row and returns it, mended or as it was, or refuses it with its own name as the
reason. Rules about text look at captions and at grounded captions (which they never mend, because
phrases and boxes hang on the letters); other tasks pass them untouched.

Source: paper, appendix A.1, which names the rules and publishes no threshold: those in `Limits`
are ours.
"""

import dataclasses
import html
import unicodedata
from collections.abc import Callable, Sequence

import regex

from qwenvl_jax.config import ConfigError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.stream import Refusal
from qwenvl_jax.image.decode import ImageError
from qwenvl_jax.image.load import image_size
from qwenvl_jax.words import counted

MAX_RAW = 100_000  # characters that a rule looks at; past it a text is too long whatever it holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Thresholds of the rules, all of them ours."""

    max_aspect_ratio: float = 3.0
    """The longer side over the shorter one."""
    min_side: int = 64
    """Pixels of the shorter side."""
    min_clip_score: float = 0.28
    """Of rows that carry a score of CLIP ViT-B/32; the paper has one threshold a set."""
    max_foreign_letters: int = 0
    """Letters that are neither plain Latin (a-z) nor Chinese."""
    min_characters: int = 5
    """Of a text without spaces at its ends; Chinese needs fewer, see `min_han`."""
    min_han: int = 2
    """Chinese characters that are text enough, whatever `min_characters` says."""
    max_characters: int = 1000
    """Of a text."""
    special_tags: tuple[str, ...] = ("<person>", "<unk>", "[unk]", "<pad>", "<num>")
    """What stands for hidden names and rare words in academic sets, in any case of letters."""


Rule = Callable[[Record, Limits], Record]


def aspect_ratio(row: Record, limits: Limits) -> Record:
    for width, height in picture_sizes(row):
        ratio = max(width, height) / min(width, height)
        if ratio > limits.max_aspect_ratio:
            raise Refusal(row.key, "aspect_ratio", f"its picture is {width} x {height}")
    return row


def small_picture(row: Record, limits: Limits) -> Record:
    for width, height in picture_sizes(row):
        if min(width, height) < limits.min_side:
            raise Refusal(row.key, "small_picture", f"its picture is {width} x {height}")
    return row


def clip_score(row: Record, limits: Limits) -> Record:
    """Rows without a score pass: the set has none."""
    score = row.fields.get("clip_score")
    if score is not None and not score >= limits.min_clip_score:  # NaN too
        raise Refusal(row.key, "clip_score", f"its score is {score:.3f}")
    return row


def longest_text(row: Record, limits: Limits) -> Record:
    """Of several texts of one picture the longest stays, the first of equals."""
    texts = row.fields.get("texts")
    if not texts:
        return row
    fields = {name: value for name, value in row.fields.items() if name != "texts"}
    text = max(texts, key=len)
    return row._replace(fields=fields | {"text": text, "language": language_of(text)})


def special_tags(row: Record, limits: Limits) -> Record:
    text = _text(row)
    if text is None:
        return row
    folded = _looked_at(row, text).casefold()
    for tag in limits.special_tags:
        if tag.casefold() in folded:
            raise Refusal(row.key, "special_tags", f"its text holds {tag}")
    return row


def strip_html(row: Record, limits: Limits) -> Record:
    return _mended(row, without_markup)


def irregular(row: Record, limits: Limits) -> Record:
    return _mended(row, tidy)


def foreign_letters(row: Record, limits: Limits) -> Record:
    text = _text(row)
    found = _FOREIGN.findall(_looked_at(row, text)) if text is not None else []
    if len(found) > limits.max_foreign_letters:
        codes = " ".join(f"U+{ord(c):04X}" for c in found[:5])
        raise Refusal(row.key, "foreign_letters", f"its text holds {codes}")
    return row


def emoji(row: Record, limits: Limits) -> Record:
    text = _text(row)
    found = _EMOJI.search(_looked_at(row, text)) if text is not None else None
    if found:
        raise Refusal(row.key, "emoji", f"its text holds U+{ord(found[0][0]):04X}")
    return row


def text_length(row: Record, limits: Limits) -> Record:
    text = _text(row)
    if text is None:
        return row
    text = _looked_at(row, text).strip()
    is_enough = len(text) >= limits.min_characters or len(_HAN.findall(text)) >= limits.min_han
    if not is_enough or len(text) > limits.max_characters:
        raise Refusal(row.key, "text_length", f"its text has {counted(len(text), 'character')}")
    return row


# Cheap rules first, mending before what judges the mended text. Hidden names are written like
# markup, so they are looked for before markup is stripped.
WEB: tuple[Rule, ...] = (
    clip_score,
    longest_text,
    aspect_ratio,
    small_picture,
    strip_html,
    irregular,
    text_length,
    emoji,
    foreign_letters,
)
ACADEMIC: tuple[Rule, ...] = (longest_text, special_tags, strip_html, irregular, text_length)
CHAINS = {"none": (), "web": WEB, "academic": ACADEMIC}


def clean(row: Record, rules: Sequence[Rule], limits: Limits) -> tuple[Record, list[str]]:
    """Returns the row after all rules, and the names of those that changed it.

    Raises: Refusal, with the rule's name as its reason.
    """
    changed = []
    for rule in rules:
        after = rule(row, limits)
        if after is not row:
            changed.append(rule.__name__)
        row = after
    return row, changed


def chain(names: Sequence[str]) -> tuple[Rule, ...]:
    """Returns the rules of given names, of chains ("web", "academic") or single ones, in order.

    Raises: ConfigError for a name that is neither.
    """
    single = {rule.__name__: (rule,) for rule in (*WEB, *ACADEMIC)}
    known = CHAINS | single
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"unknown cleaning rules: got {', '.join(unknown)}, expected some of {', '.join(known)}"
        )
    return tuple(rule for name in names for rule in known[name])


def picture_sizes(row: Record) -> list[tuple[int, int]]:
    """Returns width and height of a row's pictures, which are bytes.

    Raises: Refusal.
    """
    try:
        return [image_size(image) for image in row.images if isinstance(image, bytes)]
    except ImageError as error:
        raise Refusal(row.key, "picture", str(error)) from error


# --- text ---------------------------------------------------------------------------------------

_HAN = regex.compile(r"\p{Han}")
_LATIN_WORD = regex.compile(r"[A-Za-zＡ-Ｚａ-ｚ]+")
# Letters and their marks that are neither English nor Chinese, and what no font shows: characters
# of private use, unassigned ones and halves of surrogate pairs.
_FOREIGN = regex.compile(r"(?V1)[[\p{L}\p{M}\p{Co}\p{Cn}\p{Cs}]--[A-Za-zＡ-Ｚａ-ｚ\p{Han}\uFE0F]]")
# Pictographs; not the signs among them that plain text uses (c in a circle, trade mark, wave dash).
_EMOJI = regex.compile(
    r"(?V1)[\p{Extended_Pictographic}--[\u0000-\u21FF\u3030\u303D\u3297\u3299]]"
    r"|[\U0001F1E6-\U0001F1FF\u20E3\uFE0F]"
)
# Each ends at the next angle bracket, so that no text takes more than one pass.
_BREAK = regex.compile(r"</?(?:br|p|div|li|td|tr|h[1-6])\b[^<>]*>", regex.IGNORECASE)
_TAG = regex.compile(r"<[/!?]?[A-Za-z\-][^<>]*>")
# An address is ASCII: Chinese goes on right behind it. Marks at its end are the sentence's.
_ADDRESS = regex.compile(
    r"(?V1)(?:https?://|www\.)(?:[!-~]*[[!-~]--[)\]}>\"',.;:!?]])?", regex.IGNORECASE
)
_INVISIBLE = regex.compile(r"(?V1)[\p{Cc}\p{Cf}--\s]")
_REPEATED = regex.compile(r"([!?,;:*~=_#\-+.。！？，、…])\1{3,}")
_EMPTY_BRACKETS = regex.compile(r"\(\s*\)|\[\s*\]|\{\s*\}|（\s*）")


def language_of(text: str) -> str:
    """Returns "zh" where Chinese characters are at least as many as Latin words, else "en".

    >>> language_of("iPhone 手机壳")
    'zh'
    """
    text = text[:MAX_RAW]
    num_han = len(_HAN.findall(text))
    return "zh" if num_han and num_han >= len(_LATIN_WORD.findall(text)) else "en"


def without_markup(text: str) -> str:
    """Returns text without HTML tags, with character references resolved.

    >>> without_markup("<b>Tom</b> &amp; Jerry, 1 < 2")
    'Tom & Jerry, 1 < 2'
    """
    text = _TAG.sub("", _BREAK.sub(" ", text))
    return html.unescape(text) if "&" in text else text


def tidy(text: str) -> str:
    """Returns text without web addresses, invisible characters, empty brackets and long runs.

    Runs of white space become one space, more than three of a punctuation mark three; letters are
    composed (NFC), as the tokenizer does it.
    """
    text = _INVISIBLE.sub("", _ADDRESS.sub("", text))
    text = _EMPTY_BRACKETS.sub("", _REPEATED.sub(r"\1\1\1", text))
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _text(row: Record) -> str | None:
    if row.task == "caption":
        return row.fields["text"]
    if row.task == "grounded_caption":
        return "".join(text for text, _ in row.fields["phrases"])
    return None


def _mended(row: Record, mend: Callable[[str], str]) -> Record:
    if row.task != "caption":
        return row
    before = _looked_at(row, row.fields["text"])
    after = mend(before)
    return row if after == before else row._replace(fields=dict(row.fields) | {"text": after})


def _looked_at(row: Record, text: str) -> str:
    """Returns the text; refuses one so long that looking at it costs more than it is worth."""
    if len(text) > MAX_RAW:
        raise Refusal(row.key, "text_length", f"its text has {counted(len(text), 'character')}")
    return text
