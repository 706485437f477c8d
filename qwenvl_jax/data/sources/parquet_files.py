"""Parquet files with pictures inside, as img2dataset writes them (LAION, COYO, GRIT)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.pairs import COLUMNS, rows_of
from qwenvl_jax.data.sources.stream import Refusal, files_fingerprint, find_files

ENDINGS = (".parquet",)
_PICTURES = ("jpg", "png", "webp", "image")
_BATCH = 64  # rows in memory at a time, besides the compressed row group


class ParquetFiles:
    """A file or a folder of parquet files as a Stream.

    A picture is bytes in a column `jpg`, `png`, `webp` or `image` (or a struct with `bytes`). Only
    the columns that `pairs.py` knows are read.
    """

    def __init__(self, path: str | Path):
        """Raises: DataError where there is no parquet file."""
        self.path = Path(path)
        self.root = self.path.parent if self.path.is_file() else self.path
        find_files(self.path, ENDINGS)

    @property
    def fingerprint(self) -> str:
        return files_fingerprint(find_files(self.path, ENDINGS), self.root, kind="parquet")

    def shards(self) -> list[str]:
        return [p.relative_to(self.root).as_posix() for p in find_files(self.path, ENDINGS)]

    def read(self, shard: str) -> Iterator[Record | DataError]:
        """Yields rows and refusals. Raises: DataError for files of addresses without pictures."""
        path, number = self.root / shard, 0
        with path.open("rb") as file:  # so that a missing file is not taken for a damaged one
            try:
                table = pyarrow.parquet.ParquetFile(file)
                names = table.schema_arrow.names
                picture = next((name for name in _PICTURES if name in names), None)
                if picture is None:
                    raise DataError(
                        f"{path} holds no pictures: got the columns {', '.join(names)}, expected "
                        "one of jpg, png, webp, image; download them with img2dataset first"
                    )
                wanted = [picture, *(name for name in COLUMNS if name in names)]
                for batch in table.iter_batches(_BATCH, columns=wanted, use_threads=False):
                    for columns in batch.to_pylist():
                        key = f"{shard}/{columns.get('key') or number}"
                        number += 1
                        try:
                            yield from rows_of(key, _bytes(columns.pop(picture)), columns)
                        except Refusal as refusal:
                            yield refusal
            except (pyarrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk, not the data; Arrow's own have no number
                told = f"the file is cut or damaged behind row {number}: {error}; download it again"
                yield Refusal(shard, "damaged shard", told)


def _bytes(picture: Any) -> bytes | None:
    return picture.get("bytes") if isinstance(picture, dict) else picture
