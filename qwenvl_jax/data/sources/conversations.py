"""The original fine-tuning files: a JSON list of dialogues, or the same rows one a line.

    [{"id": "identity_0", "conversations": [
        {"from": "user", "value": "Picture 1: <img>dog.jpg</img>\\nWhat is it?"},
        {"from": "assistant", "value": "A <ref>dog</ref><box>(10,20),(300,400)</box>"}]}, ...]

A file opens without its rows being parsed; a row is read from the disk each time it is asked for.
"""

import os
import re
import weakref
from pathlib import Path
from typing import Any

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.json_rows import MAX_ROW_BYTES, RowTable, find_rows, parse_row
from qwenvl_jax.data.turns import picture_paths
from qwenvl_jax.prompt.chat import ChatError
from qwenvl_jax.prompt.vocabulary import TokenizerError

_ADDRESS_CHARACTERS = 20  # within which an address shows its ://
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Conversations:
    """Chat rows of one file, in its order; a `Source`. Safe to share between threads, to fork and
    to pickle.

    Pictures are paths: as written in the text where absolute, else under `pictures`, the file's own
    folder where it is not given. They are not opened here. A row's `id` only names it, so rows may
    lack one or share one; a `system` text replaces the released one. A row whose pictures training
    would not see (in an answer before the first question, which is dropped, or named by the key
    `image` alone) is an error of its own.

    `fingerprint` is a digest of the file's bytes and its rows' places; pictures are not part of it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        pictures: str | os.PathLike[str] | None = None,
        rows: RowTable | None = None,
    ):
        """`rows` are those of `find_rows` where the caller has them, also of a damaged file.

        Raises: DataError where the file as a whole is no list of rows, or there is no such folder
        of pictures; OSError where the file cannot be read.
        """
        self.path = Path(path)
        self.pictures = self.path.parent if pictures is None else Path(pictures)
        if pictures is not None and not self.pictures.is_dir():
            raise DataError(f"no folder of pictures at {str(pictures)!r}; check the path")
        if rows is None:
            rows = find_rows(self.path)
            if rows.damage is not None:
                raise DataError(f"{self.path} {rows.damage}")
        self.rows = rows
        self._file: int | None = None

    @property
    def fingerprint(self) -> str:
        return f"conversations-{self.rows.digest}"

    def __len__(self) -> int:
        return len(self.rows.starts)

    def __getitem__(self, index: int) -> Record:
        row = self.row(index)
        key = self.key(index, row)
        conversations = row.get("conversations")
        if not isinstance(conversations, list) or not all(
            isinstance(turn, dict) for turn in conversations
        ):
            raise DataError(
                f"row {key} has no dialogue: got keys {', '.join(map(repr, row)) or 'none'}, "
                'expected "conversations": [{"from": ..., "value": ...}, ...]'
            )
        for i, turn in enumerate(conversations):
            if not {"from", "value"} <= turn.keys():
                raise DataError(
                    f'row {key}: turn {i} must be {{"from": "user" or "assistant", "value": text}}:'
                    f" got keys {', '.join(map(repr, turn)) or 'none'}"
                )
        turns = [{name: turn[name] for name in ("from", "value")} for turn in conversations]
        fields: dict[str, Any] = {"conversations": turns}
        if "system" in row:
            if not isinstance(row["system"], str):
                raise DataError(f"row {key} has a system that is no text: got {row['system']!r}")
            fields["system"] = row["system"]
        try:
            paths = picture_paths(turns)
        except (ChatError, TokenizerError) as error:
            raise DataError(f"row {key}: {error}") from error
        if row.get("image") and not paths:
            raise DataError(
                f"row {key} names its pictures by the key 'image', which is not read: got "
                f"{str(row['image'])[:80]!r}, expected 'Picture 1: <img>path</img>' in the text; "
                "docs/data.md has a few lines that convert the format of LLaVA"
            )
        return Record(key, "chat", fields, tuple(self.picture(path, key) for path in paths))

    def row(self, index: int) -> dict[str, Any]:
        """Returns a row as it stands in the file; lone surrogates in its texts read U+FFFD.

        Raises: DataError where it is not a JSON object, IndexError past the end.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.path.name} is asked for: it has {len(self)}")
        data = self._read(index)
        try:
            row = parse_row(data)
        except ValueError as error:
            raise DataError(f"row {self.key(index)} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(
                f"row {self.key(index)} is no object: got {type(row).__name__}, expected "
                '{"id": ..., "conversations": [...]}'
            )
        return _whole_characters(row) if _SURROGATE.search(data) else row

    def key(self, index: int, row: dict[str, Any] | None = None) -> str:
        """Returns how errors name a row, as `my.json[12] (line 40, id 'identity_12')`."""
        name = "" if row is None or "id" not in row else f", id {str(row['id'])[:80]!r}"
        return f"{self.path.name}[{index}] (line {self.rows.lines[index]}{name})"

    def picture(self, path: str, key: str) -> Path:
        """Returns where a picture of row `key` is, as a path that may not exist.

        Raises: DataError for an address: nothing is fetched.
        """
        if is_address(path):
            raise DataError(
                f"row {key} has a picture that is no file: got {path[:80]!r}, and addresses are "
                "never fetched in training; download it and write its path"
            )
        if not path.strip() or "\0" in path:
            raise DataError(
                f"row {key} has a picture without a path: got {path!r} inside <img></img>"
            )
        return self.pictures / path

    def _read(self, index: int) -> bytes:
        start, end = int(self.rows.starts[index]), int(self.rows.ends[index])
        if end - start > MAX_ROW_BYTES:
            raise DataError(
                f"row {self.key(index)} is too long: got {end - start} bytes, expected at most "
                f"{MAX_ROW_BYTES}"
            )
        if self._file is None:
            self._file = self._opened()
        # with the place given, threads and forks share one file without a lock
        return os.pread(self._file, end - start, start)

    def _opened(self) -> int:
        file = os.open(self.path, os.O_RDONLY)
        num_bytes = os.fstat(file).st_size
        if num_bytes != self.rows.num_bytes:
            os.close(file)
            raise DataError(
                f"{self.path} has changed since it was opened: got {num_bytes} bytes, expected "
                f"{self.rows.num_bytes}; open it again"
            )
        weakref.finalize(self, os.close, file)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def is_address(path: str) -> bool:
    """Returns whether what stands inside `<img>` is an address, or the picture itself."""
    return "://" in path[:_ADDRESS_CHARACTERS] or path.startswith("data:")


def _whole_characters(value: Any) -> Any:
    """Returns JSON data whose texts can be encoded: half a surrogate pair reads U+FFFD.

    The tokenizer reads them so too; msgpack and terminals would fail instead.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(item) for key, item in value.items()}
    return value
