"""Our drawn scenes as a data set of TensorFlow Datasets, for people who load data with TFDS.

    import tensorflow_datasets as tfds
    from qwenvl_jax.data.sources.scenes_tfds import DrawnScenes

    builder = DrawnScenes(data_dir="data", num_scenes=1000, file_format="array_record")
    builder.download_and_prepare()
    builder.as_data_source("train")[0]["caption"]

Each example has a picture, a caption, a question with its answer, and the things in it with their
boxes and phrases (named as in `ref_coco`). `TfdsRows` reads them back as rows of training.
"""

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from qwenvl_jax.data.sources import scene_language as language
from qwenvl_jax.data.sources.drawing import SHAPES
from qwenvl_jax.data.sources.scenes import COLOURS, Split, scene


class DrawnScenes(tfds.core.GeneratorBasedBuilder):
    """`num_scenes` scenes of `side` pixels to train on, a tenth of that for the test."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS finds it with a package that it does not depend on, for checksums

    def __init__(self, *, num_scenes: int = 10_000, side: int = 112, **settings: Any):
        self.num_scenes, self.side = num_scenes, side
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        # one phrase a thing: TFDS writes sequences inside sequences only with TensorFlow
        thing = {
            "bbox": tfds.features.BBoxFeature(),
            "shape": tfds.features.ClassLabel(names=list(SHAPES)),
            "colour": tfds.features.ClassLabel(names=list(COLOURS)),
            "phrase": tfds.features.Text(),
        }
        features = {
            "image": tfds.features.Image(shape=(self.side, self.side, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "question": tfds.features.Text(),
            "answer": tfds.features.Text(),
            "objects": tfds.features.Sequence(thing),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            description="Coloured shapes on backgrounds, with captions, questions and boxes.",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {
            "train": self._generate_examples("train", self.num_scenes),
            "test": self._generate_examples("heldout", max(self.num_scenes // 10, 1)),
        }

    def _generate_examples(self, split: Split, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for key in range(count):
            yield key, scene_features(key, split, self.side)


def scene_features(key: int, split: Split, side: int) -> dict[str, Any]:
    """Returns the example of one scene, as TFDS encodes it."""
    shown = scene(key, split, side)
    rng = random.Random(f"tfds/{split}/{key}")
    picture = io.BytesIO()
    Image.fromarray(np.asarray(shown.image)).save(picture, "PNG")
    picture.seek(0)
    things = []
    for thing in shown.things:
        x1, y1, x2, y2 = (value / side for value in thing.box)
        things.append(
            {
                "bbox": tfds.features.BBox(ymin=y1, xmin=x1, ymax=y2, xmax=x2),
                "shape": thing.shape,
                "colour": thing.colour,
                "phrase": language.phrase(shown, thing, rng),
            }
        )
    asked = language.question(shown, split, rng)
    return {
        "image": picture,
        "caption": language.caption(shown, rng),
        "question": asked.text,
        "answer": asked.answer,
        "objects": things,
    }
