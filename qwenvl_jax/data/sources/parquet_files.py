"""Parquet files with pictures inside, as img2dataset writes them (LAION, COYO, GRIT)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.pairs import COLUMNS, rows_of
from qwenvl_jax.data.sources.stream import FoundFiles, Refusal

ENDINGS = (".parquet",)
_PICTURES = ("jpg", "png", "webp", "image")
_BATCH = 64  # rows in memory at a time
_BUFFER = 2**20  # bytes; without it, or with its pre-buffering, Arrow holds a whole row group


class ParquetFiles:
    """A file or a folder of parquet files as a Stream.

    A picture is bytes in a column `jpg`, `png`, `webp` or `image` (or a struct with `bytes`). Only
    the columns that `pairs.py` knows are read.
    """

    def __init__(self, path: str | Path):
        """Raises: DataError where there is no parquet file."""
        self.files = FoundFiles(Path(path), ENDINGS)

    @property
    def fingerprint(self) -> str:
        return self.files.fingerprint(kind="parquet")

    def shards(self) -> list[str]:
        return self.files.names()

    def read(self, shard: str) -> Iterator[Record | DataError]:
        """Yields rows and refusals. Raises: DataError for files of addresses without pictures."""
        path, number = self.files.root / shard, 0
        with path.open("rb") as file:  # so that a missing file is not taken for a damaged one
            try:
                table = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
                names = table.schema_arrow.names
                picture = next((name for name in _PICTURES if name in names), None)
                if picture is None:
                    raise _no_pictures(path, f"got the columns {', '.join(names)}")
                kind = table.schema_arrow.field(picture).type
                if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
                    raise _no_pictures(path, f"its column {picture} holds text")
                wanted = [picture, *(name for name in COLUMNS if name in names)]
                for batch in table.iter_batches(_BATCH, columns=wanted, use_threads=False):
                    for place in range(batch.num_rows):
                        key, number = f"{shard}/{number}", number + 1
                        try:
                            (columns,) = batch.slice(place, 1).to_pylist()
                            key = f"{shard}/{columns['key']}" if columns.get("key") else key
                            yield from rows_of(key, _bytes(columns.pop(picture)), columns)
                        except Refusal as refusal:
                            yield refusal
                        except UnicodeDecodeError as error:
                            yield Refusal(key, "not UTF-8", f"a text of it is not UTF-8: {error}")
            except (pyarrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk, not the data; Arrow's own have no number
                told = f"the file is cut or damaged behind row {number}: {error}; download it again"
                yield Refusal(shard, "damaged shard", told)


def _no_pictures(path: Path, got: str) -> DataError:
    return DataError(
        f"{path} holds no pictures: {got}, expected the bytes of files in one of jpg, png, webp, "
        "image; download them with img2dataset first"
    )


def _bytes(picture: Any) -> bytes | None:
    return picture.get("bytes") if isinstance(picture, dict) else picture
