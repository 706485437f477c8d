"""What an export takes from a released folder, so that `from_pretrained` loads it as that one."""

import shutil
from pathlib import Path
from typing import Any

from qwenvl_jax.conversion.reader import read_json
from qwenvl_jax.conversion.slots import ConversionError

_AUTO_MAP = "auto_map"  # transformers class -> the file and class that stand for it
_FILES = ("*.py", "tokenizer_config.json", "generation_config.json", "LICENSE*", "NOTICE*")


class ReleasedCode:
    """The code and the settings of a released folder. Copied as they are: nothing is run."""

    def __init__(self, folder: str | Path):
        """Raises: ConversionError where the folder is not one that `from_pretrained` can load."""
        self._folder = Path(folder)
        described = read_json(self._folder / "config.json")
        self._auto_map = described.get(_AUTO_MAP)
        if not isinstance(self._auto_map, dict) or not self._auto_map:
            raise ConversionError(
                self._folder,
                [f"its config.json has no `{_AUTO_MAP}`: expected a folder with the released code"],
            )
        missing = [file for file in _named(self._auto_map) if not (self._folder / file).is_file()]
        if missing:
            raise ConversionError(
                self._folder,
                [f"{file} is missing, which its `{_AUTO_MAP}` names" for file in missing],
            )

    def add_to(self, described: dict[str, Any]) -> dict[str, Any]:
        """Returns the `config.json` of an export with the entry that names the code."""
        return {**described, _AUTO_MAP: self._auto_map}

    def copy_to(self, folder: Path) -> None:
        for pattern in _FILES:
            for file in self._folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)


def _named(auto_map: dict[str, Any]) -> list[str]:
    """Returns the files in the same folder that an `auto_map` names."""
    places = [each for x in auto_map.values() for each in (x if isinstance(x, list) else [x])]
    # "file.Class", or "repository--file.Class" for code that lies elsewhere
    near = {x.split(".")[0] for x in places if isinstance(x, str) and "--" not in x}
    return [f"{name}.py" for name in sorted(near)]
