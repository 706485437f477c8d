"""Faults that a dialogue's text shows by itself: tags, places, control tokens, picture numbers."""

import functools
import re
from collections.abc import Iterator, Sequence

from qwenvl_jax.data.lint.problems import Fault
from qwenvl_jax.prompt.boxes import FULL_SIDE, Span, parse_boxes, points_text, scan
from qwenvl_jax.prompt.tokenizer import SPECIAL_TOKENS
from qwenvl_jax.words import counted

_TAG = re.compile(r"</?(?:img|ref|box|quad)>")
_PLACE_TAG = re.compile(r"</?(?:ref|box|quad)>")
# What no sample may hold; an empty box or phrase, or a missing picture number, is a smaller fault.
_BROKEN_PLACES = ("box_malformed", "box_outside", "box_reversed")
_CONTROL = re.compile(r"<\|\w+\|>|<imgpad>")
_FOREIGN = re.compile(r"<image>|<\|(?:vision_start|image_pad)\|>|\{<\w+>\}")
_LABEL = re.compile(r"Picture (\d+): ?\Z")
_MENTION = re.compile(r"\bPicture (\d+)\b(:?)")
_NEAR = 24  # characters shown on each side of a place


@functools.lru_cache(maxsize=64)  # each turn of a row is asked for several times
def spans_of(text: str) -> tuple[Span, ...]:
    """Returns the spans of `scan`."""
    return tuple(scan(text))


def text_faults(text: str) -> Iterator[Fault]:
    """Yields the faults of one turn's text, in order, except those of its pictures."""
    if not text.strip():
        yield Fault("empty", "no words")
    for token in _CONTROL.findall(text):
        if token in SPECIAL_TOKENS:
            yield Fault("special_token", f"{token} in {_around(text, text.index(token))}")
    for token in _FOREIGN.findall(text):
        yield Fault("foreign_format", f"{token} in {_around(text, text.index(token))}")
    yield from _tag_faults(text)


def broken_place(text: str, is_answer: bool) -> Fault | None:
    """Returns what keeps a turn from training because of its places; None for most texts.

    A tag without its partner counts in an answer, which a model would learn to write. In a question
    it may be what is asked about.
    """
    if _PLACE_TAG.search(text) is None:
        return None
    kinds = (*_BROKEN_PLACES, "tag") if is_answer else _BROKEN_PLACES
    return next((fault for fault in _tag_faults(text) if fault.kind in kinds), None)


def _tag_faults(text: str) -> Iterator[Fault]:
    """Yields the faults of a turn's tags, and of the phrases and places between them."""
    for span in spans_of(text):
        match span.kind:
            case "text":
                for tag in _TAG.finditer(span.body):
                    yield Fault("tag", f"{tag[0]} in {_around(span.body, tag.start())}")
            case "ref":
                if not span.body.strip():
                    yield Fault("empty", "no words between <ref> and </ref>")
            case "box" | "quad":
                yield from _place_faults(span)


def _place_faults(span: Span) -> Iterator[Fault]:
    written = f"<{span.kind}>{span.body[:80]}</{span.kind}>"
    places = parse_boxes(f"<{span.kind}>{span.body}</{span.kind}>")
    if not places:
        form = "(x1,y1),(x2,y2)" if span.kind == "box" else "(x1,y1),...,(x4,y4)"
        yield Fault("box_malformed", f"{written}, expected <{span.kind}>{form}</{span.kind}>")
        return
    points: Sequence = places[0][span.kind]
    flat = list(points) if span.kind == "box" else [value for point in points for value in point]
    xs, ys = flat[::2], flat[1::2]
    if any(not 0 <= value <= FULL_SIDE for value in flat):
        yield Fault("box_outside", f"{written}; {_if_pixels(flat)}")
    elif span.body != points_text(flat):
        yield Fault("box_malformed", f"{written}, expected {points_text(flat)}{_if_scaled(span)}")
    elif span.kind == "box" and (xs[0] > xs[1] or ys[0] > ys[1]):
        yield Fault("box_reversed", written)
    elif _is_flat(xs, ys):
        yield Fault("box_empty", written)


def _if_pixels(flat: Sequence[int]) -> str:
    if min(flat) < 0:
        return "clip it to the picture"
    if max(flat) == FULL_SIDE + 1:
        return "1000 is past the far edge, which is 999"
    return "are these pixels? box_from_pixels turns them into thousandths"


def _if_scaled(span: Span) -> str:
    is_scaled = re.search(r"\b0?\.\d", span.body)
    return "; coordinates are whole thousandths, not fractions" if is_scaled else ""


def _is_flat(xs: Sequence[int], ys: Sequence[int]) -> bool:
    """Returns whether a box's two corners, or a quad's four, hold no area between them."""
    if len(xs) == 2:
        return xs[0] == xs[1] or ys[0] == ys[1]
    following = [*range(1, len(xs)), 0]
    return sum(xs[i] * ys[k] - xs[k] * ys[i] for i, k in enumerate(following)) == 0


def picture_faults(values: Sequence[str]) -> Iterator[tuple[int, Fault]]:
    """Yields the faults of a dialogue's picture numbers and of places without a picture.

    Each comes with its turn. Pictures count from 1 through the dialogue, each after its number, as
    `Picture 2: <img>b.jpg</img>`.
    """
    number = 0
    total = sum(span.kind == "image" for value in values for span in spans_of(value))
    for turn, value in enumerate(values):
        before = ""
        for span in spans_of(value):
            if span.kind == "image":
                number += 1
                label = _LABEL.search(before)
                if label is None or int(label[1]) != number:
                    got = f"'Picture {label[1]}: '" if label else f"{before[-_NEAR:]!r}"
                    yield (
                        turn,
                        Fault(
                            "picture_number",
                            f"{got} before <img>{span.body[:60]}</img>, expected "
                            f"'Picture {number}: '",
                        ),
                    )
            elif span.kind in ("box", "quad") and number == 0:
                place = f"<{span.kind}>{span.body[:60]}</{span.kind}>"
                yield turn, Fault("box_without_picture", place)
            before = span.body if span.kind == "text" else ""
        for mention in _MENTION.finditer(value):
            if int(mention[1]) > total and (total or mention[2]):
                where = _around(value, mention.start())
                held = counted(total, "picture")
                yield turn, Fault("picture_count", f"{where}, and the row has {held}")


def _around(text: str, at: int) -> str:
    """Returns the text near a place, quoted, with dots where it goes on."""
    start, end = max(0, at - _NEAR), at + 2 * _NEAR
    return repr(f"{'..' if start else ''}{text[start:end]}{'..' if end < len(text) else ''}")
