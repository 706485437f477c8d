"""Folders of TensorFlow Datasets as sources: the public schemas and our own, without TensorFlow."""

import io
import json
import pickle
import sys
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from prepared_rows import picture
from tensorflow_datasets.core.features import feature as tfds_feature

from qwenvl_jax.cli.data import main
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.sources.documents import Documents
from qwenvl_jax.data.sources.documents_tfds import PhotographedDocuments
from qwenvl_jax.data.sources.open import open_source
from qwenvl_jax.data.sources.page_photo import PageSettings
from qwenvl_jax.data.sources.prepared import Prepared
from qwenvl_jax.data.sources.scenes import scene
from qwenvl_jax.data.sources.scenes_tfds import DrawnScenes
from qwenvl_jax.data.sources.tfds_rows import TfdsRows
from qwenvl_jax.image.load import load_image


class Tiny(tfds.core.GeneratorBasedBuilder):
    """A data set of given features and examples; its subclasses carry the public names."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES: ClassVar = {}
    EXAMPLES: ClassVar = []

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(self.FEATURES)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self.EXAMPLES)


def jpg(seed: int) -> io.BytesIO:
    return io.BytesIO(picture(seed=seed))


class CocoCaptions(Tiny):
    FEATURES: ClassVar = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "image/id": np.int64,
        "objects": tfds.features.Sequence(
            {"bbox": tfds.features.BBoxFeature(), "is_crowd": np.bool_, "label": np.int64}
        ),
        "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
    }
    EXAMPLES: ClassVar = [
        {
            "image": jpg(number),
            "image/id": number,
            "objects": [],
            "captions": [{"text": text, "id": 1} for text in texts],
        }
        for number, texts in enumerate([["a cat", "a cat on a mat"], ["一只猫"], []])
    ]


class RefCoco(Tiny):
    FEATURES: ClassVar = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "image/id": np.int64,
        "objects": tfds.features.Sequence(
            {
                "bbox": tfds.features.BBoxFeature(),
                "label": np.int64,
                "mask": tfds.features.Image(encoding_format="png"),
                "refexp": tfds.features.Sequence(
                    {"refexp_id": np.int64, "raw": tfds.features.Text()}
                ),
            }
        ),
    }
    EXAMPLES: ClassVar = [
        {
            "image": jpg(number),
            "image/id": number,
            "objects": [
                {
                    "bbox": tfds.features.BBox(ymin=0.1, xmin=0.2, ymax=0.5, xmax=1.0),
                    "label": 3,
                    "mask": io.BytesIO(picture(form="PNG")),
                    "refexp": [{"refexp_id": i, "raw": text} for i, text in enumerate(texts)],
                }
                for texts in objects
            ],
        }
        for number, objects in enumerate([[["left dog", "a dog"], ["cat"]], [], [["bird"]]])
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Returns the folder of a built data set."""
    root = tmp_path_factory.mktemp("tfds")

    def build(kind, **settings):
        builder = kind(data_dir=root, file_format="array_record", **settings)
        with pytest.MonkeyPatch.context() as patch:
            # TFDS asks TensorFlow for the dtype when it writes sequences in sequences, as ref_coco
            # has them; reading does not need it
            patch.setattr(tfds_feature.TensorInfo, "dtype", property(lambda info: info.np_dtype))
            builder.download_and_prepare()
        return root / builder.info.full_name

    return build


def test_captions_of_coco(built):
    rows = TfdsRows(built(CocoCaptions))
    found = {}
    for i in range(len(rows)):  # TFDS shuffles examples when it writes them
        try:
            row = rows[i]
        except DataError as error:
            found["error"] = str(error)
        else:
            found[row.fields["text"]] = row
    cat = found["a cat on a mat"]
    assert cat.task == "caption"
    assert cat.fields["texts"] == ["a cat", "a cat on a mat"]
    assert cat.fields["language"] == "en"
    assert cat.images == (picture(seed=0),), "the encoded file, untouched"
    assert found["一只猫"].fields == {"text": "一只猫", "language": "zh"}
    assert "no text" in found["error"]
    with pytest.raises(IndexError, match="row 3 is not there"):
        rows[3]


def test_phrases_of_ref_coco(built):
    rows = TfdsRows(built(RefCoco))
    box = [200, 100, 999, 500]
    told = [(row.task, row.fields) for row in map(rows.__getitem__, range(len(rows)))]
    expected = [
        (task, fields)
        for phrase in ("left dog", "a dog", "cat", "bird")
        for task, fields in (
            ("ref_grounding", {"phrase": phrase, "boxes": [box]}),
            ("grounded_captioning", {"box": box, "text": phrase}),
        )
    ]
    assert sorted(told, key=str) == sorted(expected, key=str)
    again = pickle.loads(pickle.dumps(rows))
    assert [again[i] for i in range(8)] == [rows[i] for i in range(8)]


def test_our_scenes_are_a_data_set(built):
    folder = built(DrawnScenes, num_scenes=6, side=56)
    rows = open_source(folder)
    found = [rows[i] for i in range(len(rows))]
    tasks = [row.task for row in found]
    assert tasks.count("caption") == tasks.count("vqa") == 6
    assert tasks.count("ref_grounding") == tasks.count("grounded_captioning") >= 6
    drawn = {scene(key, "train", 56).image.tobytes() for key in range(6)}
    assert {load_image(row.images[0]).tobytes() for row in found} == drawn
    assert len(TfdsRows(folder, "test")) >= 2
    assert "tensorflow" not in sys.modules


def test_our_documents_are_a_data_set(built):
    settings = {"page": PageSettings(short_side=(160, 200))}
    folder = built(PhotographedDocuments, num_documents=5, documents=settings)
    for split, made in (("train", "train"), ("test", "heldout")):
        rows = TfdsRows(folder, split)
        drawn = Documents(5 if split == "train" else 1, made, tasks=("ocr",), **settings)
        told = [(rows[i].task, rows[i].fields, rows[i].images) for i in range(len(rows))]
        expected = [("ocr", drawn[i].fields, drawn[i].images) for i in range(len(drawn))]
        assert sorted(told, key=str) == sorted(expected, key=str)
    assert "tensorflow" not in sys.modules


def test_fingerprint_follows_split_and_data(built, tmp_path):
    folder = built(CocoCaptions)
    prints = {TfdsRows(folder).fingerprint, TfdsRows(folder, "train[:50%]").fingerprint}
    assert len(prints) == 2
    assert TfdsRows(folder).fingerprint in prints


def test_a_data_set_is_prepared_by_the_command(built, tmp_path, capsys):
    folder = built(CocoCaptions)
    assert main(["prepare", str(folder), str(tmp_path / "out"), "--num-workers", "2"]) == 0
    assert "2 rows of 3" in capsys.readouterr().out
    assert len(Prepared(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fileFormat": "tfrecord"}, "got tfrecord, expected array_record; convert it where Tens"),
        ({"name": None}, "is no data set of TFDS"),
    ],
)
def test_folders_that_cannot_be_read_are_told(built, tmp_path, change, message):
    folder = built(CocoCaptions)
    (tmp_path / "1.0.0").mkdir()
    for path in folder.iterdir():
        (tmp_path / "1.0.0" / path.name).write_bytes(path.read_bytes())
    info = tmp_path / "1.0.0" / "dataset_info.json"
    stored = json.loads(info.read_text()) | change
    info.write_text(json.dumps(stored) if stored["name"] else "{")
    with pytest.raises(DataError, match=message):
        TfdsRows(tmp_path / "1.0.0")


def test_other_features_and_splits_are_told(built):
    class Other(Tiny):
        FEATURES: ClassVar = {"image": tfds.features.Image(), "label": np.int64}
        EXAMPLES: ClassVar = [{"image": jpg(1), "label": 1}]

    with pytest.raises(DataError, match="features that no rows can be made of: got image, label"):
        TfdsRows(built(Other))
    with pytest.raises(DataError, match="has no split 'tset': got train"):
        TfdsRows(built(CocoCaptions), "tset")


def test_a_damaged_example_is_named(built, tmp_path):
    folder = built(CocoCaptions)
    (tmp_path / "1.0.0").mkdir()
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        place = data.find("一只猫".encode())
        if place >= 0:
            data[place] ^= 1
        (tmp_path / "1.0.0" / path.name).write_bytes(data)
    rows = TfdsRows(tmp_path / "1.0.0")
    faults = 0
    for i in range(3):
        try:
            assert rows[i].fields["text"] == "a cat on a mat"
        except DataError:
            faults += 1
    assert faults == 2, "the damaged one, and the one without a caption"
