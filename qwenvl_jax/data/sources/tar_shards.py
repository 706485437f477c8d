"""WebDataset tar shards: neighbours of one name, up to its first dot, are one picture's files."""

import itertools
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.pairs import rows_of
from qwenvl_jax.data.sources.stream import FoundFiles, Refusal
from qwenvl_jax.image.load import MAX_BYTES

ENDINGS = (".tar", ".tar.gz", ".tgz")
_PICTURES = ("jpg", "jpeg", "png", "webp")


class TarShards:
    """A file or a folder of tar shards as a Stream; only one picture is in memory at a time.

    A member `name.jpg` (or png, webp) goes with `name.txt`, its text, and `name.json`, its columns
    as img2dataset writes them.
    """

    def __init__(self, path: str | Path):
        """Raises: DataError where there is no tar file."""
        self.files = FoundFiles(Path(path), ENDINGS)

    @property
    def fingerprint(self) -> str:
        return self.files.fingerprint(kind="tar")

    def shards(self) -> list[str]:
        return self.files.names()

    def read(self, shard: str) -> Iterator[Record | DataError]:
        with (self.files.root / shard).open("rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar:
                    files = (member for member in tar if member.isfile())
                    for name, members in itertools.groupby(files, key=_name):
                        try:
                            image, columns = _sample(f"{shard}/{name}", tar, members)
                            yield from rows_of(f"{shard}/{name}", image, columns)
                        except Refusal as refusal:
                            yield refusal
            except (tarfile.TarError, EOFError, zlib.error) as error:
                told = f"the shard ends here, cut or damaged: {error}; download it again"
                yield Refusal(shard, "damaged shard", told)


class _Member(tarfile.TarInfo):
    """Tells a broken header, and a file that just ends, from the mark at the end of an archive.

    Behind the first member tarfile takes all of them for the end.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):  # the mark
                raise
            raise tarfile.ReadError(str(error)) from error


def _name(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.split(".", 1)[0]


def _sample(
    key: str, tar: tarfile.TarFile, members: Iterator[tarfile.TarInfo]
) -> tuple[bytes | None, dict[str, Any]]:
    """Returns the picture and the columns of a group. Raises: Refusal for a broken member."""
    image: bytes | None = None
    columns: dict[str, Any] = {}
    for member in members:
        kind = member.name.rpartition("/")[2].partition(".")[2].lower()
        file = tar.extractfile(member)
        if file is None or kind not in (*_PICTURES, "txt", "json"):
            continue
        if member.size > MAX_BYTES:
            raise Refusal(key, "broken member", f"its .{kind} has {member.size} bytes")
        data = file.read()
        try:
            if kind in _PICTURES:
                image = data
            elif kind == "txt":
                columns["caption"] = data.decode()
            else:
                columns = dict(json.loads(data)) | columns
        except (ValueError, TypeError, RecursionError) as error:
            raise Refusal(key, "broken member", f"its .{kind} cannot be read: {error}") from error
    return image, columns
