"""One HTML page of training samples that needs nothing else: pictures, text with its loss, packing.

Whatever a sample holds is text here: every string is escaped before it enters the page.
"""

import base64
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qwenvl_jax.data.example import DataError, Example, Picture
from qwenvl_jax.data.sample_pieces import Piece, pieces_of, places_by_picture
from qwenvl_jax.image.decode import ImageError
from qwenvl_jax.image.load import load_image
from qwenvl_jax.prompt.draw import draw_boxes
from qwenvl_jax.prompt.tokenizer import Tokenizer
from qwenvl_jax.words import counted

_STYLE = Path(__file__).parents[1] / "assets" / "sample_page.css"
_LONGEST_SIDE = 560  # of a shown picture, in pixels
_SMALLEST_SIDE = 336  # smaller ones are enlarged, so that lines and labels can be read
_JPEG_QUALITY = 88
_SHADES = 6  # of neighbouring samples in a packed row
_LEGIBLE = 0.02  # of a row: narrower samples have no number in the bar

Shown = Example | DataError


class Packing(NamedTuple):
    """Packed rows as lists of samples, each by its place in the page; none is a refused one."""

    rows: Sequence[Sequence[int]]
    length: int
    max_images: int


def sample_page(
    title: str,
    notes: Sequence[str],
    samples: Sequence[Shown],
    tokenizer: Tokenizer,
    packing: Packing | None = None,
) -> str:
    """Returns the page's HTML. A sample that could not be made is shown with the reason."""
    spans = {} if packing is None else _spans(packing, samples)
    cards = [
        _refused(i, sample)
        if isinstance(sample, DataError)
        else _card(i, sample, tokenizer, spans.get(i, ""))
        for i, sample in enumerate(samples)
    ]
    style = _STYLE.read_text(encoding="utf-8")
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>",
        '<input type="checkbox" id="borders">',
        f"<header>\n<h1>{_text(title)}</h1>",
        *(f"<p>{_text(note)}</p>" for note in notes),
        _LEGEND,
        "</header>\n<main>",
        _packing(packing, samples) if packing is not None else "",
        *cards,
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


_LEGEND = (
    '<p class="legend"><span class="t">learnt</span> <span class="c">context, no loss</span> '
    '<span class="s">special token</span> <span class="p">a picture\'s slots</span> '
    '<label for="borders">token borders</label></p>'
)


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _refused(number: int, error: DataError) -> str:
    return (
        f'<article id="s{number}" class="refused"><h2><a href="#s{number}">{number}</a> '
        f"not usable</h2><p>{_text(error)}</p></article>"
    )


def _card(number: int, example: Example, tokenizer: Tokenizer, span: str) -> str:
    pieces = list(pieces_of(example, tokenizer))
    places = places_by_picture(pieces, len(example.images))
    figures = [
        _figure(i, image, boxes)
        for i, (image, boxes) in enumerate(zip(example.images, places, strict=True), 1)
    ]
    num_learnt = int(np.count_nonzero(example.is_target))
    sizes = f"{counted(len(example.ids), 'token')}, {num_learnt} learnt"
    if example.images:
        sizes += f", {counted(len(example.images), 'picture')}"
    if span:
        sizes += f"; {span}"
    kind = "pictures many" if len(figures) > 2 else "pictures"
    pictures = f'<div class="{kind}">{"".join(figures)}</div>' if figures else ""
    return (
        f'<article id="s{number}"><h2><a href="#s{number}">{number}</a> '
        f'<span class="task">{_text(example.task)}</span> <span class="sizes">{sizes}</span></h2>'
        f'<p class="key">{_text(example.key)}</p><div class="sample">{pictures}'
        f'<div class="text" dir="auto">{_tokens(pieces)}</div></div></article>'
    )


def _tokens(pieces: Sequence[Piece]) -> str:
    """Returns a sample's text: each piece between tags that say whether it is learnt."""
    shown, num_pictures = [], 0
    for piece in pieces:
        learnt = "t" if piece.is_target else "c"
        ids = " ".join(map(str, piece.ids[:8]))
        if piece.kind == "picture":
            num_pictures += 1
            label = f"picture {num_pictures}: {len(piece.ids) - 2} slots"
            shown.append(f'<span class="p {learnt}">{label}</span>')
        elif piece.kind == "special":
            shown.append(f'<span class="s {learnt}" title="{ids}">{_text(piece.text)}</span>')
        else:
            # a line break alone would show no colour
            text = _text(piece.text).replace("\n", '<i class="n">\u21b5</i>\n')
            shown.append(f'<span class="{learnt}" title="{ids}">{text}</span>')
    return "".join(shown)


def _figure(number: int, image: Picture, boxes: Sequence[dict[str, Any]]) -> str:
    name = f", {image.name}" if isinstance(image, Path) else ""
    try:
        pixels_YXC = image if isinstance(image, np.ndarray) else load_image(image)
    except (ImageError, OSError) as error:
        return f'<figure class="refused"><p>picture {number}: {_text(error)}</p></figure>'
    height, width = pixels_YXC.shape[:2]
    drawn = draw_boxes(_resized(pixels_YXC), boxes)
    data = io.BytesIO()
    drawn.save(data, "JPEG", quality=_JPEG_QUALITY)
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    count = f", {counted(len(boxes), 'place')}" if boxes else ""
    return (
        f'<figure><img alt="picture {number}" width="{drawn.width}" height="{drawn.height}" '
        f'src="data:image/jpeg;base64,{encoded}"><figcaption>picture {number}: '
        f"{width} x {height}{_text(name)}{count}</figcaption></figure>"
    )


def _resized(pixels_YXC: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels_YXC)
    longest = max(image.size)
    scale = min(_LONGEST_SIDE / longest, max(1.0, _SMALLEST_SIDE / longest))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS) if size != image.size else image


def _spans(packing: Packing, samples: Sequence[Shown]) -> dict[int, str]:
    """Returns in which row each sample lies and from where to where, in words."""
    spans = dict.fromkeys(range(len(samples)), "fits into no row")
    for number, row in enumerate(packing.rows):
        for i, start, end in _places(row, samples):
            spans[i] = f"row {number}, tokens {start} to {end - 1}"
    return spans


def _places(row: Sequence[int], samples: Sequence[Shown]) -> Iterator[tuple[int, int, int]]:
    """Yields the samples of a row, each with its first token's place and one past its last."""
    start = 0
    for i in row:
        end = start + len(_example(samples, i).ids)
        yield i, start, end
        start = end


def _example(samples: Sequence[Shown], i: int) -> Example:
    sample = samples[i]
    if isinstance(sample, DataError):
        raise ValueError(f"a packed row holds sample {i}, which cannot be used: {sample}")
    return sample


def _packing(packing: Packing, samples: Sequence[Shown]) -> str:
    """Returns a bar for each packed row, as long as a row, with its samples end to end."""
    shown = []
    for number, row in enumerate(packing.rows):
        bars, num_tokens, num_images = [], 0, 0
        for i, start, end in _places(row, samples):
            example = _example(samples, i)
            num_tokens, num_images = end, num_images + len(example.images)
            share = (end - start) / packing.length
            bars.append(
                f'<a href="#s{i}" class="shade{i % _SHADES}" style="width:{100 * share:.3f}%" '
                f'title="sample {i}, {_text(example.task)}: tokens {start} to {end - 1}, '
                f'{counted(len(example.images), "picture")}">{i if share >= _LEGIBLE else ""}</a>'
            )
        shown.append(
            f'<div class="row"><span>row {number}</span><div class="bar">{"".join(bars)}</div>'
            f"<span>{num_tokens} of {packing.length} tokens, {num_tokens / packing.length:.1%}; "
            f"{num_images} of {counted(packing.max_images, 'picture')}</span></div>"
        )
    return f"<section><h2>Packed rows</h2>{''.join(shown)}</section>"
