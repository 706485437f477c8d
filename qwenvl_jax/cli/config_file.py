"""A config file and `--a.b=c` words to a TrainConfig, with one line for whatever is wrong in it."""

import dataclasses
import difflib
import importlib.util
import inspect
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from qwenvl_jax import config as config_module
from qwenvl_jax.cli.options import parse_options
from qwenvl_jax.config import ConfigError, TrainConfig
from qwenvl_jax.words import did_you_mean

_PACKAGE = Path(config_module.__file__).parent
_UNKNOWN_FIELD = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'")
_NOTHING_TO_IMPORT = re.compile(r"cannot import name '(\w+)' from '([\w.]+)'")


def read_config(
    path: str,
    overrides: Sequence[str] = (),
    prog: str | None = None,
    more_names: Sequence[str] = (),
) -> TrainConfig:
    """Returns the TrainConfig of a config file, with `--a.b=c` overrides applied.

    Where it names no vocabulary, that of `init` is filled in. `prog` and `more_names` are those of
    `parse_options`.

    Raises:
        ConfigError: see `load_config`, or an override that does not fit (with the nearest name).
    """
    base = load_config(path)
    config = parse_options(
        TrainConfig,
        overrides,
        prog or f"python train.py {path}",
        default=base,
        more_names=more_names,
    )
    return _with_tokenizer(_without_its_own_rows(config, base))


def load_config(path: str | Path) -> TrainConfig:
    """Returns what a config file says and no more, for a config that is made from another.

    Raises:
        ConfigError: no such file, no get_config() in it that returns a TrainConfig, or something
            wrong in it, with the line.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"no config file {path}: expected a Python file, {_near_file(file)}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file: expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = get_config() if callable(get_config) else None
    except SyntaxError as error:
        raise ConfigError(f"{path} line {error.lineno} is not Python: {error.msg}") from error
    except Exception as error:
        if isinstance(error, TypeError) and str(error).startswith("get_config() missing"):
            raise ConfigError(f"{path}: get_config() must need no arguments: {error}") from error
        line = _line_at_fault(error, file)
        if line is None:
            raise
        raise ConfigError(f"{path} line {line}: {_told(error)}") from error
    if not isinstance(config, TrainConfig):
        got = type(config).__name__
        if config is None:
            got = "None; is `return` missing?" if callable(get_config) else "no get_config at all"
        raise ConfigError(f"{path} has no get_config() that returns a TrainConfig: got {got}")
    return config


def _without_its_own_rows(config: TrainConfig, base: TrainConfig) -> TrainConfig:
    """Returns the config without the base's mixture or drawn tasks, where rows replace them."""
    data, before = config.data, base.data
    if data.path not in ("", before.path) and data.mixture == before.mixture:
        data = dataclasses.replace(data, mixture={})
    if data.source == "rows" != before.source and data.tasks == before.tasks:
        data = dataclasses.replace(data, tasks={})
    return dataclasses.replace(config, data=data)


def _with_tokenizer(config: TrainConfig) -> TrainConfig:
    """Returns the config with the vocabulary of `init` where it names none."""
    if config.data.tokenizer:
        return config
    if config.init is None:
        raise ConfigError(
            "data.tokenizer is empty and there is no init to take it from: name a qwen.tiktoken "
            "file or a folder that holds one"
        )
    data = dataclasses.replace(config.data, tokenizer=config.init)
    return dataclasses.replace(config, data=data)


def _near_file(file: Path) -> str:
    here = [*file.parent.glob("*.py"), *Path("configs").glob("**/*.py")]
    names = {path.name: path for path in reversed(here)}
    near = difflib.get_close_matches(file.with_suffix(".py").name, names, n=1, cutoff=0.7)
    return f"did you mean {names[near[0]]}?" if near else "e.g. configs/nano/stage1.py"


def _line_at_fault(error: Exception, file: Path) -> int | None:
    """Returns the file's line that raised, or None where this package did, behind it."""
    line = None
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).resolve() == file.resolve():
            line = frame.lineno
        elif Path(frame.filename).is_relative_to(_PACKAGE):
            line = None
    return line


def _told(error: Exception) -> str:
    """Returns what an error of a config file says, with the name that was meant, if one is near."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    known: Sequence[str] = ()
    name = ""
    if found := _UNKNOWN_FIELD.search(text):
        kind, name = found.groups()
        text, known = f"{kind} has no {name!r}", _parameters(kind)
    elif found := _NOTHING_TO_IMPORT.search(text):
        name, module = found.groups()
        text, known = f"{module} has no {name!r}", _public(importlib.import_module(module))
    elif isinstance(error, NameError):
        name, known = error.name or "", _public(config_module)
    if name in known:
        return f"{text}; import it at the top of the file"
    return text + did_you_mean(name, known)


def _parameters(kind: str) -> Sequence[str]:
    """Returns the fields of a class of settings."""
    made = getattr(config_module, kind, None)
    return list(inspect.signature(made).parameters) if callable(made) else []


def _public(module: ModuleType) -> Sequence[str]:
    return [name for name in vars(module) if not name.startswith("_")]
