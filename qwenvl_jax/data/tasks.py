"""The sample formats: the seven of the multi-task stage and plain text as segments, and chat.

A segment is a run of text that wholly carries loss or wholly does not. Segments are tokenised one
by one, so the border of the loss falls between two tokens whatever the vocabulary. Its parts are
plain text, which never becomes a special token whatever it holds, and `Tag`s, which do. `picture`
is what stands for the picture.

Source: paper Box B.1; for chat the released `finetune.py`. Where print leaves spaces open
they follow the released model's own output: a target starts with a space, and nothing follows a
prompt's colon.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qwenvl_jax.data.example import DataError, Example, Picture
from qwenvl_jax.data.lint.problems import KINDS
from qwenvl_jax.data.lint.text import broken_place
from qwenvl_jax.data.record import Record, check_record
from qwenvl_jax.prompt.boxes import format_box, format_quad
from qwenvl_jax.prompt.chat import (
    DEFAULT_SYSTEM,
    RELEASED_CHAT_TAGS,
    ChatError,
    LossMask,
    Message,
    messages_from_conversations,
    render_example,
)
from qwenvl_jax.prompt.tokenizer import Tokenizer
from qwenvl_jax.prompt.vocabulary import TokenizerError
from qwenvl_jax.words import counted


class Tag(str):
    """Trusted text that begins and ends with special tokens, all of them live.

    Joining one with other text gives plain text: what is trusted is always written as a `Tag`.
    """

    __slots__ = ()


EOS = Tag("<|endoftext|>")
PICTURE = Tag("<img></img>")  # the tokenizer writes the slots; what stands inside does not matter
_REF, _REF_END = Tag("<ref>"), Tag("</ref>")

_LANGUAGES = {"en": "English", "zh": "Chinese"}

Box = Sequence[int]
Quad = Sequence[Sequence[int]]


class Segment(NamedTuple):
    """Neighbouring plain parts are one text: where they are cut does not change the ids."""

    parts: tuple[str, ...]  # each plain text or a Tag
    is_target: bool

    @property
    def text(self) -> str:
        """The parts joined, as a person reads them."""
        return "".join(self.parts)


class Phrase(NamedTuple):
    """A run of a grounded caption with the boxes of what it names; no boxes: plain words."""

    text: str
    boxes: tuple[Box, ...] = ()


def caption(text: str, picture: str = PICTURE, language: str = "en") -> list[Segment]:
    """Raises: DataError for a language other than "en" and "zh"."""
    if language not in _LANGUAGES:
        raise DataError(f"a caption's language must be one of {[*_LANGUAGES]}: got {language!r}")
    return [
        Segment((picture, f"Generate the caption in {_LANGUAGES[language]}:"), False),
        Segment((f" {text}", EOS), True),
    ]


def vqa(question: str, answer: str, picture: str = PICTURE) -> list[Segment]:
    """Returns a question about the picture and its answer, which is what is learned."""
    return [
        Segment((picture, f" {question} Answer:"), False),
        Segment((f" {answer}", EOS), True),
    ]


def ocr_vqa(question: str, answer: str, picture: str = PICTURE) -> list[Segment]:
    """As `vqa`, but the end carries no loss: so the paper prints it, perhaps by a slip."""
    return [
        Segment((picture, f" {question} Answer:"), False),
        Segment((f" {answer}",), True),
        Segment((EOS,), False),
    ]


def grounded_caption(phrases: Sequence[Phrase], picture: str = PICTURE) -> list[Segment]:
    """Returns a caption whose named things are followed by their boxes.

    The texts of `phrases` join to the caption; a phrase's leading space goes inside its `<ref>`.
    """
    return [
        Segment((picture, "Generate the caption in English with grounding:"), False),
        Segment((*grounded_parts(phrases, start=" "), EOS), True),
    ]


def ref_grounding(phrase: str, boxes: Sequence[Box], picture: str = PICTURE) -> list[Segment]:
    """Returns a phrase, and the boxes of what it names: 0..999, at least one."""
    return [
        Segment((picture, _REF, phrase, _REF_END), False),
        Segment((*_box_tags(boxes), EOS), True),
    ]


def grounded_captioning(box: Box, text: str, picture: str = PICTURE) -> list[Segment]:
    """Returns a box, 0..999, and the words for what lies in it."""
    return [
        Segment((picture, _REF, "This", _REF_END, *_box_tags([box]), " is"), False),
        Segment((f" {text}", EOS), True),
    ]


def ocr(lines: Sequence[tuple[str, Quad]], picture: str = PICTURE) -> list[Segment]:
    """Returns all lines of the picture, each followed by its quad, 0..999."""
    read = [(_REF, text, _REF_END, Tag(format_quad(quad))) for text, quad in lines]
    return [
        Segment((picture, "OCR with grounding:"), False),
        Segment((" ", *itertools.chain.from_iterable(read), EOS), True),
    ]


def cell_map(words: Sequence[tuple[str, str]], picture: str = PICTURE) -> list[Segment]:
    """Returns the shapes of all cells of a picture, then their colours (ours, not the paper's).

    Where each word is one token, the slot that answers a cell lies equally far before each word of
    a list: the shortest way there is from a loss to the tower.
    """
    shapes, colours = (" ".join(column) for column in zip(*words, strict=True))
    return [
        Segment((picture, "Shapes:"), False),
        Segment((f" {shapes}",), True),
        Segment((" Colours:",), False),
        Segment((f" {colours}", EOS), True),
    ]


def cell_characters(title: str, firsts: str, seconds: str, picture: str = PICTURE) -> list[Segment]:
    """Returns the first and then the second character in all cells, as `cell_map` (ours).

    The title says of what: `Letters`, or `Left` for the left edge's coordinate. Each character is a
    segment, so that two of them never become one token.
    """
    return [
        Segment((picture, f"{title}:"), False),
        *(Segment((char,), True) for char in firsts),
        Segment((" Next:",), False),
        *(Segment((char,), True) for char in seconds),
        Segment((EOS,), True),
    ]


def plain_text(text: str) -> list[Segment]:
    """Returns text without a picture, all of it learned."""
    return [Segment((text, EOS), True)]


def grounded_parts(phrases: Sequence[Phrase], start: str = "") -> list[str]:
    """Returns the phrases, each that has boxes between `<ref>` tags and followed by them."""
    parts: list[str] = []
    for phrase in phrases:
        text, start = start + phrase.text, ""
        parts += [_REF, text, _REF_END, *_box_tags(phrase.boxes)] if phrase.boxes else [text]
    return parts


def _box_tags(boxes: Sequence[Box]) -> list[Tag]:
    return [Tag(format_box(box)) for box in boxes]


def example_of(record: Record, tokenizer: Tokenizer, mask: LossMask = "released") -> Example:
    """Returns the tokenised sample of a row; its pictures stay as they are, not yet decoded.

    `mask` is that of chat rows.

    Raises: DataError where the row does not fit its task.
    """
    check_record(record)
    try:
        if record.task == "chat":
            return _chat_row(record, tokenizer, mask)
        segments = _segments(record, PICTURE if record.images else "")
        return to_example(segments, record.images, tokenizer, record.task, record.key)
    except (ChatError, TokenizerError) as error:
        raise DataError(f"row {record.key}: {error}") from error


def _chat_row(record: Record, tokenizer: Tokenizer, mask: LossMask) -> Example:
    turns, system = record.fields["conversations"], record.fields.get("system", DEFAULT_SYSTEM)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(
            f"row {record.key} has conversations of another form: got {turns!r:.60}, "
            'expected a list of {"from": ..., "value": ...}'
        )
    if not isinstance(system, str):
        raise DataError(f"row {record.key}: system must be text: got {type(system).__name__}")
    messages = messages_from_conversations(turns, system)
    _check_places(record.key, messages, len(turns))
    rendered = render_example(tokenizer, messages, mask)
    return _example(rendered.ids, rendered.is_target, record.images, tokenizer, "chat", record.key)


def _check_places(key: str, messages: Sequence[Message], num_turns: int) -> None:
    """Raises DataError for a place that the model should not learn to write, or to read."""
    _, *said = messages
    for turn, message in enumerate(said, start=num_turns - len(said)):  # a first answer is dropped
        fault = broken_place(str(message.content), message.role == "assistant")
        if fault is not None:
            raise DataError(f"row {key}, turn {turn}: {KINDS[fault.kind]}: got {fault.detail}")


def _segments(record: Record, picture: str) -> list[Segment]:
    fields = record.fields
    try:
        match record.task:
            case "caption":
                return caption(_text(fields, "text"), picture, fields["language"])
            case "vqa":
                return vqa(_text(fields, "question"), _text(fields, "answer"), picture)
            case "ocr_vqa":
                return ocr_vqa(_text(fields, "question"), _text(fields, "answer"), picture)
            case "grounded_caption":
                phrases = [Phrase(text, _boxes(boxes)) for text, boxes in fields["phrases"]]
                _text({"phrases": "".join(phrase.text for phrase in phrases)}, "phrases")
                return grounded_caption(phrases, picture)
            case "ref_grounding":
                boxes = _boxes(_full(fields, "boxes"))
                return ref_grounding(_text(fields, "phrase"), boxes, picture)
            case "grounded_captioning":
                (box,) = _boxes([fields["box"]])
                return grounded_captioning(box, _text(fields, "text"), picture)
            case "ocr":
                lines = _full(fields, "lines")
                return ocr([(_text({"line": text}, "line"), quad) for text, quad in lines], picture)
            case "letters":
                firsts, seconds = _text(fields, "firsts"), _text(fields, "seconds")
                return cell_characters("Letters", firsts, seconds, picture)
            case _:
                return plain_text(_text(fields, "text"))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"row {record.key} of task {record.task} has a field of another form: {error}; "
            "data/record.py lists the forms"
        ) from error


def _text(fields: Mapping[str, Any], name: str) -> str:
    """Returns a field that must be text; an empty one would teach to say nothing."""
    if not isinstance(fields[name], str):
        raise TypeError(f"{name} must be text: got {type(fields[name]).__name__}")
    return _full(fields, name)


def _full(fields: Mapping[str, Any], name: str) -> Any:
    value = fields[name]
    if not (value.strip() if isinstance(value, str) else value):
        raise ValueError(f"{name} is empty")
    return value


def _boxes(boxes: Sequence[Box]) -> tuple[Box, ...]:
    """Returns boxes whose first corner is the upper left one; a line or a point may be a box."""
    for x1, y1, x2, y2 in boxes:
        if x1 > x2 or y1 > y2:
            raise ValueError(
                f"a box has its corners reversed: got {[x1, y1, x2, y2]}, expected x1 <= x2 and "
                "y1 <= y2"
            )
    return tuple(boxes)


def to_example(
    segments: Sequence[Segment],
    images: Sequence[Picture],
    tokenizer: Tokenizer,
    task: str,
    key: str,
) -> Example:
    """Returns the tokenised sample.

    Raises: DataError where the text does not mark as many pictures as there are.
    """
    ids: list[int] = []
    is_target: list[bool] = []
    for segment in segments:
        piece = _segment_ids(segment, tokenizer)
        ids += piece
        is_target += [segment.is_target] * len(piece)
    return _example(ids, is_target, images, tokenizer, task, key)


def _segment_ids(segment: Segment, tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    for is_tag, run in itertools.groupby(segment.parts, lambda part: isinstance(part, Tag)):
        text = "".join(run)
        ids += tokenizer.encode_raw(text) if is_tag else tokenizer.encode(text)
    return ids


def chat_example(
    turns: Sequence[tuple[str, str]],
    images: Sequence[Picture],
    tokenizer: Tokenizer,
    key: str,
) -> Example:
    """Returns a dialogue in ChatML with the released mask, under the default system message.

    Questions mark their pictures as `Picture 1: <img></img>` and a line break.

    Raises: as `to_example`.
    """
    messages = [Message("system", DEFAULT_SYSTEM)]
    for question, answer in turns:
        messages.append(Message("user", question, RELEASED_CHAT_TAGS))
        messages.append(Message("assistant", answer, RELEASED_CHAT_TAGS))
    rendered = render_example(tokenizer, messages)
    return _example(rendered.ids, rendered.is_target, images, tokenizer, "chat", key)


def _example(
    ids: list[int],
    is_target: list[bool],
    images: Sequence[Picture],
    tokenizer: Tokenizer,
    task: str,
    key: str,
) -> Example:
    marked = ids.count(tokenizer.image_start_id)
    if marked != len(images):
        raise DataError(
            f"sample {key} marks {counted(marked, 'picture')} in its text: got {len(images)}; "
            "give one <img></img> for each, in reading order"
        )
    return Example(
        ids=np.array(ids, np.int32),
        is_target=np.array(is_target, bool),
        images=tuple(images),
        task=task,
        key=key,
    )
