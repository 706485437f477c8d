"""One downloaded picture with the columns that came with it, to rows: captions, or GRIT's phrases.

What a web set calls its columns differs; what img2dataset keeps of them does not depend on whether
it writes tar or parquet files. So the files (`tar_shards.py`, `parquet_files.py`) know nothing of
texts, and this module nothing of files.

GRIT's `noun_chunks` and `ref_exps` are lists of [start, end, x1, y1, x2, y2, score]: a span of the
caption in characters, and a box in fractions of the picture.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from qwenvl_jax.data.clean import language_of
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.stream import Refusal
from qwenvl_jax.prompt.boxes import Box, box_from_pixels
from qwenvl_jax.words import counted

# The first one that a set has is its text.
TEXTS = ("caption", "text", "TEXT", "top_caption", "alt_text", "alt_txt")
ALL_TEXTS = ("all_captions", "captions", "texts")
# Cosine similarities of CLIP ViT-B/32, as LAION, COYO and GRIT, DataComp, LAION-COCO name them.
SCORES = (
    "clip_score",
    "similarity",
    "SIMILARITY",
    "clip_similarity_vitb32",
    "clip_b32_similarity_score",
    "top_similarity",
)
PLACES = ("noun_chunks", "ref_exps")
COLUMNS = (*TEXTS, *ALL_TEXTS, *SCORES, *PLACES, "status", "error_message", "key")


class Span(NamedTuple):
    """A phrase of a caption, as characters `start` to `end`, and the boxes of what it names."""

    start: int
    end: int
    boxes: tuple[Box, ...]


def rows_of(key: str, image: bytes | None, columns: Mapping[str, Any]) -> Iterator[Record]:
    """Yields the rows of one picture: its caption, or three kinds of GRIT's.

    A score is kept as the field `clip_score`, several texts as `texts`, for the cleaning rules.

    Raises: Refusal where the picture was not downloaded, there is no text, or places are broken.
    """
    if columns.get("status", "success") != "success":
        told = columns.get("error_message") or columns["status"]
        raise Refusal(key, "not downloaded", f"its picture was not downloaded: {told}")
    if not image:
        raise Refusal(key, "no picture", "it has no picture, or an empty one")
    texts = _texts(key, columns)
    score = next((columns[name] for name in SCORES if columns.get(name) is not None), None)
    scored = {} if score is None else {"clip_score": _number(key, score)}
    if any(columns.get(name) is not None for name in PLACES):
        yield from _grounded(key, image, texts[0], columns, scored)
        return
    several = {"texts": texts} if len(texts) > 1 else {}
    fields = {"text": texts[0], "language": language_of(texts[0])}
    yield Record(key, "caption", fields | scored | several, (image,))


def _texts(key: str, columns: Mapping[str, Any]) -> list[str]:
    found = [columns[name] for name in TEXTS if columns.get(name)][:1]
    for name in ALL_TEXTS:
        several = columns.get(name)
        found += several if isinstance(several, list | tuple) else [several]
    texts = list(dict.fromkeys(text for text in found if isinstance(text, str) and text.strip()))
    if not texts:
        raise Refusal(key, "no text", f"it has no text: got {', '.join(columns) or 'no columns'}")
    return texts


def _number(key: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Refusal(key, "broken score", f"its score is no number: {value!r:.80}") from error


# --- GRIT ---------------------------------------------------------------------------------------


def _grounded(
    key: str, image: bytes, text: str, columns: Mapping[str, Any], scored: Mapping[str, float]
) -> Iterator[Record]:
    chunks, expressions = (_spans(key, text, columns.get(name)) for name in PLACES)
    kept = without_nesting([*chunks, *expressions])
    if not kept:
        raise Refusal(key, "no box", "none of its phrases has a box")
    phrases = grounded_phrases(text, kept)
    yield Record(f"{key}/caption", "grounded_caption", {"phrases": phrases, **scored}, (image,))
    for number, span in enumerate(expressions or chunks):
        phrase = text[span.start : span.end]
        boxes = [list(box) for box in span.boxes]
        fields = {"phrase": phrase, "boxes": boxes, **scored}
        yield Record(f"{key}/find{number}", "ref_grounding", fields, (image,))
        for index, box in enumerate(boxes):
            fields = {"box": box, "text": phrase, **scored}
            yield Record(f"{key}/name{number}.{index}", "grounded_captioning", fields, (image,))


def _spans(key: str, text: str, places: Any) -> list[Span]:
    """Returns the spans of one column in the order of the text, boxes of equal ones together.

    Raises: Refusal where a span lies outside the text or a box has no area.
    """
    boxes: dict[tuple[int, int], list[Box]] = {}
    try:
        for start, end, *corners, _ in [] if places is None else places:
            box = box_from_pixels(corners, 1, 1)
            if not (0 <= start < end <= len(text)) or box[0] == box[2] or box[1] == box[3]:
                raise ValueError(f"{[start, end, *corners]} for {counted(len(text), 'character')}")
            boxes.setdefault((int(start), int(end)), []).append(box)
    except (TypeError, ValueError) as error:
        raise Refusal(key, "broken box", f"a phrase or a box of it is broken: {error}") from error
    return [Span(start, end, tuple(found)) for (start, end), found in sorted(boxes.items())]


def without_nesting(spans: Sequence[Span]) -> list[Span]:
    """Returns as many spans as can stand side by side, none inside or across another.

    Greedy: of those that begin after the last one kept, the one that ends first; of equal ones the
    one with more boxes. For intervals this keeps the largest possible number.

    Source: paper, appendix A.3 (recursive labels of GRIT are removed by a greedy algorithm).
    """
    kept: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.end, -len(s.boxes), -s.start)):
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def grounded_phrases(text: str, spans: Sequence[Span]) -> list[list[Any]]:
    """Returns `[[words, boxes], ...]` that join to the text; a space before a phrase is its own."""
    phrases: list[list[Any]] = []
    done = 0
    for span in spans:
        start = span.start - (span.start > done and text[span.start - 1] == " ")
        if start > done:
            phrases.append([text[done:start], []])
        phrases.append([text[start : span.end], [list(box) for box in span.boxes]])
        done = span.end
    return [*phrases, [text[done:], []]] if done < len(text) else phrases
