"""A chip's memory by what lies in it.

What goes in (weights, optimizer, batch) is exact, from the shardings. The total of temporary memory
is the compiler's; what it is made of comes from `liveness`, and the part that cannot be told is
called "other".
"""

import dataclasses
import math
from typing import Any

import jax

from qwenvl_jax.config import TrainConfig
from qwenvl_jax.planning.hlo import ArrayShape, Instruction, Program
from qwenvl_jax.planning.liveness import fullest_moment
from qwenvl_jax.training.state import Layout

CLASSES: tuple[str, ...] = (
    "weights",
    "optimizer",
    "batch",
    "gradients",
    "activations",
    "logits",
    "pictures",
    "temporaries",
    "other",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """One large array at the fullest moment."""

    kind: str
    shape: str
    num_bytes: int
    op_name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one chip, by class, and the largest arrays among the temporary ones."""

    by_class: dict[str, int]
    largest: tuple[Buffer, ...]

    @property
    def total(self) -> int:
        return sum(self.by_class.values())


def shard_bytes(tree: Any) -> int:
    """Returns how much of an abstract tree, whose leaves carry shardings, one chip holds."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def classes(
    program: Program, stats: Any, config: TrainConfig, layout: Layout, batch: Any
) -> Memory:
    """Returns the memory of a compiled train step. `stats`: XLA's `memory_analysis()` of it."""
    state = layout.abstract
    by_class = dict.fromkeys(CLASSES, 0)
    by_class["weights"] = shard_bytes((state.trainable, state.frozen))
    by_class["optimizer"] = shard_bytes((state.optimizer, state.step, state.guard))
    by_class["batch"] = shard_bytes(batch)
    buffers = []
    label = _Labels(config, layout)
    for array in fullest_moment(program).arrays:
        for shape in (shape for shape in array.shapes if shape.is_in_hbm):
            kind = label(shape, array)
            by_class[kind] += shape.num_bytes
            buffers.append(
                Buffer(
                    kind=kind, shape=str(shape), num_bytes=shape.num_bytes, op_name=array.op_name
                )
            )
    # Results that take an argument's place (all of the state, when donation works) are not new.
    new_results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes + new_results
    total += stats.generated_code_size_in_bytes
    by_class["other"] = total - sum(by_class.values())
    buffers.sort(key=lambda buffer: -buffer.num_bytes)
    return Memory(by_class=by_class, largest=tuple(buffers[:8]))


class _Labels:
    """Tells what an array of the program is by its shape and the source that made it."""

    def __init__(self, config: TrainConfig, layout: Layout):
        model, tensor = config.model, layout.mesh.shape["tensor"]
        self._gradients = {
            _key(x.sharding.shard_shape(x.shape)) for x in layout.abstract.trainable.values()
        }
        vocab = model.decoder.vocab_size
        self._vocab = {vocab, vocab // tensor if vocab % tensor == 0 else vocab}
        self._layers = {model.vision.num_layers, model.decoder.num_layers}
        self._pixels = model.vision.patch_size**2 * 3
        self._head = {  # widths that stand beside the vocabulary in its two matrices
            model.decoder.width,
            model.decoder.width // layout.mesh.shape["fsdp"],
        }

    def __call__(self, shape: ArrayShape, array: Instruction) -> str:
        dims = shape.dims
        if shape.dtype == "f32" and _key(dims) in self._gradients and "jvp()/" not in array.op_name:
            return "gradients"
        if self._vocab & set(dims) and not self._head & set(dims):
            return "logits"
        if shape.dtype in ("u8", "s8") or self._pixels in dims[1:] or dims[-1:] == (3,):
            return "pictures"
        if len(dims) > 2 and dims[0] in self._layers:
            return "activations"
        return "temporaries"


def _key(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in dims if size > 1))
