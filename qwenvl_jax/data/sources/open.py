"""One path to its rows: what lies there says how they are read."""

import os
from pathlib import Path

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Source

CONVERSATIONS = (".json", ".jsonl")  # how files of dialogues end


def open_source(
    path: str | os.PathLike[str], pictures: str | os.PathLike[str] | None = None
) -> Source:
    """Returns the rows of a conversation file, a prepared folder or a TFDS folder.

    A `.json` or `.jsonl` file is read as conversations, with picture paths relative to `pictures`
    or to the file's folder. A folder with `index.json` was made by `qwenvl data prepare`; one with
    `dataset_info.json` by TensorFlow Datasets.

    Raises: DataError for anything else; OSError where it cannot be read.
    """
    place = Path(path)
    if not place.exists():
        raise DataError(f"no data at {str(place)!r}: expected a file or a folder; check the path")
    if place.is_file() and place.suffix.lower() in CONVERSATIONS:
        from qwenvl_jax.data.sources.conversations import Conversations

        return Conversations(place, pictures)
    if pictures is not None:
        raise DataError(
            f"pictures are given apart only for .json and .jsonl files: got {str(place)!r}"
        )
    if (place / "index.json").is_file():
        from qwenvl_jax.data.sources.prepared import Prepared

        return Prepared(place)
    if (place / "dataset_info.json").is_file():
        from qwenvl_jax.data.sources.tfds_rows import TfdsRows

        return TfdsRows(place)
    raise DataError(
        f"{str(place)!r} cannot be opened as training data: got a "
        f"{'folder without index.json or dataset_info.json' if place.is_dir() else 'file'}, "
        "expected a .json or .jsonl file, a prepared folder or a TFDS folder; 'qwenvl data prepare'"
        " turns other formats into a prepared folder"
    )
