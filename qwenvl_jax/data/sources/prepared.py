"""Prepared rows: a folder of ArrayRecord files with an index, read in any order.

    index.json                 counts, the name, length and digest of each file, how it was made
    rows-N-of-M.array_record   rows as `encode_record` writes them, each in a chunk of its own
    rows-N-of-M.sizes.npz      task, tokens, pictures, bytes of rows; width, height of pictures
    refused.jsonl              rows left out: key, reason, detail

ArrayRecord notices damage inside a chunk, so one flipped bit costs one row; a file that is cut
cannot be opened at all, so lengths are compared with the index before anything is read.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import FIELDS, Record, decode_record
from qwenvl_jax.prompt.tokenizer import Tokenizer
from qwenvl_jax.words import counted

FORMAT = 1
INDEX = "index.json"
REFUSED = "refused.jsonl"
ROWS_ENDING = ".array_record"
SIZES_ENDING = ".sizes.npz"
MAX_NAMED = 5  # files named in one message


@dataclasses.dataclass
class _Rows:
    """Which rows of a file are read; the names are those that ArrayRecord's source asks for."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Prepared:
    """A folder of prepared rows as a Source; opening looks at the index and at file sizes only.

    Picklable, so that grain's workers can have it; files are opened when a row of theirs is read.
    """

    def __init__(self, folder: str | Path):
        """Raises: DataError where files are missing, cut, or no part of the index."""
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        shards = self.index["shards"]
        check_files(self.folder, shards)
        self._starts = [0, *itertools.accumulate(shard["rows"] for shard in shards)]
        self._rows = ArrayRecordDataSource(
            [
                _Rows(str(self.folder / shard["file"]), 0, shard["rows"], shard["rows"])
                for shard in shards
            ]
        )

    @property
    def fingerprint(self) -> str:
        """Digest of the digests of all files, so equal rows have an equal one wherever they lie."""
        digests = "".join(shard["sha256"] for shard in self.index["shards"])
        return hashlib.sha256(digests.encode()).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        """Returns a row. Raises: DataError for a damaged one, IndexError past the end."""
        if not 0 <= index < len(self):
            held = counted(len(self), "row")
            raise IndexError(f"row {index} is not there: {self.folder} has {held}")
        shard = bisect.bisect_right(self._starts, index) - 1
        name = f"{self.index['shards'][shard]['file']}#{index - self._starts[shard]}"
        try:
            data = self._rows[index]
        except (RuntimeError, ValueError, IndexError) as error:  # what its reader raises on damage
            raise DataError(
                f"row {name} of {self.folder} cannot be read: {error}; copy or prepare the file "
                "again"
            ) from error
        return decode_record(data, name)

    def sizes(self, tokenizer: Tokenizer) -> np.ndarray | None:
        """Returns int32 [N, 2]: text tokens, with two for each picture, and pictures of each row.

        None where the rows were prepared for another vocabulary or for none.
        """
        if self.index["tokenizer"] != tokenizer.fingerprint:
            return None
        parts = [
            np.stack([arrays["tokens"], arrays["pictures"]], axis=1) for arrays in self._arrays()
        ]
        return np.concatenate(parts)

    def tasks(self) -> np.ndarray:
        """Returns uint8 [N]: the place of each row's task among those of `record.FIELDS`."""
        order = list(FIELDS)
        parts = []
        for arrays in self._arrays():
            places = [order.index(name) for name in arrays["task_names"].tolist()]
            parts.append(np.array(places, np.uint8)[arrays["tasks"]])
        return np.concatenate(parts)

    def picture_sizes(self) -> np.ndarray:
        """Returns int32 [P, 2]: width and height of all pictures, row after row."""
        return np.concatenate([arrays["width_height"] for arrays in self._arrays()])

    def row_bytes(self) -> np.ndarray:
        """Returns int32 [N]: the length of each stored row."""
        return np.concatenate([arrays["bytes"] for arrays in self._arrays()])

    def _arrays(self) -> Iterator[dict[str, np.ndarray]]:
        for shard in self.index["shards"]:
            yield read_sizes(self.folder, shard)


def read_index(folder: Path) -> dict[str, Any]:
    """Returns the index of a folder.

    Raises: DataError where there is none, or it is not one that this version reads.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["format"]
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} is not a folder of prepared rows: it has no {INDEX}; let 'qwenvl data "
            "prepare' finish, or check the path"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read: {error!r}; expected what 'qwenvl data prepare' writes, so "
            "prepare the rows again"
        ) from error
    if version != FORMAT:
        raise DataError(
            f"{path} has another format: got {version!r}, expected {FORMAT}; prepare the rows "
            "again with this version"
        )
    return index


def check_files(folder: Path, shards: list[Mapping[str, Any]]) -> None:
    """Raises DataError that names files that are missing, of another length, or too many."""
    found = {path.name: path.stat().st_size for path in folder.iterdir()}
    expected = {shard["file"]: shard["bytes"] for shard in shards}
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [
        f"{name} has {found[name]} bytes, expected {size}"
        for name, size in expected.items()
        if name in found and found[name] != size
    ]
    extra = [name for name in sorted(found) if name.endswith(ROWS_ENDING) and name not in expected]
    faults += [f"{name} is not in {INDEX}" for name in extra]
    sidecars = map(sizes_name, expected)
    faults += [f"{name} is missing" for name in sidecars if name not in found]
    if faults:
        more = f" and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
        raise DataError(
            f"{folder} is not as its index says: {', '.join(faults[:MAX_NAMED])}{more}; copy the "
            "folder again, or prepare it again"
        )


def sizes_name(rows_name: str) -> str:
    return rows_name.removesuffix(ROWS_ENDING) + SIZES_ENDING


def read_sizes(folder: Path, shard: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns `tokens` (where a vocabulary was given), `pictures`, `bytes`, `tasks` with
    `task_names`, and `width_height`.

    Raises: DataError where the file is damaged or belongs to other rows.
    """
    path = folder / sizes_name(shard["file"])
    try:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        num_rows, num_pictures = len(arrays["pictures"]), int(arrays["pictures"].sum())
        is_whole = num_rows == shard["rows"] and len(arrays["width_height"]) == num_pictures
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged: {error}; prepare the rows again") from error
    if not is_whole:
        raise DataError(
            f"{path} belongs to other rows: got {counted(num_rows, 'row')}, expected "
            f"{shard['rows']}; prepare the rows again"
        )
    return arrays
