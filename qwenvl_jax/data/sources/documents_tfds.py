"""Our photographed documents as a data set of TensorFlow Datasets, for people who load with TFDS.

    import tensorflow_datasets as tfds
    from qwenvl_jax.data.sources.documents_tfds import PhotographedDocuments

    builder = PhotographedDocuments(data_dir="data", num_documents=1000, file_format="array_record")
    builder.download_and_prepare()
    builder.as_data_source("train")[0]["lines"]["text"]

Each example has a picture, its language, and its lines in reading order: text and quad, which is
x1, y1, ..., x4, y4 in thousandths of the picture's sides, clockwise from the line's own top left.
`TfdsRows` reads them back as rows of training. Fonts are this machine's where no folder is given.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from qwenvl_jax.data.sources.composition import Split
from qwenvl_jax.data.sources.documents import Documents


class PhotographedDocuments(tfds.core.GeneratorBasedBuilder):
    """`num_documents` to train on, a tenth of that for the test."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS finds it with a package that it does not depend on, for checksums

    def __init__(
        self,
        *,
        num_documents: int = 10_000,
        documents: dict[str, Any] | None = None,
        **settings: Any,
    ):
        """`documents`: settings of `Documents`, as languages and corpus; `settings`: TFDS's own."""
        self.num_documents, self.documents = num_documents, documents or {}
        super().__init__(**settings)

    def _info(self) -> tfds.core.DatasetInfo:
        line = {
            "text": tfds.features.Text(),
            "quad": tfds.features.Tensor(shape=(8,), dtype=np.int32),
        }
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "language": tfds.features.Text(),
            "lines": tfds.features.Sequence(line),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            description="Lines of text on warped and blurred pages, with the quad of each line.",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {
            "train": self._generate_examples("train", self.num_documents),
            "test": self._generate_examples("heldout", max(self.num_documents // 10, 1)),
        }

    def _generate_examples(self, split: Split, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        source = Documents(count, split, tasks=("ocr",), **self.documents)
        for index in range(count):
            row = source[index]
            lines = [
                {"text": text, "quad": np.ravel(quad).astype(np.int32)}
                for text, quad in row.fields["lines"]
            ]
            (picture,) = row.images
            assert isinstance(picture, bytes)  # as `Documents` makes them
            image = io.BytesIO(picture)
            yield index, {"image": image, "language": row.fields["language"], "lines": lines}
