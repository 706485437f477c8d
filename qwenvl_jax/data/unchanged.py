"""Whether a run that goes on has the data it began with: else later steps hold other samples."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax.config import ConfigError
from qwenvl_jax.data.holes import QUARANTINE
from qwenvl_jax.data.rows import OpenRows, digest_of_unusable
from qwenvl_jax.files import read_object, replace_text

DATA = "data.json"
DATA_WAYS_OUT = "restore it, or remove it: manifest.json has the same fingerprints"
CONTENT = "data.content"  # what --allow-change calls rows that have changed, of any source


class KeptData:
    """What a run directory says of the run's data, and whether they are still the same.

    `fingerprint` covers all that decides which samples a step holds; `contents` the rows of each
    source alone, so that a setting that may change lets no changed file pass; `unusable` which rows
    cannot be used: a file that was mended, or damaged since.
    """

    def __init__(
        self, folder: Path, first_step: int, process: int = 0, allow_change: Sequence[str] = ()
    ):
        """`allow_change`: names of what may have changed: "data", CONTENT or a setting's."""
        self._folder, self._process = folder, process
        self._allowed = tuple(allow_change)
        known = first_step > 0 and (folder / DATA).exists()
        self._before = read_object(folder / DATA, DATA_WAYS_OUT) if known else {}
        self._now: dict[str, Any] = {}

    def check(self, fingerprint: str, contents: dict[str, str]) -> None:
        """Raises ConfigError where the data, the vocabulary or the plan are others, and may not."""
        self._now = {"fingerprint": fingerprint, "contents": contents}
        old = self._before.get("contents", {})
        changed = [name for name, now in contents.items() if old.get(name, now) != now]
        if changed and not self._may_content_change:
            told = ", ".join(f"{x} (was {old[x]:.16}, now {contents[x]:.16})" for x in changed)
            raise ConfigError(
                f"the data are not those that {self._folder} was trained with: other rows, or in "
                f"another order, in {told}; {self._ways_out(CONTENT)}"
            )
        # An older version noted no contents: then nothing tells them from settings.
        may_change = self._may_content_change or ("contents" in self._before and self._may_differ)
        if not self._has_same_fingerprint and not may_change:
            name = "data" if "contents" in self._before else CONTENT
            raise ConfigError(
                f"the data are not those that {self._folder} was trained with: got fingerprint "
                f"{fingerprint:.16}, expected {self._before['fingerprint']:.16}; another row, "
                f"order, vocabulary or packing limit gives later steps other samples: "
                f"{self._ways_out(name)}"
            )

    def check_usable(self, opened: OpenRows) -> bool:
        """Returns whether other rows cannot be used than at the last start, or this is the first.

        Keeps what is so now, for later starts, once the rows have been looked at.

        Raises: ConfigError where other rows cannot be used, and it is not for other settings.
        """
        self._now["unusable"] = now = digest_of_unusable(opened)
        is_same = self._before.get("unusable", now) == now
        if not is_same and self._has_same_fingerprint and not self._may_content_change:
            num = sum(map(len, opened.unusable.values()))
            raise ConfigError(
                f"the rows that cannot be used are not those of when {self._folder} began: got "
                f"{num} now, expected those that its {QUARANTINE} lists for step 0, or since a "
                f"change; later steps would hold other samples: {self._ways_out(CONTENT)}"
            )
        kept = self._before | self._now
        if not self._process and kept != self._before:
            replace_text(self._folder / DATA, json.dumps(kept) + "\n")
        return self._before.get("unusable") != now

    @property
    def _has_same_fingerprint(self) -> bool:
        now = self._now["fingerprint"]
        return self._before.get("fingerprint", now) == now

    @property
    def _may_content_change(self) -> bool:
        return any(name in ("data", CONTENT) for name in self._allowed)

    @property
    def _may_differ(self) -> bool:
        return any(name.split(".")[0] == "data" for name in self._allowed)

    def _ways_out(self, name: str) -> str:
        return (
            "give back the old data, choose another run_dir, or say that you mean it with "
            f"--allow-change {' '.join([*self._allowed, name])}"
        )
