"""Between a released folder and our arrays, without either of them in memory.

`released_leaves` gives each of our arrays as something to be read in parts, out of the mapped
files; `released_tensor` goes the other way, one released tensor at a time.
"""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from qwenvl_jax.checkpoint.leaves import Leaf, OnBytes, unwatched
from qwenvl_jax.conversion.reader import ReleasedFolder
from qwenvl_jax.conversion.rules import Ignored, Rule, name_problems
from qwenvl_jax.conversion.slots import FLOAT_DTYPES, ConversionError, is_finite

SCAN_BYTES = 16 << 20


def check_released(
    folder: ReleasedFolder,
    rules: tuple[Rule, ...],
    ignored: tuple[Ignored, ...] = (),
    *,
    values: bool = True,
    on_bytes: OnBytes = unwatched,
) -> None:
    """Raises one ConversionError with everything that is wrong: files, names, shapes, values.

    `values` reads every tensor once, looking for NaN and infinity; headers tell the rest.
    """
    shapes = {name: slot.shape for name, slot in folder.slots.items()}
    problems = [*folder.problems, *name_problems(rules, shapes, ignored, folder.may_hold)]
    problems += _dtype_problems(folder, rules)
    if values:
        for name in sorted({name for rule in rules for name in rule.names()} & set(shapes)):
            slot = folder.slots[name]
            if slot.dtype in FLOAT_DTYPES and not all_finite(folder.tensor(name), on_bytes):
                problems.append(f"{name} holds NaN or infinity")
    if problems:
        raise ConversionError(folder.path, problems)


def released_leaves(folder: ReleasedFolder, rules: tuple[Rule, ...]) -> dict[str, Leaf]:
    """Returns our arrays by dotted path, each in the dtype its released tensors have.

    The folder must have passed `check_released`, and stay open while the leaves are read.
    """
    leaves = {}
    for rule in rules:
        dtype = folder.slots[rule.names()[0]].dtype
        for part, (path, shape) in enumerate(zip(rule.ours, rule.our_shapes(), strict=True)):
            leaves[path] = Leaf(shape, dtype, _PartReader(folder, rule, part))
    return leaves


class _PartReader:
    """Reads a slice of one of our arrays out of the released tensors that it is made of."""

    def __init__(self, folder: ReleasedFolder, rule: Rule, part: int):
        self._folder, self._rule, self._part = folder, rule, part

    def __call__(self, index: tuple[slice, ...]) -> np.ndarray:
        if self._rule.num_layers is None:
            return self._layer(self._rule.released)[index]
        layers = [self._layer(name)[index[1:]] for name in self._rule.names()[index[0]]]
        bits = np.dtype(f"<u{layers[0].dtype.itemsize}")  # NumPy copies integers faster than bf16
        return np.stack([layer.view(bits) for layer in layers]).view(layers[0].dtype)

    def _layer(self, name: str) -> np.ndarray:
        return self._rule.transform.to_ours(self._folder.tensor(name))[self._part]


def released_tensor(rule: Rule, layer: int, leaves: Mapping[str, Leaf]) -> np.ndarray:
    """Returns one released tensor, put together from our arrays; only its parts are read.

    Its dtype is `released_dtype`.
    """
    dtype, parts = released_dtype(rule, leaves), []
    for path in rule.ours:
        leaf = leaves[path]
        whole = (slice(None),) * len(leaf.shape)
        if rule.num_layers is not None:
            parts.append(leaf.read((slice(layer, layer + 1), *whole[1:]))[0])
        else:
            parts.append(leaf.read(whole))
    parts = [part.astype(dtype, copy=False) for part in parts]
    bits = tuple(part.view(f"<u{dtype.itemsize}") for part in parts)
    return rule.transform.to_released(bits).view(dtype)


def released_dtype(rule: Rule, leaves: Mapping[str, Leaf]) -> np.dtype:
    """Returns the dtype of a released tensor: the one that holds all of its parts exactly.

    They differ where a run trains some of them and keeps the others in bfloat16.
    """
    return np.result_type(*(leaves[path].dtype for path in rule.ours))


def in_released_order(rules: tuple[Rule, ...]) -> Iterator[tuple[str, Rule, int]]:
    """Yields (released name, rule, layer): layer by layer, in the order of the table."""
    for num_layers, rows in itertools.groupby(rules, key=lambda rule: rule.num_layers):
        rows = list(rows)
        for layer in range(num_layers or 1):
            yield from ((row.names()[layer], row, layer) for row in rows)


def _dtype_problems(folder: ReleasedFolder, rules: tuple[Rule, ...]) -> list[str]:
    problems = []
    floats = ", ".join(sorted(dtype.name for dtype in FLOAT_DTYPES))
    for rule in rules:
        names = [name for name in rule.names() if name in folder.slots]
        for name in names:
            dtype, first = folder.slots[name].dtype, folder.slots[names[0]].dtype
            if dtype not in FLOAT_DTYPES:
                problems.append(f"{name} has dtype {dtype.name}, expected one of {floats}")
            elif dtype != first and first in FLOAT_DTYPES:
                problems.append(
                    f"{name} has dtype {dtype.name}, but {names[0]} has {first.name}: the layers "
                    "become one array and need one dtype"
                )
    return problems


def all_finite(tensor: np.ndarray, on_bytes: OnBytes = unwatched) -> bool:
    """Returns whether the tensor is free of NaN and infinity, looking at a part at a time."""
    tensor = np.atleast_1d(tensor)
    rows = max(1, SCAN_BYTES // max(1, tensor.nbytes // max(1, len(tensor))))
    found = True
    for start in range(0, len(tensor), rows):
        part = tensor[start : start + rows]
        found = found and is_finite(part)
        on_bytes(part.nbytes)
    return found
