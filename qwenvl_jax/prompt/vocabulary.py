"""Reading a `.tiktoken` vocabulary file: one line a token, its bytes in base64 and its rank."""

import base64
import binascii
from pathlib import Path


class TokenizerError(ValueError):
    """A vocabulary or a text that cannot be used: what is wrong, got, expected."""


def find_vocabulary(path: Path) -> Path:
    """Returns the file itself, or the one that a folder holds (`qwen.tiktoken` before others).

    Raises: TokenizerError where there is none, or more than one of other names.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise TokenizerError(
            f"no vocabulary at {path}: expected a qwen.tiktoken file or a folder that holds one"
        )
    found = sorted(path.glob("*.tiktoken"))
    named = [file for file in found if file.name == "qwen.tiktoken"]
    if len(named or found) != 1:
        raise TokenizerError(
            f"expected one qwen.tiktoken in {path}: got {[f.name for f in found] or 'none'}; "
            "copy the vocabulary file of the checkpoint into that folder"
        )
    return (named or found)[0]


def vocabulary_in(folder: Path) -> Path | None:
    """Returns the vocabulary of a folder, or None where it has none, or several of other names."""
    try:
        return find_vocabulary(folder)
    except TokenizerError:
        return None


def read_ranks(file: Path) -> dict[bytes, int]:
    """Returns bytes -> rank of a file of lines `base64 rank`; ranks must be 0..R-1, each once."""
    ranks: dict[bytes, int] = {}
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    token, rank = _read_line(line, f"{file} line {number}")
                    ranks[token] = rank
    except OSError as error:
        raise TokenizerError(f"cannot read the vocabulary {file}: {error}") from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))) or b"" in ranks:
        raise TokenizerError(
            f"{file} is not a whole vocabulary: got {len(ranks)} different byte strings, "
            f"ranks up to {max(ranks.values(), default=None)}; expected each rank from 0 "
            "once; copy the file again"
        )
    return ranks


def _read_line(line: bytes, where: str) -> tuple[bytes, int]:
    try:
        token, rank = line.split()
        return base64.b64decode(token, validate=True), int(rank)
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(
            f"{where} is not a vocabulary line: got {line[:60]!r}, expected base64 bytes, a space "
            "and a rank; the file is damaged or is something else"
        ) from error
