"""A chip's memory by what lies in it.

What goes in (weights, optimizer, batch) is exact, from the shardings. The total of temporary memory
is the compiler's; what it is made of comes from `liveness`, and the part that cannot be told is
called "other".
"""

import dataclasses
from typing import Any

from qwenvl_jax.config import ModelConfig, TrainConfig
from qwenvl_jax.planning.cache import Sizes
from qwenvl_jax.planning.hlo import ArrayShape, Instruction, Program
from qwenvl_jax.planning.liveness import fullest_moment
from qwenvl_jax.training.memory import bytes_per_device
from qwenvl_jax.training.state import Layout

CLASSES: tuple[str, ...] = (
    "weights",
    "optimizer",
    "batch",
    "gradients",
    "activations",
    "logits",
    "pictures",
    "gathered",  # weights whole for a product, and gradients before they are summed
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


def classes(
    program: Program, sizes: Sizes, config: TrainConfig, layout: Layout, batch: Any
) -> Memory:
    """Returns the memory of a compiled train step. `sizes`: the compiler's own totals."""
    state = layout.abstract
    by_class = dict.fromkeys(CLASSES, 0)
    by_class["weights"] = bytes_per_device((state.trainable, state.frozen))
    by_class["optimizer"] = bytes_per_device((state.optimizer, state.step, state.guard))
    by_class["batch"] = bytes_per_device(batch)
    buffers = []
    label = _Labels(config, layout)
    for shape, maker in fullest_moment(program).arrays:
        kind = label(shape, maker)
        by_class[kind] += shape.num_bytes
        buffers.append(
            Buffer(kind=kind, shape=str(shape), num_bytes=shape.num_bytes, op_name=maker.op_name)
        )
    by_class["other"] = sizes.total - sum(by_class.values())
    buffers.sort(key=lambda buffer: -buffer.num_bytes)
    return Memory(by_class=by_class, largest=tuple(buffers[:8]))


class _Labels:
    """Tells what an array of the program is by its shape and the source that made it."""

    def __init__(self, config: TrainConfig, layout: Layout):
        model, tensor = config.model, layout.mesh.shape["tensor"]
        state = layout.abstract
        self._gradients = {_key(_shard(x)) for x in state.trainable.values()}
        fsdp = layout.mesh.shape["fsdp"]
        whole = {name: _whole(x, fsdp) for name, x in (state.trainable | state.frozen).items()}
        one_layer = [dims[".blocks." in path :] for path, dims in whole.items()]
        kept = [dims for path, dims in whole.items() if path.startswith(_kept_whole(model))]
        self._gathered = {_key(x) for x in one_layer + kept if fsdp > 1 and len(x) > 1}
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
        if _key(dims) in self._gathered:
            return "gathered"
        if self._vocab & set(dims) and not self._head & set(dims):
            return "logits"
        if shape.dtype in ("u8", "s8") or self._pixels in dims[1:] or dims[-1:] == (3,):
            return "pictures"
        if len(dims) > 2 and dims[0] in self._layers:
            return "activations"
        return "temporaries"


def _kept_whole(model: ModelConfig) -> tuple[str, ...]:
    """Returns where the weights are whose gathered copies of all layers wait for the backward."""
    policies = {"decoder.blocks": model.remat, "vit.blocks": model.vit_remat or model.remat}
    return tuple(where for where, remat in policies.items() if remat == "weights")


def _shard(x: Any) -> tuple[int, ...]:
    """Returns the shape of a chip's part of an abstract array."""
    return x.sharding.shard_shape(x.shape)


def _whole(x: Any, fsdp: int) -> tuple[int, ...]:
    """Returns the shape of that part once it is gathered along `fsdp`."""
    names = [*x.sharding.spec, *[None] * len(x.shape)]
    return tuple(
        size * fsdp if name == "fsdp" else size
        for size, name in zip(_shard(x), names, strict=False)
    )


def _key(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in dims if size > 1))
