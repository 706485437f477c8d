"""Generated rows a second on one core, and contact sheets of them.

    python benchmarks/generated_rows.py [--rows 60] [--emoji] [--objects DIR] [--corpus DIR]
    python benchmarks/generated_rows.py --rows 0 --emoji --sheets docs

Seconds are those of the process, so other work on the machine does not count. The first rows, which
fill caches of fonts and pictures, are made before the clock starts.
"""

import argparse
import io
import textwrap
import time
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.collages import Collages
from qwenvl_jax.data.sources.documents import Documents
from qwenvl_jax.data.sources.page_photo import PageSettings
from qwenvl_jax.prompt.boxes import parse_boxes
from qwenvl_jax.prompt.draw import draw_boxes
from qwenvl_jax.prompt.fonts import font_for

WARM_UP = 20
SMALL_PAGE = PageSettings(
    short_side=(224, 224), aspect=(1.0, 1.0), text_scale=(0.09, 0.16), max_lines=5
)
COLUMNS, CELL, TEXT_HEIGHT, TEXT_SIZE = 5, 232, 62, 13


def measure(name: str, source: Collages | Documents, rows: int) -> None:
    for i in range(WARM_UP):
        source[i]
    start, size = time.process_time(), 0
    for i in range(WARM_UP, WARM_UP + rows):
        size += sum(len(image) for image in source[i].images if isinstance(image, bytes))
    seconds = time.process_time() - start
    print(f"{name:<34} {rows / seconds:7.1f} rows/s a core   {size / rows / 1024:6.1f} KiB a row")


def places(row: Record) -> list[dict[str, Any]]:
    """Returns the boxes and quads of a row, with what they are called."""
    fields = row.fields
    match row.task:
        case "ref_grounding":
            return [{"ref": fields["phrase"], "box": box} for box in fields["boxes"]]
        case "grounded_captioning":
            return [{"ref": fields["text"], "box": fields["box"]}]
        case "grounded_caption":
            return [{"ref": text, "box": box} for text, boxes in fields["phrases"] for box in boxes]
        case "ocr":
            return [{"quad": quad} for _, quad in fields["lines"]]
        case "chat":
            said = "".join(turn["value"] for turn in fields["conversations"])
            return parse_boxes(said, inherit_ref=True) if len(row.images) == 1 else []
    return parse_boxes(fields.get("question", ""))


def words(row: Record) -> str:
    fields = row.fields
    if row.task == "chat":
        turns = [turn["value"].split("</img>\n")[-1] for turn in fields["conversations"]]
        return " | ".join(turns)
    if row.task in ("vqa", "ocr_vqa"):
        return f"{fields['question']} {fields['answer']}"
    if row.task == "ocr":
        return " / ".join(text for text, _ in fields["lines"])
    if row.task == "grounded_caption":
        return "".join(text for text, _ in fields["phrases"])
    return str(fields.get("text") or fields.get("phrase"))


def cell(row: Record) -> Image.Image:
    """Returns the row's pictures side by side with its places, and its words below."""
    found = Image.new("RGB", (CELL, CELL + TEXT_HEIGHT), "white")
    width = CELL // len(row.images)
    for i, data in enumerate(row.images):
        assert isinstance(data, bytes)
        picture = draw_boxes(Image.open(io.BytesIO(data)), places(row))
        picture.thumbnail((width - 2, CELL - 2), Image.Resampling.LANCZOS)
        found.paste(picture, (i * width, 0))
    text = f"{row.task}: {words(row)}"
    wide = 2 if any("\u4e00" <= char for char in text) else 1
    for i, line in enumerate(textwrap.wrap(text, 34 // wide)[:4]):
        font, line = font_for(line, TEXT_SIZE)
        ImageDraw.Draw(found).text((2, CELL + 15 * i), line, fill="black", font=font)
    return found


def write_sheet(source: Collages | Documents, rows: int, path: Path) -> None:
    sheet = Image.new("RGB", (COLUMNS * CELL, -(-rows // COLUMNS) * (CELL + TEXT_HEIGHT)), "white")
    for i in range(rows):
        place = (i % COLUMNS * CELL, i // COLUMNS * (CELL + TEXT_HEIGHT))
        sheet.paste(cell(source[i]), place)
    sheet.save(path, quality=80)
    print(f"wrote {path} ({path.stat().st_size // 1024} KiB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--emoji", action="store_true")
    parser.add_argument("--objects", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--sheets", type=Path)
    options = parser.parse_args()
    total = WARM_UP + options.rows
    objects = {"emoji": options.emoji, "folder": options.objects}
    if options.rows:
        for side in (224, 448):
            source = Collages(total, "train", side=side, **objects)
            measure(f"collages, {side} px", source, options.rows)
        small = Documents(total, "train", page=SMALL_PAGE, corpus=options.corpus)
        measure("documents, 224 px", small, options.rows)
        full = Documents(total, "train", corpus=options.corpus)
        measure("documents, published sizes", full, options.rows)
    if options.sheets:
        collages = Collages(100, "heldout", side=336, **objects)
        write_sheet(collages, 15, options.sheets / "generated_collages.jpg")
        documents = Documents(100, "heldout", corpus=options.corpus)
        write_sheet(documents, 10, options.sheets / "generated_documents.jpg")


if __name__ == "__main__":
    main()
