"""A folder of TensorFlow Datasets as a Source, read through ArrayRecord, without TensorFlow.

What rows an example gives is told by its features: captions of a picture as in `coco_captions`,
phrases of objects as in `ref_coco`, both and a question as in our own `scenes_tfds.py`, lines of
text as in our `documents_tfds.py`. Pictures stay encoded: TFDS's decoding ignores EXIF, gives CMYK
four channels, and takes OpenCV where that is installed, so only our loader ever decodes. Boxes are
ymin, xmin, ymax, xmax in 0..1, and texts come as bytes.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from qwenvl_jax.data.clean import language_of
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.prompt.boxes import box_from_pixels
from qwenvl_jax.words import counted

_log = logging.getLogger(__name__)


class _Raw(tfds.decode.SkipDecoding):
    """Leaves pictures encoded, inside sequences too, where TFDS's own class lacks the method."""

    def decode_batch_example_np(self, example_data: Any) -> Any:
        return example_data


class TfdsRows:
    """The rows of one split, in the order of the files.

    An example with captions is one row. Where examples have phrases of objects, opening reads each
    once to count its rows, so a set that is opened often should be prepared.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        """`split` may be a slice, as "train[:50%]".

        Raises: DataError where the folder is no such data set, its files are TFRecord, it has no
        such split, or features that no rows can be made of.
        """
        self.folder, self.split = Path(folder), split
        self._examples = _open(self.folder, split)
        features = dict(self._examples.dataset_info.features.items())
        fixed = sum(
            bool(names & set(features))
            for names in ({"captions", "caption"}, {"question"}, {"lines"})
        )
        self._starts = np.arange(len(self._examples) + 1) * fixed
        if _has_phrases(features):
            _log.info("%s: reading %d examples to count rows", folder, len(self._examples))
            counts = [len(self._rows(number)) for number in range(len(self._examples))]
            self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """Digest of the descriptions of the data set, of file lengths and of the split."""
        digest = hashlib.sha256(self.split.encode())
        for path in sorted(self.folder.iterdir()):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            if path.suffix == ".json":
                digest.update(path.read_bytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        """Returns a row. Raises: DataError for a damaged one, IndexError past the end."""
        if not 0 <= index < len(self):  # TFDS raises ValueError, which ends no old-style loop
            held = counted(len(self), "row")
            raise IndexError(f"row {index} is not there: {self.folder} has {held}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        rows, place = self._rows(number), index - int(self._starts[number])
        if place >= len(rows):
            raise DataError(f"row {self._key(number)} has no text: its example has no caption")
        return rows[place]

    def _key(self, number: int) -> str:
        return f"{self.folder.parent.name}/{self.split}/{number}"

    def _rows(self, number: int) -> list[Record]:
        key = self._key(number)
        try:
            return rows_of(key, self._examples[number])
        except DataError:
            raise
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"row {key} cannot be read: {error}; copy or build the data set again"
            ) from error


def rows_of(key: str, example: Mapping[str, Any]) -> list[Record]:
    """Returns the rows of one example whose picture is still encoded.

    Captions: one row with the longest, the others kept as `texts`. Objects with phrases: for each
    phrase a row that finds the object and one that names it. Lines: one row that reads them all.
    """
    image = (_bytes(example["image"]),)
    rows: list[Record] = []
    if texts := _texts(example):
        text = max(texts, key=len)
        several = {"texts": texts} if len(texts) > 1 else {}
        rows.append(
            Record(key, "caption", {"text": text, "language": language_of(text)} | several, image)
        )
    if "question" in example:
        fields = {"question": _text(example["question"]), "answer": _text(example["answer"])}
        rows.append(Record(f"{key}/question", "vqa", fields, image))
    if "lines" in example:
        rows.append(Record(f"{key}/lines", "ocr", _lines(example), image))
    objects = example.get("objects", {})
    one_each = [[phrase] for phrase in objects.get("phrase", ())]
    for number, phrases in enumerate(objects.get("refexp", {}).get("raw", one_each)):
        y1, x1, y2, x2 = objects["bbox"][number].tolist()
        box = list(box_from_pixels((x1, y1, x2, y2), 1, 1))
        for index, phrase in enumerate(map(_text, phrases)):
            place = f"{key}/{number}.{index}"
            found = {"phrase": phrase, "boxes": [box]}
            rows.append(Record(f"{place}/find", "ref_grounding", found, image))
            named = {"box": box, "text": phrase}
            rows.append(Record(f"{place}/name", "grounded_captioning", named, image))
    return rows


def _open(folder: Path, split: str) -> Any:
    try:
        json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))  # else TFDS trips
        builder: Any = tfds.builder_from_directory(folder)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{folder} is no data set of TFDS: {error}; give the folder of one version, which "
            "holds dataset_info.json"
        ) from error
    info: Any = builder.info
    features = dict(info.features.items())
    form = info.file_format.value if info.file_format is not None else "unknown"
    if form != "array_record":
        raise DataError(
            f"{folder} has files of another format: got {form}, expected array_record; convert it "
            f"where TensorFlow is installed: tfds convert_format --dataset_version_dir={folder} "
            "--out_dir=NEW --out_file_format=array_record"
        )
    has_text = {"captions", "caption", "question", "lines"} & set(features)
    if "image" not in features or not (has_text or _has_phrases(features)):
        raise DataError(
            f"{folder} has features that no rows can be made of: got "
            f"{', '.join(sorted(features))}, expected image and captions (as coco_captions), "
            "objects with refexp (as ref_coco) or lines (as our documents)"
        )
    try:
        return builder.as_data_source(split, decoders=_undecoded(features))
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{folder} has no split {split!r}: got {', '.join(info.splits) or 'none'}; choose one "
            "of these, or a slice as 'train[:50%]'"
        ) from error


def _has_phrases(features: Mapping[str, Any]) -> bool:
    objects = features.get("objects")
    return bool({"refexp", "phrase"} & set(getattr(objects, "feature", None) or ()))


def _undecoded(features: Mapping[str, Any]) -> dict[str, Any]:
    """Returns decoders that leave every picture as it is, nested as the features are."""
    decoders: dict[str, Any] = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)  # of a sequence
        if isinstance(inner, tfds.features.Image):
            decoders[name] = _Raw()
        elif isinstance(inner, tfds.features.FeaturesDict) and (
            below := _undecoded(dict(inner.items()))
        ):
            decoders[name] = below
    return decoders


def _texts(example: Mapping[str, Any]) -> list[str]:
    if "captions" in example:
        return [_text(text) for text in example["captions"]["text"]]
    return [_text(example["caption"])] if "caption" in example else []


def _lines(example: Mapping[str, Any]) -> dict[str, Any]:
    found = example["lines"]
    quads = np.reshape(found["quad"], (-1, 4, 2)).tolist()
    texts = map(_text, found["text"])
    lines = [list(line) for line in zip(texts, quads, strict=True)]
    return {"lines": lines, "language": _text(example["language"])}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _bytes(value: Any) -> bytes:
    return value.item() if isinstance(value, np.ndarray) else bytes(value)
