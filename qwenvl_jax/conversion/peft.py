"""A LoRA adapter in PEFT's format, added to the released tensors that it was trained beside.

A folder of it has `adapter_config.json` and `adapter_model.safetensors` or `.bin`. For each matrix
W [out, in] that it targets there are A [rank, in] and B [out, rank], and the model uses
W + scale B A; modules that were trained whole (`modules_to_save`) lie there as they are. The
original `finetune.py` writes such folders with `--use_lora`. Names and shapes are those of the
released code, so pairs are added before anything is rearranged: `c_attn` has one pair for queries,
keys and values.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwenvl_jax.conversion.placement import all_finite
from qwenvl_jax.conversion.reader import ReleasedFolder, read_json
from qwenvl_jax.conversion.slots import FLOAT_DTYPES, ConversionError

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
_HALF = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_WHOLE = re.compile(r"base_model\.model\.(.+?)(?:\.modules_to_save(?:\.default)?)?\.(weight|bias)")
# Settings that change what the pairs mean, and the only values under which they mean W + scale B A.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    # Others begin by changing the model itself.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
}


class _Pair(NamedTuple):
    down: str  # name of A [rank, in] in the adapter
    up: str  # name of B [out, rank]


class _Settings(NamedTuple):
    alpha: float
    is_rs: bool  # divided by the root of the rank instead of the rank
    whole: tuple[str, ...]  # endings of the modules that were trained whole


class AdaptedFolder(ReleasedFolder):
    """A released folder whose tensors have an adapter's pairs added, each when it is read.

    What is wrong with the adapter, or does not fit this folder, is among `problems`.
    """

    def __init__(self, path: str | Path, adapter: str | Path):
        """Raises a ConversionError where `adapter` is no folder of a LoRA adapter."""
        super().__init__(path)
        self._last: tuple[str, np.ndarray] | None = None  # a tensor is read in many parts
        adapter = Path(adapter)
        self._settings = _read_settings(adapter)
        file = next((adapter / name for name in FILES if (adapter / name).is_file()), None)
        if file is None:
            raise ConversionError(adapter, [f"holds none of {', '.join(FILES)}"])
        self._adapter = ReleasedFolder(file)
        self.problems += [f"adapter: {problem}" for problem in self._adapter.problems]
        self._pairs, self._whole, problems = _sorted_names(self._adapter)
        if not self._adapter.problems:
            problems += _lost(self._settings.whole, self._adapter)
        for name in [*self._pairs, *self._whole]:
            if not self.may_hold(name) and (problem := self._misfit(name)):
                problems.append(problem)
                self._pairs.pop(name, None)  # and the check goes on without it
        self.problems += [f"adapter: {problem}" for problem in problems]

    def tensor(self, name: str) -> np.ndarray:
        """Returns a released tensor with its pair added in float32, in its own dtype."""
        if name not in self._pairs and name not in self._whole:
            return super().tensor(name)
        if self._last is None or self._last[0] != name:
            self._last = (name, self._adapted(name))
        return self._last[1]

    def close(self) -> None:
        self._last = None
        self._adapter.close()
        super().close()

    def _adapted(self, name: str) -> np.ndarray:
        kept = self.slots[name].dtype
        if name in self._whole:
            return self._adapter.tensor(self._whole[name]).astype(kept, copy=False)
        pair = self._pairs[name]
        down, up = (self._adapter.tensor(half).astype(np.float32) for half in pair)
        added = up @ down
        added *= self._settings.alpha / (len(down) ** 0.5 if self._settings.is_rs else len(down))
        added += super().tensor(name)
        return added.astype(kept)

    def _misfit(self, name: str) -> str | None:
        """Returns why what the adapter has for a tensor cannot be added to it, if it cannot."""
        slots = self._adapter.slots
        if name not in self.slots:
            return f"{name} is trained, but the model has no such tensor"
        if name in self._whole:
            got: tuple[int, ...] = slots[self._whole[name]].shape
        else:
            down, up = (slots[half].shape for half in self._pairs[name])
            if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
                return f"{name}: A is {down} and B {up}, expected [rank, in] and [out, rank]"
            got = (up[0], down[1])
        wanted = self.slots[name].shape
        return None if got == wanted else f"{name}: got shape {got}, expected {wanted}"


def is_adapter(folder: Path) -> bool:
    """Returns whether a folder holds a PEFT adapter and no model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def _read_settings(folder: Path) -> _Settings:
    settings = read_json(folder / CONFIG)
    problems = [
        f"{name} is {settings.get(name)!r}, expected {values[0]!r}: other adapters cannot be added"
        for name, values in _PLAIN.items()
        if settings.get(name) not in values
    ]
    alpha: Any = settings.get("lora_alpha")
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not is_number or not abs(alpha) < 1e30:
        problems.append(f"lora_alpha is {alpha!r:.60}, expected a number")
    whole: Any = settings.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        problems.append(f"modules_to_save is {whole!r}, expected a list of names")
    if problems:
        raise ConversionError(folder / CONFIG, problems)
    return _Settings(float(alpha), bool(settings.get("use_rslora")), tuple(whole))


def _note(names: dict[str, str], key: str, name: str) -> dict[str, str]:
    """Notes a name under a key; returns it with the one that stood there, if there was one."""
    found = {name: names[key]} if key in names else {}
    names[key] = name
    return found


def _lost(wanted: tuple[str, ...], adapter: ReleasedFolder) -> list[str]:
    """Returns which modules the settings say were trained whole and the file does not hold."""
    found = [_WHOLE.fullmatch(name) for name in adapter.slots if ".lora_" not in name]
    modules = [f".{whole[1]}" for whole in found if whole]
    return [
        f"{name} was trained whole, but its weights are not in the file (the original finetune.py "
        "leaves them out of its last save: use a checkpoint-N folder)"
        for name in wanted
        if not any(module.endswith(f".{name}") for module in modules)
    ]


def _sorted_names(adapter: ReleasedFolder) -> tuple[dict[str, _Pair], dict[str, str], list[str]]:
    """Returns pairs and whole tensors by the released name that each is for, and what is odd."""
    halves: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    problems, twice = [], dict[str, str]()
    for name, slot in adapter.slots.items():
        if slot.dtype not in FLOAT_DTYPES:
            problems.append(f"{name} has dtype {slot.dtype.name}, expected a float")
        elif not all_finite(adapter.tensor(name)):
            problems.append(f"{name} holds NaN or infinity")
        elif half := _HALF.fullmatch(name):
            twice |= _note(halves.setdefault(f"{half[1]}.weight", {}), half[2], name)
        elif ".lora_" not in name and (found := _WHOLE.fullmatch(name)):
            twice |= _note(whole, f"{found[1]}.{found[2]}", name)
        else:
            problems.append(f"{name} is unknown")
    problems += [f"{name} and {other} are for the same matrix" for name, other in twice.items()]
    problems += [f"{name} is there whole, and as a pair" for name in halves if name in whole]
    problems += [
        f"{name}: lora_{'B' if 'A' in found else 'A'} is missing"
        for name, found in halves.items()
        if len(found) < 2
    ]
    pairs = {name: _Pair(x["A"], x["B"]) for name, x in halves.items() if len(x) == 2}
    if not adapter.slots and not adapter.problems:
        problems.append("holds no tensors")
    return pairs, whole, problems
