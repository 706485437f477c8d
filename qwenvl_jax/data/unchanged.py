"""Whether a run that goes on has the data it began with: else later steps hold other samples."""

import json
from pathlib import Path

from qwenvl_jax.config import ConfigError
from qwenvl_jax.data.holes import QUARANTINE
from qwenvl_jax.data.rows import OpenRows, digest_of_unusable
from qwenvl_jax.files import replace_text

_WAYS_OUT = (
    "give back the old data, choose another run_dir, or say that you mean it with "
    "--allow-change data"
)


def check_unchanged(
    folder: Path, now: str, first_step: int, process: int = 0, may_change: bool = False
) -> None:
    """Keeps the fingerprint of a run's data in `folder`, and compares it when the run goes on.

    Raises: ConfigError where the data, the vocabulary or the plan are not those of before, unless
    they `may_change`.
    """
    before = _noted(folder) if first_step else {}
    if before.get("fingerprint", now) != now and not may_change:
        raise ConfigError(
            f"the data are not those that {folder} was trained with: got fingerprint "
            f"{now[:16]}, expected {before['fingerprint'][:16]}; another row, order, vocabulary or "
            f"packing limit gives later steps other samples: {_WAYS_OUT}"
        )
    _note(folder, before, {"fingerprint": now}, process)


def check_as_usable(
    folder: Path, opened: OpenRows, first_step: int, process: int = 0, may_change: bool = False
) -> None:
    """As `check_unchanged`, for which rows can be used: a file that was mended, or damaged since.

    Raises: ConfigError where they are others, unless they `may_change`.
    """
    before, now = _noted(folder), digest_of_unusable(opened)
    if first_step and before.get("unusable", now) != now and not may_change:
        num = sum(map(len, opened.unusable.values()))
        raise ConfigError(
            f"the rows that cannot be used are not those of when {folder} began: got {num} now, "
            f"expected those that its {QUARANTINE} lists for step 0; later steps would hold other "
            f"samples: {_WAYS_OUT}"
        )
    _note(folder, before, {"unusable": now}, process)


def _noted(folder: Path) -> dict[str, str]:
    file = folder / "data.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _note(folder: Path, before: dict[str, str], now: dict[str, str], process: int) -> None:
    if process or before | now == before:
        return
    replace_text(folder / "data.json", json.dumps(before | now) + "\n")
