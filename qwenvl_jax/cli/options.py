"""Command-line words to a dataclass of options, with wrong ones told as every other error is."""

import contextlib
import dataclasses
import difflib
import io
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from qwenvl_jax.config import ConfigError

Options = TypeVar("Options")

_BOX_SIDES = "\u2502 "
_BOX_RULES = ({"\u2500"}, {"-"})  # the second where the terminal's encoding is not UTF-8
_BOX_ENDS = "\u256d\u2570"  # the lines with the title and the bottom

_UNKNOWN = "Unrecognized options: "
_NO_VALUE = re.compile(r"Error parsing (\S+): no type matching (\S+) could be .*? \['(.*?)'\]\.")
_NO_NUMBER = re.compile(r"Error parsing (\S+): .*?(to float|base 10): '(.*?)'")
_KINDS = {
    "FLOAT": "a number",
    "to float": "a number",
    "INT": "a whole number",
    "base 10": "a whole number",
}
_NO_CHOICE = re.compile(
    r"invalid choice '(.*?)' for argument '(.*?)'\. Expected one of \((.*?),?\)"
)
_HALF = ("float16", "fp16", "f16", "half")  # of which bfloat16 is the nearest only by its letters
_NO_PAIRS = re.compile(r"Error parsing (\S+): Failed to parse key-value pairs!")
_NAMES_JOINED = re.compile(r"[\w.*?:@\[\]-]+(,[\w.*?:@\[\]-]+)+")
_MOST_HINTS = 3
_ALIASES = {  # what other training scripts call a setting
    "lr": "--optimizer.peak-lr",
    "learning-rate": "--optimizer.peak-lr",
    "batch-size": "--data.rows",
    "epochs": "--steps",
    "num-train-epochs": "--steps",
    "gradient-accumulation-steps": "--micro-batches",
    "model-max-length": "--data.length",
    "model-name-or-path": "--init",
    "output-dir": "--run-dir",
}


def parse_options(
    kind: type[Options],
    argv: Sequence[str],
    prog: str,
    description: str | None = None,
    default: Options | None = None,
    more_names: Sequence[str] = (),
) -> Options:
    """Returns the options that the words set; fields left out keep their defaults.

    `default` is an instance to take them from. `more_names` are options read elsewhere, which a
    wrong one may be near to. `--help` prints and exits, as everywhere.

    Raises:
        ConfigError: an option that does not exist (with the nearest name), does not fit, comes
            twice, or has names with commas between them.
    """
    import tyro

    _check_repeated(kind, argv)
    start = tyro.MISSING_NONPROP if default is None else default
    rules = tyro.constructors.ConstructorRegistry()
    rules.struct_rule(_told_well(is_none_told=default is not None))
    with rules, told_in_one_line([*option_names(kind, default), *more_names]):
        options = tyro.cli(kind, args=list(argv), prog=prog, description=description, default=start)
    _check_joined(options)
    return options


def _told_well(is_none_told: bool) -> Callable[[Any], Any]:
    """Returns a rule of tyro's for what `--help` says of an option.

    Its text is one paragraph, however it is written, and an empty default is not shown. Without
    `is_none_told` neither is "(default: None)": what happens then is in the text.
    """
    import tyro

    no_default = tyro.conf.arg(help_behavior_hint="")
    is_inside = False

    def told(field: Any) -> Any:
        is_hidden = field.default in ((), {}) or (field.default is None and not is_none_told)
        kind = _choices_in_order(field.type)
        kind = Annotated[kind, no_default] if is_hidden else kind
        return dataclasses.replace(
            field, type=kind, helptext=lambda: _one_paragraph(field.helptext)
        )

    def rule(info: Any) -> Any:
        nonlocal is_inside
        if is_inside or not dataclasses.is_dataclass(info.type):
            return None
        is_inside = True  # the usual rules answer, this one only changes what they say
        try:
            spec = tyro.constructors.ConstructorRegistry.get_struct_spec(info)
        finally:
            is_inside = False
        if not isinstance(spec, tyro.constructors.StructConstructorSpec):
            return spec
        return dataclasses.replace(spec, fields=tuple(map(told, spec.fields)))

    return rule


def _choices_in_order(kind: Any) -> Any:
    """Returns `Literal[...] | None` as one `Literal`: tyro lists a union's choices in any order."""
    parts = get_args(kind)
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    if not all(get_origin(part) is Literal or part is type(None) for part in parts):
        return kind
    choices: Any = Literal
    return choices[tuple(value for part in parts for value in get_args(part) or (None,))]


def _one_paragraph(text: str | Callable[[], str | None] | None) -> str | None:
    told = text() if callable(text) else text
    return told and " ".join(told.split())


def _check_repeated(kind: type, argv: Sequence[str]) -> None:
    """Raises ConfigError where an option comes twice: the first would be forgotten silently."""
    import tyro

    gathers = {
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(kind)
        if tyro.conf.UseAppendAction in getattr(field.type, "__metadata__", ())
    }
    words = argv[: argv.index("--")] if "--" in argv else argv
    names = [word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    for name in names:
        if names.count(name) > 1 and name not in gathers:
            raise ConfigError(f"{name} is there twice: give it once, with all its values behind it")


def _check_joined(options: Any, prefix: str = "--") -> None:
    """Raises ConfigError where names that are words of their own have commas between them."""
    for field in dataclasses.fields(options):
        name, value = prefix + field.name.replace("_", "-"), getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            _check_joined(value, f"{name}.")
        elif field.type == tuple[str, ...]:
            for word in filter(_NAMES_JOINED.fullmatch, value):
                raise ConfigError(
                    f"{name} takes names with spaces between: got {word!r}; write "
                    f"{name} {word.replace(',', ' ')}"
                )


def check_positive(options: Any, *names: str) -> None:
    """Raises ConfigError where one of these options is given, and is not above 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive: got {value}")


@contextlib.contextmanager
def told_in_one_line(names: Sequence[str]) -> Iterator[None]:
    """Raises what tyro says about wrong words as a ConfigError, with the nearest of the names."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            yield
    except SystemExit as end:
        if not end.code:  # --help
            raise
        raise ConfigError(_with_hint(unboxed(told.getvalue()), names)) from None


def option_names(kind: Any, default: Any = None, prefix: str = "--") -> list[str]:
    """Returns the options of a dataclass as they are typed, those of its parts too.

    >>> option_names(MeshConfig)
    ['--data', '--fsdp', '--tensor']
    """
    import tyro

    names = []
    for field in dataclasses.fields(kind):
        name = prefix + field.name.replace("_", "-")
        value = None if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(field.type):
            names += option_names(field.type, value, f"{name}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, part in enumerate(value):
                names += option_names(part, part, f"{name}.{i}.")
        elif isinstance(value, dict) and value:  # then its keys are options, and it is none
            names += [f"{name}.{key.replace('_', '-')}" for key in value]
        elif tyro.conf.Positional not in getattr(field.type, "__metadata__", ()):
            names.append(name)
    return names


def nearest_options(word: str, names: Sequence[str]) -> list[str]:
    """Returns the options that somebody who typed `word` may have meant, likeliest first.

    >>> nearest_options("--peak-lr=1e-4", ["--steps", "--optimizer.peak-lr"])
    ['--optimizer.peak-lr']
    """
    typed = word.split("=")[0].strip("-").replace("_", "-")
    leaf = typed.rpartition(".")[2]
    alias = _ALIASES.get(leaf)
    if alias is not None and alias in names:
        return [alias]
    if begun := [name for name in names if name.startswith(f"--{typed}-")]:
        return begun[:_MOST_HINTS]
    leaves = [name.strip("-").rpartition(".")[2] for name in names]
    whole = difflib.get_close_matches(f"--{typed}", names, n=1, cutoff=0.75)
    near = [leaf] if leaf in leaves else difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    if whole and (not near or leaf != near[0]):
        return whole
    same = [name for name, own in zip(names, leaves, strict=True) if own in near]
    return sorted(same, key=lambda name: (name not in whole, name))[:_MOST_HINTS]


def _with_hint(text: str, names: Sequence[str]) -> str:
    """Returns tyro's message with the option that was meant, or how one is written, if known."""
    if found := _NO_VALUE.match(text):
        kind = found[2].removeprefix("{None}|")
        return f"{found[1]} takes {_KINDS.get(kind, kind)}: got {found[3]!r}"
    if found := _NO_NUMBER.match(text):
        return f"{found[1]} takes {_KINDS[found[2]]}: got {found[3]!r}"
    if found := _NO_CHOICE.match(text):
        got, option, listed = found.groups()
        choices = [choice.strip(" '") for choice in listed.split(",")]
        near = difflib.get_close_matches(got, choices, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        if got.lower() in _HALF and "bfloat16" in choices:
            hint = (
                "; float16 is not offered: training in it needs a scaled loss, and bfloat16 takes "
                "no more memory"
            )
        return f"{option} takes one of {', '.join(choices)}: got {got!r}{hint}"
    if found := _NO_PAIRS.match(text):
        return (
            f"{found[1]} takes pairs of a name and a number, with spaces between: got others; "
            f"e.g. {found[1]} first 1 second 0.5"
        )
    if not text.startswith(_UNKNOWN):
        return text
    words, *others = text.split("; ")
    typed = words.removeprefix(_UNKNOWN).split(", ")
    if all(word in ("True", "False", "true", "false") for word in typed):
        return (
            f"{words}; what is on or off takes no value: --part.name turns it on, --part.no-name "
            "off, and without a part --name and --no-name"
        )
    options = [word for word in typed if word.startswith("-")] or typed[:1]
    unknown = options[0]
    whole = unknown.split("=")[0].replace("_", "-")
    parts = [name for name in names if name.startswith(f"{whole}.")]
    if parts:
        return (
            f"{words}; {whole} is set part by part, e.g. {parts[0]}=VALUE; parts that are not "
            "there yet, and all of them at once, are set in the config file"
        )
    near = [" or ".join(nearest_options(word, names)) for word in options]
    if not any(near) and not unknown.startswith("-"):
        return f"{words}; a text of several words needs quotes around it. {others[-1]}"
    if not any(near):
        return text
    return " ".join([f"{words}; did you mean {', and '.join(filter(None, near))}?", *others[-1:]])


def unboxed(text: str) -> str:
    """Returns what tyro put into a box as one line."""
    lines = [" ".join(line.strip(_BOX_SIDES).split()) for line in text.splitlines()]
    lines = [line for line in lines if line and line[0] not in _BOX_ENDS]
    if len(lines) > 2 and set(lines[1]) == {"-"}:  # in ASCII a title stands over a rule
        lines = lines[2:]
    parts = ["; " if set(line) in _BOX_RULES else f"{line} " for line in lines]
    return "".join(parts).replace(" ; ", "; ").strip() or text.strip()
