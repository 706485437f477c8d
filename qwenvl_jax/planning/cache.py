"""Compiled programs of earlier calls, on the disk: a compilation takes minutes.

Kept is what the compiler said, its text above all, under a digest of what it was given. A plan is
read from the text each time, so a better reading needs no compilation; and whatever changes in the
source without changing the program finds its program again.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

from qwenvl_jax.files import appearing
from qwenvl_jax.planning.pods import GB

_FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
_LOCATION = re.compile(r"\s*(?:loc\([^\n]*\)|#loc[^\n]*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TooLarge:
    """The compiler's answer that a program does not fit."""

    needed: int | None  # bytes, where it says so
    capacity: int | None
    largest: tuple[str, ...]  # its list of the largest arrays: size, shape, where they come from
    space: str = "hbm"  # or a small memory of each core, as "vmem"

    def __str__(self) -> str:
        if self.space != "hbm" and self.needed and self.capacity:
            # What the compiler itself places there: nothing of the model is too large.
            return (
                f"the compiler found no room for its own buffers: needs {self.needed / 2**20:.1f} "
                f"of {self.capacity / 2**20:.1f} MiB of a core's {self.space}; another number of "
                f"micro-batches or a smaller model.attention_block can help"
            )
        size = f"needs {self.needed / GB:.1f} GB" if self.needed else "does not fit"
        room = f" of {self.capacity / GB:.1f} GB" if self.capacity else ""
        return f"{size}{room} a chip; largest: {'; '.join(self.largest[:3])}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of one chip by the compiler's own analysis."""

    arguments: int
    results: int
    shared: int  # of the results, that take the place of arguments
    temporaries: int
    code: int
    peak: int | None = None  # alive at once at most; not known of programs kept by older versions

    @property
    def total(self) -> int:
        """The peak, or where it is not known the sum, which can count memory twice."""
        summed = self.arguments + self.temporaries + self.results - self.shared
        return (self.peak or summed) + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """What the compiler made of one program: a text and its sizes, or a refusal."""

    text: str | None
    sizes: Sizes | None
    too_large: TooLarge | None
    seconds: float  # by the clock, for tracing and compiling
    host_bytes: int  # of the compiling process at its largest
    cpu_seconds: float | None = None  # of all its threads, where it was kept


class ProgramCache:
    """Finished compilations in a folder, one file each."""

    def __init__(self, folder: Path):
        self._folder = folder

    def read(self, digest: str) -> CompiledProgram | None:
        """Returns the program of that digest, or None if it is not there or cannot be read."""
        try:
            row = json.loads(gzip.decompress(self._path(digest).read_bytes()))
            return _from_dict(row)
        except FileNotFoundError:
            return None
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
            # A damaged file costs a compilation, which writes it again; never a wrong plan.
            return None

    def write(self, digest: str, program: CompiledProgram) -> None:
        """Keeps a program; where that fails, a line on stderr says so, and the plan goes on."""
        path = self._path(digest)
        content = json.dumps(dataclasses.asdict(program)).encode()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with appearing(path) as beside:
                beside.write_bytes(gzip.compress(content, compresslevel=6))
        except OSError as error:
            print(
                f"the compiled program was not kept in {self._folder}: {error.strerror}; name "
                "another folder with --cache",
                file=sys.stderr,
            )

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.json.gz"


def program_digest(lowered_text: str, *parts: str) -> str:
    """Returns a digest of a lowered program and of what else decides what the compiler makes of it.

    Versions of the compiler are among it, and its options in the environment; places in the source
    are not. `parts`: pod, options.
    """
    digest = hashlib.sha256(_LOCATION.sub("", lowered_text).encode())
    versions = [metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    given = [f"{name}={os.environ[name]}" for name in _FLAGS if os.environ.get(name)]
    for part in (*parts, *versions, *given):
        digest.update(f"\0{part}".encode())
    return digest.hexdigest()[:24]


def _from_dict(row: dict[str, Any]) -> CompiledProgram:
    row["sizes"] = Sizes(**row["sizes"]) if row["sizes"] else None
    if row["too_large"]:
        refusal = row["too_large"]
        row["too_large"] = TooLarge(**refusal | {"largest": tuple(refusal["largest"])})
    return CompiledProgram(**row)
