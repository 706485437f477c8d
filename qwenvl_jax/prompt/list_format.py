"""The released list format: a message as a list of small dicts, and as one string."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwenvl_jax.prompt.boxes import points_text, scan


def from_list_format(elements: Sequence[Mapping[str, Any]], first_picture: int = 1) -> str:
    """Returns the released one-string form of a message, for `raw` encoding.

    Elements: `{"image": path}`, `{"text": t}`, `{"ref": phrase}`, `{"box": b}`, `{"quad": q}`, the
    last two with a `"ref"` or without. A box is `(x1, y1, x2, y2)`, a quad four points; each may be
    a list of several, or text as `to_list_format` gives it. `first_picture` lets the numbers
    continue through a dialogue.

        >>> from_list_format([{"image": "a.png"}, {"text": "compare"}])
        'Picture 1: <img>a.png</img>\\ncompare'

    Raises: ValueError for an element with none of these keys, and for a place that is not written
    in whole numbers.
    Source: released `from_list_format`. Differs: quads, a lone phrase, the numbers.
    """
    text, number = "", first_picture
    for element in elements:
        if not element.keys() & {"image", "text", "ref", "box", "quad"}:
            raise ValueError(
                "a list element needs one of image, text, ref, box, quad: "
                f"got keys {sorted(element)}"
            )
        if "image" in element:
            text += f"Picture {number}: <img>{element['image']}</img>\n"
            number += 1
        text += element.get("text", "")
        if "ref" in element:
            text += f"<ref>{element['ref']}</ref>"
        for kind, count in (("box", 4), ("quad", 8)):
            for body in _place_texts(element.get(kind, ()), count):
                text += f"<{kind}>{body}</{kind}>"
    return text


def _place_texts(value: Any, count: int) -> list[str]:
    """Returns the inside of each tag, for one place or a list of them."""
    if isinstance(value, str):
        return [value]
    if any(isinstance(item, str) and "," in item for item in value):
        return [text for item in value for text in _place_texts(item, count)]
    flat = _flatten(value)
    if len(flat) % count:
        raise ValueError(f"a place needs {count} coordinates: got {value!r}")
    return [points_text(flat[i : i + count]) for i in range(0, len(flat), count)]


def _flatten(value: Any) -> list[int]:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [leaf for item in value for leaf in _flatten(item)]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number.is_integer():
        raise ValueError(
            f"a coordinate must be a whole number: got {value!r}; turn pixels or parts of the "
            "picture into 0..999 with box_from_pixels"
        )
    return [int(number)]


def to_list_format(text: str) -> list[dict[str, str]]:
    """Returns the elements of a released-format string: text, image, ref, box, quad.

        >>> to_list_format("a <ref>dog</ref>")
        [{'text': 'a '}, {'ref': 'dog'}]

    Total: tags that do not close are text. `from_list_format` gives the string back, except around
    pictures: it writes `Picture k: ` and the newline itself, which are text here, as released.
    Source: released `to_list_format`. Differs: never raises, normalises nothing.
    """
    return [{kind: body} for kind, body in scan(text)]
