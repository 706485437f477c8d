"""The small layers that every part is made of, and stacking of equal blocks.

Axes: K stacked layers; `...` whatever comes before.
Every parameter is an `nnx.Param` with its logical axes in the metadata `axes`, which is all that
`sharding.py` needs. Initial scales are one over the square root of the fan-in, so that the same
code starts well at any width (Differs: the release draws everything with std 0.02).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qwenvl_jax import axes
from qwenvl_jax.config import RematPolicy
from qwenvl_jax.model.narrow import is_widened, take
from qwenvl_jax.model.noise import layer_keys, noise
from qwenvl_jax.model.products import has_fast_path, matmul
from qwenvl_jax.model.xla_attention import KEPT
from qwenvl_jax.sharding import gather, is_split

Carry = TypeVar("Carry")  # an array, or a tuple of them
_GATHERED = "gathered weights"
_UNROLLED_LAYERS = 16  # at most: compilation takes as many times longer


class Buffer(nnx.Variable):
    """A tensor that belongs to the weights but is never trained."""


def param(
    shape: Sequence[int], logical: Sequence[str], std: float, dtype: str, rngs: nnx.Rngs
) -> nnx.Param:
    """Returns a normally distributed parameter that knows its logical axes."""
    assert len(shape) == len(logical)
    value = std * jax.random.normal(rngs.params(), tuple(shape), dtype)
    return nnx.Param(value.astype(dtype), axes=tuple(logical))


class Dense(nnx.Module):
    """x [..., in dims] -> [..., out dims], over one or two contracted and produced dimensions."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        use_bias: bool,
        dtype: str,
        rngs: nnx.Rngs,
        scale: float = 1.0,
    ):
        """`inputs` and `outputs` map logical axis -> size; `scale` multiplies the initial std."""
        fan_in = math.prod(inputs.values())
        shape = (*inputs.values(), *outputs.values())
        self.num_inputs, self.logical = len(inputs), (*inputs, *outputs)
        self.kernel = param(shape, self.logical, scale * fan_in**-0.5, dtype, rngs)
        if use_bias:
            zeros = jnp.zeros(tuple(outputs.values()), dtype)
            self.bias = nnx.Param(zeros, axes=tuple(outputs))
        else:
            self.bias = None
        self.lora: Callable | None = None  # what `model.lora` adds to the product

    def __call__(self, x: jax.Array) -> jax.Array:
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        kernel = self.kernel[...].astype(x.dtype)
        y: Any = matmul(x, kernel, bias, self.num_inputs, self.logical)
        return y if self.lora is None else y + self.lora(x)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, computed in float32."""

    def __init__(self, logical: str, size: int, *, eps: float, dtype: str):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, dtype), axes=(logical,))
        self.bias = nnx.Param(jnp.zeros(size, dtype), axes=(logical,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)  # bf16 means lose the small differences that a norm is about
        mean = wide.mean(axis=-1, keepdims=True)
        variance = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
        normal = (wide - mean) * jax.lax.rsqrt(variance + self.eps)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (normal * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis.

    The cast back comes before the weight, as in the released `modeling_qwen.py`; in bf16 the other
    order gives different numbers.
    """

    def __init__(self, logical: str, size: int, *, eps: float, dtype: str):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, dtype), axes=(logical,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * self.scale[...].astype(x.dtype)


def stack_layers(
    make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs
) -> nnx.Module:
    """Returns one module whose parameters all have a leading `layers` axis.

    Its own `__call__` must not be used: `scan_layers` takes it apart again, one slice a step.
    """

    def make_state(key: jax.Array) -> nnx.State:
        return nnx.state(make(nnx.Rngs(params=key)))

    def add_axis(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(variable.get_value(), axes=(axes.LAYERS, *variable.axes))

    states = jax.vmap(make_state)(jax.random.split(rngs.params(), num_layers))
    states = jax.tree.map(add_axis, states, is_leaf=lambda x: isinstance(x, nnx.Variable))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return nnx.merge(graphdef, states)


def scan_layers(
    stacked: nnx.Module,
    step: Callable,
    carry: Carry,
    *,
    remat: RematPolicy,
    per_layer: tuple = (),
) -> Carry:
    """Returns the carry after `step(layer, carry, *per_layer[k])` for every stacked layer k.

    Where a training step lent a key, every layer has one of its own.
    `remat` says what the backward pass finds stored: `none` everything, `dots` the results of
    matrix products, `weights` these and the matrices that were gathered over `fsdp`, `full` only
    the carry between layers.
    """
    graphdef, states = nnx.split(stacked)
    leaves, structure = jax.tree.flatten(states)
    num_layers = leaves[0].shape[0]
    walked = [None if is_widened(leaf) else leaf for leaf in leaves]  # the loop slices these

    def body(carry, slice_k):
        layer, k, extra, key = slice_k
        # Closed over, those that the loop does not slice are no part of what it stacks either.
        pairs = zip(layer, leaves, strict=True)
        state = structure.unflatten(take(x, k) if part is None else part for part, x in pairs)
        if remat == "weights":
            state = _gathered(state, jax.tree.leaves(carry)[0].dtype)
        with noise(key):
            return step(nnx.merge(graphdef, state), carry, *extra), None

    # Everything would hold a copy of what is taken, which is there already.
    stored = "dots" if remat == "none" and None in walked else remat
    if stored != "none":
        policies = jax.checkpoint_policies
        dots = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
        )
        policy = {
            "dots": dots,
            "weights": policies.save_from_both_policies(
                dots, policies.save_only_these_names(_GATHERED)
            ),
            "full": policies.nothing_saveable,
        }[stored]
        # Inside a scan the compiler cannot merge the recomputation away, so the barrier that
        # prevent_cse would add only costs.
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    numbers = jnp.arange(num_layers) if None in walked else None
    stacks = (walked, numbers, per_layer, layer_keys(num_layers))
    if remat in ("dots", "weights") and _is_better_unrolled(carry, stacks):
        for slice_k in _slices(stacks):
            carry, _ = body(carry, slice_k)
        return carry
    carry, _ = jax.lax.scan(body, carry, stacks)
    return carry


def _is_better_unrolled(carry: object, stacks: tuple) -> bool:
    """Returns whether a training pass is faster without a loop, and still compiles fast.

    For the backward pass a loop stacks what the layers leave behind. On CPUs XLA keeps such stacks
    of bfloat16 in float32, and fills them with zeros first. Without a loop it may keep more.
    """
    depth = jax.tree.leaves(stacks)[0].shape[0]
    return depth <= _UNROLLED_LAYERS and has_fast_path(jax.tree.leaves(carry)[0])


def _slices(stacks: tuple) -> list[tuple]:
    """Returns every layer's slice; their gradients are joined at once, not added up in zeros."""
    leaves, structure = jax.tree.flatten(stacks)
    depth = leaves[0].shape[0]
    layers = zip(*(jax.lax.split(leaf, [1] * depth) for leaf in leaves), strict=True)
    return [structure.unflatten([x.squeeze(0) for x in layer]) for layer in layers]


def _gathered(state: nnx.State, dtype: jax.typing.DTypeLike) -> nnx.State:
    """Returns one layer with its matrices in `dtype`, gathered, under the name that is kept."""

    def whole(variable: nnx.Variable) -> nnx.Variable:
        value, logical = variable.get_value(), variable.axes[1:]
        # Norms are next to nothing, and compute in float32.
        if value.ndim < 2 or not is_split(logical, value.shape):
            return variable
        kernel = gather(value.astype(dtype), logical)
        return variable.replace(checkpoint_name(kernel, _GATHERED))

    return jax.tree.map(whole, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
