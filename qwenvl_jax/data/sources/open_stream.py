"""One path to its stream: what lies there says how it is read."""

import codecs
import json
from pathlib import Path

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.sources import parquet_files, pdf, tar_shards, text_files
from qwenvl_jax.data.sources.eval_files import ROW_KEYS, EvalFile
from qwenvl_jax.data.sources.parquet_files import ParquetFiles
from qwenvl_jax.data.sources.pdf import PdfPages
from qwenvl_jax.data.sources.stream import Stream, files_below
from qwenvl_jax.data.sources.tar_shards import TarShards
from qwenvl_jax.data.sources.text_files import TextFiles

_HEAD = 2**20  # bytes in which the first row of a JSON file should end
_STREAMS = (  # the first that finds a file takes the folder
    (TarShards, tar_shards.ENDINGS),
    (ParquetFiles, parquet_files.ENDINGS),
    (PdfPages, pdf.ENDINGS),
    (TextFiles, text_files.ENDINGS),
)


def open_stream(path: Path, pictures: Path | None = None) -> Stream | None:
    """Returns the stream of tar, parquet, PDF, text or evaluation files; None for all that
    `open_source` opens: conversations, prepared folders, TFDS folders, and what is not there.

    Raises: DataError for a folder with none of these, and where `pictures` is given and the stream
    has its pictures inside.
    """
    if path.is_file() and path.suffix.lower() in (".json", ".jsonl"):
        kind = _json_kind(path)
        if kind == "eval":
            return EvalFile(path, pictures)
        if kind != "text":
            return None
    elif (path / "index.json").exists() or (path / "dataset_info.json").exists():
        return None
    for stream, endings in _STREAMS:
        files = [path] if path.is_file() else files_below(path)
        if any(file.name.lower().endswith(endings) for file in files):
            if pictures is not None:
                raise DataError(
                    "pictures are given apart only for .json and .jsonl files: got "
                    f"{str(pictures)!r} for {str(path)!r}"
                )
            return stream(path)
    if path.is_dir():
        raise DataError(
            f"{str(path)!r} holds nothing that can be prepared: expected .tar, .parquet, .txt or "
            ".jsonl files, a prepared folder or a TFDS folder; check the path"
        )
    return None


def _json_kind(path: Path) -> str | None:
    """Returns "eval" or "text" by the first row of a JSON file, or None where it is neither."""
    with path.open("rb") as file:
        head = file.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
    if path.suffix.lower() == ".json":
        # a list holds conversations; COCO's captions are one object
        return "eval" if head.startswith(b"{") and b'"images"' in head else None
    try:
        first = json.loads(head.split(b"\n", 1)[0])
    except ValueError:
        return None
    if not isinstance(first, dict) or "conversations" in first:
        return None
    if "image" in first and any(key in first for key in ROW_KEYS):
        return "eval"
    return "text" if "text" in first else None
