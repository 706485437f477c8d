"""What `infer` and `chat` share: which model answers, how, and to which text."""

import dataclasses
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_jax.cli.options import check_positive
from qwenvl_jax.config import ConfigError, DType, MeshConfig, ModelConfig
from qwenvl_jax.inference.shipped import SHIPPED_MODEL

if TYPE_CHECKING:
    from qwenvl_jax.inference.vl import VL


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Which model answers, and how it chooses its words."""

    model: Path | None = None
    """A folder with a released model or one of ours; the small shipped model if left out."""
    dtype: DType | None = None
    """Of weights and arithmetic; float32 for the shipped model, bfloat16 for others."""
    tensor: int = 1
    """Devices to spread the model over."""
    max_new_tokens: int | None = None
    """Longest answer; 512, or half of a shorter context."""
    temperature: float | None = None
    """0 takes the likeliest word, higher varies more; 1 in a chat, 0 elsewhere."""
    top_k: int | None = None
    """Choose among so many likeliest words; all if left out."""
    top_p: float | None = None
    """Choose among the likeliest words that hold this probability; 0.3 in a chat, else 1."""
    repetition_penalty: float | None = None
    """Above 1 avoids words that were used; 1 if left out."""
    seed: int = 0
    """The same seed gives the same answer."""

    def check(self) -> None:
        """Raises ConfigError for options that cannot be served."""
        check_positive(self, "max_new_tokens")
        check_seed(self.seed)
        self._check_choice()
        if self.is_greedy and (self.top_k is not None or self.top_p is not None):
            raise ConfigError("--top-k and --top-p need a --temperature above 0 here")

    def _check_choice(self) -> None:
        """Raises ConfigError for a way of choosing that no request takes, by the option's name."""
        from qwenvl_jax.inference.errors import InputError
        from qwenvl_jax.inference.session import TextOptions

        try:
            TextOptions(**AnswerOptions.choice(self)).sampling()  # without what a dialogue adds
        except InputError as error:
            name, _, told = str(error).partition(" ")
            raise ConfigError(f"--{name.replace('_', '-')} {told}") from error

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest word is always taken; a dialogue draws unless it is told not to."""
        return self.temperature == 0

    def check_room(self, config: ModelConfig) -> None:
        """Raises ConfigError for an answer that leaves a model no room for a prompt."""
        most = config.decoder.max_positions - 1
        if self.max_new_tokens is not None and self.max_new_tokens > most:
            raise ConfigError(
                f"--max-new-tokens must be at most {most}, within the model's context: got "
                f"{self.max_new_tokens}"
            )

    def choice(self) -> dict[str, Any]:
        """Returns the options that were given, as `VL.chat` and `VL.complete` take them."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


def check_seed(seed: int) -> None:
    """Raises ConfigError for what no generator of random numbers takes."""
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed must lie in 0 .. 2**63 - 1: got {seed}")


def check_text(text: str, name: str, encoding: str, variable: str) -> None:
    """Raises ConfigError for text with bytes that its encoding does not have.

    `variable` is that of the environment which says which encoding it is.
    """
    if any("\udc80" <= char <= "\udcff" for char in text):
        raise ConfigError(
            f"{name} is not text in {encoding}: got {text[:60]!a}; save it in that encoding, or "
            f"set {variable} to its own"
        )


def open_model(options: AnswerOptions) -> "VL":
    """Returns the model; says on a terminal that it is being loaded.

    Raises:
        ConfigError: there is no such folder, or more devices are asked for than there are.
    """
    folder = options.model or SHIPPED_MODEL
    if not folder.is_dir():
        raise ConfigError(
            f"--model is not a folder: got {str(folder)!r}; name one with weights, or download "
            "them (README, Install)"
        )
    if options.model is None and not (folder / "config.json").is_file():
        raise ConfigError(
            f"the small model's weights are not in this installation: got no config.json in "
            f"{folder}; install the package again, or name a model with --model DIR, a released "
            "Qwen-VL folder or one that you trained (make nano gives runs/nano/stage2_level)"
        )
    import jax

    from qwenvl_jax import from_pretrained
    from qwenvl_jax.conversion.load import read_config
    from qwenvl_jax.sharding import make_mesh

    options.check_room(read_config(folder))

    devices = jax.devices()
    if not 1 <= options.tensor <= len(devices):
        raise ConfigError(f"--tensor must lie in 1 .. {len(devices)} here: got {options.tensor}")
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=options.tensor), devices[: options.tensor])
    dtype = options.dtype or ("float32" if options.model is None else "bfloat16")
    with waiting(f"loading {folder.name}"):
        return from_pretrained(folder, dtype=dtype, mesh=mesh)


def waiting(what: str) -> AbstractContextManager:
    """Returns a spinner on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(what))  # a folder's name may look like markup
