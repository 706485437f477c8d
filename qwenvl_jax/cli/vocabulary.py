"""Which vocabulary a data command counts tokens with, and how many slots a picture takes in it."""

import json
from pathlib import Path

from qwenvl_jax.cli.opening import SHIPPED_MODEL
from qwenvl_jax.config import ConfigError
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer

RELEASED_SLOTS = 256


def open_tokenizer(path: Path | None, slots: int | None) -> Tokenizer:
    """Returns the tokenizer of a file or folder; the small shipped model's where none is named.

    Slots left out are those of the folder's `config.json`, or as in the released models.

    Raises: ConfigError for slots that cannot be; TokenizerError where there is no vocabulary.
    """
    place = path or SHIPPED_MODEL
    if slots is not None and slots <= 0:
        raise ConfigError(f"--slots must be positive: got {slots}")
    return load_tokenizer(place, slots=slots or _configured_slots(place) or RELEASED_SLOTS)


def _configured_slots(place: Path) -> int | None:
    """Returns the number of queries that a folder names: a model's in either format, or a run's."""
    file = place / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}; give --slots, or mend it") from error
    if not isinstance(config, dict):
        return None
    model = config.get("model")  # a run's config has the model's inside
    parts = model if isinstance(model, dict) else config
    for part, name in (("visual", "n_queries"), ("adapter", "num_queries")):
        found = parts.get(part)
        if isinstance(found, dict) and isinstance(found.get(name), int):
            return found[name]
    return None
