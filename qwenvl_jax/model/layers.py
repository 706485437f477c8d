"""The small layers that every part is made of, and stacking of equal blocks.

Axes: K stacked layers; `...` whatever comes before.
Every parameter is an `nnx.Param` with its logical axes in the metadata `axes`, which is all that
`sharding.py` needs. Initial scales are one over the square root of the fan-in, so that the same
code starts well at any width (Differs: the release draws everything with std 0.02).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qwenvl_jax import axes
from qwenvl_jax.config import RematPolicy
from qwenvl_jax.sharding import context_platform, gather, is_split, sum_over_rows

Carry = TypeVar("Carry")  # an array, or a tuple of them
_GATHERED = "gathered weights"


class Buffer(nnx.Variable):
    """A tensor that belongs to the weights but is never trained."""


def param(
    shape: Sequence[int], logical: Sequence[str], std: float, dtype: str, rngs: nnx.Rngs
) -> nnx.Param:
    """Returns a normally distributed parameter that knows its logical axes."""
    assert len(shape) == len(logical)
    value = std * jax.random.normal(rngs.params(), tuple(shape), dtype)
    return nnx.Param(value.astype(dtype), axes=tuple(logical))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, kernel: jax.Array, num_inputs: int, logical: tuple[str, ...]) -> jax.Array:
    """Returns x [..., in dims] times kernel [in dims, out dims], whose axes are `logical`.

    The gradient is written out because the derived one asks for the kernel's gradient transposed:
    XLA then writes the large activations in transposed order first, which on a CPU costs more than
    the product itself. And so that its sum over the batch is scattered over the devices.
    """
    return _matmul_forward(x, kernel, num_inputs, logical)[0]


def _matmul_forward(x, kernel, num_inputs, logical):
    inputs_of_x = tuple(range(x.ndim - num_inputs, x.ndim))
    return _dot(x, kernel, inputs_of_x, tuple(range(num_inputs))), (x, kernel)


def _matmul_backward(num_inputs, logical, residuals, grad):
    x, kernel = residuals
    outputs_of_grad = tuple(range(x.ndim - num_inputs, grad.ndim))
    outputs_of_kernel = tuple(range(num_inputs, kernel.ndim))
    grad_x = _dot(grad, kernel, outputs_of_grad, outputs_of_kernel)
    product = partial(_kernel_gradient, num_inputs=num_inputs)
    return grad_x, sum_over_rows(product, x, grad, logical, num_inputs)


def _kernel_gradient(x: jax.Array, grad: jax.Array, num_inputs: int) -> jax.Array:
    """Returns x [..., in dims] times grad [..., out dims], added up over `...`."""
    batch = tuple(range(x.ndim - num_inputs))
    if not _has_fast_path(x):
        return _dot(x, grad, batch, batch)
    # The fast path contracts the last axis of the left side. A row of zeros keeps XLA from taking
    # the transposition into the product again, and goes away after it.
    inputs, outputs = x.shape[len(batch) :], grad.shape[len(batch) :]
    x_IB = jnp.pad(x.reshape(-1, math.prod(inputs)).T, ((0, 1), (0, 0)))
    grad_kernel = _dot(x_IB, grad.reshape(-1, math.prod(outputs)), (1,), (0,))
    return grad_kernel[:-1].reshape(*inputs, *outputs)


def _dot(a, b, axes_of_a, axes_of_b):
    """Returns the product over these axes, in the dtype of `a`."""
    dims = ((axes_of_a, axes_of_b), ((), ()))
    if not _has_fast_path(a):
        return jax.lax.dot_general(a, b, dims)
    wide = jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
    return wide.astype(a.dtype)


def _has_fast_path(x: jax.Array) -> bool:
    """Returns whether products of such arrays are faster when asked for float32 results.

    They are for bfloat16 on a CPU, by a factor of three; elsewhere it would sum up parts of a
    split product in float32, and exchange twice the bytes.
    """
    return x.dtype == jnp.bfloat16 and context_platform() == "cpu"


matmul.defvjp(_matmul_forward, _matmul_backward)


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
        y: Any = matmul(x, self.kernel[...].astype(x.dtype), self.num_inputs, self.logical)
        if self.lora is not None:
            y = y + self.lora(x)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y


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

    `remat` says what the backward pass finds stored: `none` everything, `dots` the results of
    matrix products, `weights` these and the matrices that were gathered over `fsdp`, `full` only
    the carry between layers.
    """
    graphdef, states = nnx.split(stacked)

    def body(carry, slice_k):
        state, extra = slice_k
        if remat == "weights":
            state = _gathered(state, jax.tree.leaves(carry)[0].dtype)
        return step(nnx.merge(graphdef, state), carry, *extra), None

    if remat != "none":
        policies = jax.checkpoint_policies
        dots = policies.dots_with_no_batch_dims_saveable
        policy = {
            "dots": dots,
            "weights": policies.save_from_both_policies(
                dots, policies.save_only_these_names(_GATHERED)
            ),
            "full": policies.nothing_saveable,
        }[remat]
        # Inside a scan the compiler cannot merge the recomputation away, so the barrier that
        # prevent_cse would add only costs.
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    carry, _ = jax.lax.scan(body, carry, (states, per_layer))
    return carry


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
