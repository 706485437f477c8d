"""The question files of the original evaluation scripts, as training rows.

    VQA       .jsonl   {"image", "question", "answer", ...}
    RefCOCO   .jsonl   {"image", "sent", "bbox": [x1, y1, x2, y2] in pixels, "width", "height"}
    captions  .jsonl   {"image", "caption"}, or COCO's .json {"images": [{"id", "image"}],
                       "annotations": [{"image_id", "caption"}]}

Files without answers (test splits) give only refusals. Source: released `eval_mm`.
"""

import collections
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwenvl_jax.data.clean import language_of
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.lines import ranges, read_lines, split
from qwenvl_jax.data.sources.stream import Refusal, files_fingerprint
from qwenvl_jax.prompt.boxes import box_from_pixels

ROW_KEYS = ("question", "sent", "caption")  # one of them stands in each row


class EvalFile:
    """One file of questions as a Stream; pictures are paths below `pictures`, read when stored."""

    def __init__(self, path: str | Path, pictures: str | Path | None = None):
        self.path = Path(path)
        self.pictures = self.path.parent if pictures is None else Path(pictures)

    @property
    def fingerprint(self) -> str:
        return files_fingerprint([self.path], self.path.parent, kind="eval")

    def shards(self) -> list[str]:
        is_lines = self.path.suffix.lower() == ".jsonl"
        return ranges([self.path], self.path.parent) if is_lines else [self.path.name]

    def read(self, shard: str) -> Iterator[Record | DataError]:
        if shard == self.path.name:
            yield from self._coco()
            return
        name, *_ = split(shard)
        for place, line in read_lines(shard, self.path.parent):
            if line.strip():
                yield self._row(f"{name}@{place}", line)

    def _row(self, key: str, line: bytes) -> Record | Refusal:
        try:
            row = json.loads(line)
            image = self.pictures / row["image"]
            if "sent" in row:
                box = box_from_pixels(row["bbox"], row["width"], row["height"])
                fields = {"phrase": _words(row, "sent"), "boxes": [list(box)]}
                return Record(key, "ref_grounding", fields, (image,))
            if "caption" in row:
                return _captioned(key, [row["caption"]], image)
            return Record(key, "vqa", _answered(key, row), (image,))
        except Refusal as refusal:
            return refusal
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            return Refusal(key, "broken line", f"its line is of no known form: {error!r}")

    def _coco(self) -> Iterator[Record | DataError]:
        """Yields one row for each picture, with its captions as `texts`; the file is read whole."""
        name = self.path.name
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8-sig"))
            texts: dict[Any, list[str]] = collections.defaultdict(list)
            for note in stored["annotations"]:
                texts[note["image_id"]].append(note["caption"])
            images = [(i["id"], i.get("image") or i["file_name"]) for i in stored["images"]]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self.path} is not a caption file: {error!r}; expected images with id and image, "
                "and annotations with image_id and caption"
            ) from error
        for number, image in images:
            key = f"{name}/{number}"
            try:
                yield _captioned(key, texts[number], self.pictures / image)
            except Refusal as refusal:
                yield refusal
            except TypeError as error:
                yield Refusal(key, "broken line", f"its picture has no path: {error}")


def _captioned(key: str, texts: list[Any], image: Path) -> Record:
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        raise Refusal(key, "no text", "its picture has no caption")
    fields: dict[str, Any] = {"text": texts[0], "language": language_of(texts[0])}
    return Record(key, "caption", fields | ({"texts": texts} if len(texts) > 1 else {}), (image,))


def _answered(key: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Returns question and answer; of several answers the most frequent, the first of equals.

    Source: paper, appendix A.2 (of VQAv2 the answer that annotators trust most).
    """
    answer = row.get("answer", row.get("answers"))
    if isinstance(answer, list) and answer:
        texts = [a["answer"] if isinstance(a, dict) else a for a in answer]
        answer = collections.Counter(texts).most_common(1)[0][0]
    if not isinstance(answer, str) or not answer.strip():
        raise Refusal(key, "no answer", "its question has no answer, as in a test split")
    return {"question": _words(row, "question"), "answer": answer}


def _words(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise TypeError(f"{name} is {row[name]!r:.60}, expected text")
    return row[name]
