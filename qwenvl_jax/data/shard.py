"""One shard of a stream to one file of prepared rows: what every process of a preparation does.

Nothing appears under its final name before it is whole, and the shard's facts come last: where they
are, the shard is done. So a process may be killed at any moment, and shards may be written in any
order by processes or by a cluster that know nothing of each other.
"""

import array
import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from qwenvl_jax.data.clean import Limits, chain, clean, picture_sizes
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import (
    FIELDS,
    PictureUnreadable,
    Record,
    decode_record,
    encode_record,
)
from qwenvl_jax.data.sources.prepared import FORMAT, ROWS_ENDING, sizes_name
from qwenvl_jax.data.sources.stream import Refusal, Stream
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.files import appearing
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer

PARTS = "parts"  # the folder of finished shards' facts, gone when the index is written
# A group of one row is a chunk of its own, which random access and damage to single rows need.
# Pictures do not compress further, so the cheapest level that still shrinks text.
_WRITER_OPTIONS = "group_size:1,zstd:1"
_TASKS = list(FIELDS)


class PrepareError(ValueError):
    """A preparation that cannot go on: what is wrong, and how to go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is prepared and how; picklable, it is all that a process needs to write a shard."""

    stream: Stream
    folder: Path
    rules: tuple[str, ...] = ()
    limits: Limits = dataclasses.field(default_factory=Limits)
    tokenizer: Path | None = None

    def facts(self) -> dict[str, Any]:
        """Returns all that the prepared rows depend on, as JSON; equal facts, equal files."""
        vocabulary = _tokenizer(self.tokenizer)
        shards = self.stream.shards()
        limits = {name: _as_json(value) for name, value in dataclasses.asdict(self.limits).items()}
        return {
            "format": FORMAT,
            "source": self.stream.fingerprint,
            "pictures": _folder_of_pictures(self.stream),
            "shards": len(shards),
            "cut": hashlib.sha256("\n".join(shards).encode()).hexdigest(),
            "rules": [rule.__name__ for rule in chain(self.rules)],
            "limits": limits if self.rules else {},
            "tokenizer": None if vocabulary is None else vocabulary.fingerprint,
        }


def _folder_of_pictures(stream: Stream) -> str | None:
    """Returns a digest of the folder that a stream's pictures lie in; None for one that has none.

    No fingerprint has it, since data may move; but rows of one folder have one folder's pictures.
    """
    pictures = getattr(stream, "pictures", None)
    if pictures is None:
        return None
    return hashlib.sha256(str(Path(pictures).resolve()).encode()).hexdigest()[:16]


def write_shard(plan: Plan, shard: str, number: int, num_shards: int) -> dict[str, Any]:
    """Returns the facts of a shard, after writing it; where it is done already, those on disk.

    The facts: file, rows, bytes, sha256, pictures, tokens, tasks, refused by reason, changed by
    rule, and how many rows were read.

    Raises: PrepareError where the file cannot be written; OSError where the source cannot be read.
    """
    facts_path = plan.folder / PARTS / f"{number:05d}.json"
    if facts_path.exists():
        return json.loads(facts_path.read_text(encoding="utf-8"))
    name = f"rows-{number:05d}-of-{num_shards:05d}{ROWS_ENDING}"
    sizes = _Sizes()
    counts = {kind: collections.Counter() for kind in ("tasks", "refused", "changed")}
    with (
        appearing_file(plan.folder / PARTS / f"{number:05d}.refused.jsonl") as refused,
        _array_record(plan.folder / name) as rows,
    ):
        for row in plan.stream.read(shard):
            try:
                stored = _stored(plan, row)
            except Refusal as refusal:
                counts["refused"][refusal.reason] += 1
                line = {"key": refusal.key, "reason": refusal.reason, "detail": refusal.detail}
                refused.write(json.dumps(line).encode() + b"\n")
                continue
            rows.write(stored.data)
            sizes.add(stored)
            counts["tasks"][stored.task] += 1
            counts["changed"].update(stored.changed)
        rows.num_rows = len(sizes.bytes)
    with appearing_file(plan.folder / sizes_name(name)) as file:
        arrays = sizes.arrays(has_tokens=plan.tokenizer is not None)
        np.savez(file, allow_pickle=False, **arrays)
    with (plan.folder / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {
        "file": name,
        "rows": len(sizes.bytes),
        "bytes": (plan.folder / name).stat().st_size,
        "sha256": digest,
        "pictures": sum(sizes.pictures),
        "tokens": sum(sizes.tokens) if plan.tokenizer is not None else None,
        "read": len(sizes.bytes) + counts["refused"].total(),
        **{kind: dict(sorted(counter.items())) for kind, counter in counts.items()},
    }
    with appearing_file(facts_path) as file:
        file.write(json.dumps(facts, indent=1).encode())
    return facts


class _Sizes:
    """Lengths of the rows of a shard, four bytes each."""

    def __init__(self) -> None:
        self.tokens, self.pictures = array.array("i"), array.array("i")
        self.bytes, self.width_height = array.array("i"), array.array("i")
        self.tasks = array.array("B")

    def add(self, stored: "_Stored") -> None:
        self.tokens.append(stored.num_tokens)
        self.pictures.append(len(stored.pictures))
        self.bytes.append(len(stored.data))
        self.tasks.append(_TASKS.index(stored.task))
        for size in stored.pictures:
            self.width_height.extend(size)

    def arrays(self, has_tokens: bool) -> dict[str, np.ndarray]:
        arrays = {
            "pictures": np.array(self.pictures, np.int32),
            "bytes": np.array(self.bytes, np.int32),
            "tasks": np.array(self.tasks, np.uint8),
            "task_names": np.array(_TASKS),
            "width_height": np.array(self.width_height, np.int32).reshape(-1, 2),
        }
        return arrays | ({"tokens": np.array(self.tokens, np.int32)} if has_tokens else {})


class _Stored(NamedTuple):
    data: bytes
    task: str
    num_tokens: int  # picture slots not counted
    pictures: list[tuple[int, int]]  # width, height
    changed: list[str]  # names of rules


def _stored(plan: Plan, row: Record | DataError) -> _Stored:
    """Returns a cleaned row as it will be stored, with its sizes. Raises: Refusal."""
    if isinstance(row, DataError):
        raise row if isinstance(row, Refusal) else Refusal("?", "unreadable row", str(row))
    try:
        # cleaning looks at pictures, so files that rows only name are read first
        row = decode_record(encode_record(row), row.key)
        row, changed = clean(row, chain(plan.rules), plan.limits)
        row = row._replace(fields={n: v for n, v in row.fields.items() if n != "texts"})
        vocabulary = _tokenizer(plan.tokenizer)
        num_tokens = 0 if vocabulary is None else num_text_tokens(row, vocabulary)
        return _Stored(encode_record(row), row.task, num_tokens, picture_sizes(row), changed)
    except Refusal:
        raise
    except PictureUnreadable as error:
        raise Refusal(row.key, "picture", str(error)) from error
    except DataError as error:
        raise Refusal(row.key, "does not fit its task", str(error)) from error


def num_text_tokens(row: Record, vocabulary: Tokenizer) -> int:
    """Returns the ids of a row's sample without the slots, so each picture counts as two."""
    return len(example_of(row, vocabulary).ids) - vocabulary.slots * len(row.images)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path | None) -> Tokenizer | None:
    return None if folder is None else load_tokenizer(folder, slots=1)


# --- files that are whole or not there ----------------------------------------------------------


@contextlib.contextmanager
def appearing_file(path: Path) -> Iterator[IO[bytes]]:
    """Yields a file that gets its name when the block ends well, and is on disk by then."""
    with appearing(path, durable=True) as beside, beside.open("wb") as file:
        yield file


class _RowWriter:
    """`write` takes a row's bytes; `num_rows`, set at the end, is how many there should be."""

    def __init__(self, write: Callable[[bytes], Any]):
        self.write = write
        self.num_rows = 0


@contextlib.contextmanager
def _array_record(path: Path) -> Iterator[_RowWriter]:
    """Yields a writer of rows, as `appearing_file`; its file has been opened again and counted."""
    try:
        with appearing(path, durable=True) as beside:
            writer = ArrayRecordWriter(str(beside), _WRITER_OPTIONS)
            try:
                rows = _RowWriter(writer.write)
                yield rows
            finally:
                writer.close()
            reader = ArrayRecordReader(str(beside))
            num_rows = reader.num_records()
            reader.close()
            if num_rows != rows.num_rows:
                raise RuntimeError(f"got {num_rows} rows back, expected {rows.num_rows}")
    except RuntimeError as error:  # what ArrayRecord raises when the disk is full, among others
        raise PrepareError(
            f"{path} cannot be written: {error}; make room, and run the same command to go on"
        ) from error


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
