"""Which vocabulary a data command counts tokens with, and how many slots a picture takes in it."""

from pathlib import Path

from qwenvl_jax.cli.opening import SHIPPED_MODEL
from qwenvl_jax.config import ConfigError
from qwenvl_jax.files import read_object
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer

RELEASED_SLOTS = 256
_WAYS_OUT = "give --slots, or mend it"


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
    config = read_object(file, _WAYS_OUT)
    model = config.get("model")  # a run's config has the model's inside
    parts = model if isinstance(model, dict) else config
    for part, name in (("visual", "n_queries"), ("adapter", "num_queries")):
        found = parts.get(part)
        if isinstance(found, dict) and name in found:
            if type(found[name]) is not int or found[name] <= 0:
                raise ConfigError(
                    f"{file} is damaged: expected a positive whole number as {part}.{name}, got "
                    f"{found[name]!r:.60}; {_WAYS_OUT}"
                )
            return found[name]
    return None
