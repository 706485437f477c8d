"""Matrix products with their gradients written out, the way each platform is fast at them.

Axes: `...` rows, of any shape  D width  V vocabulary; others as each call says.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from qwenvl_jax.sharding import context_platform, sum_over_rows


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def matmul(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    num_inputs: int,
    logical: tuple[str, ...],
) -> jax.Array:
    """Returns x [..., in dims] times kernel [in dims, out dims] plus bias [out dims].

    `logical` names the axes of the kernel.

    The gradient is written out because the derived one asks for the kernel's gradient transposed:
    XLA then writes the large activations in transposed order first, which on a CPU costs more than
    the product itself. And so that its sum over the batch is scattered over the devices.
    """
    return _matmul_forward(x, kernel, bias, num_inputs, logical)[0]


def _matmul_forward(x, kernel, bias, num_inputs, logical):
    inputs_of_x, inputs_of_kernel = tuple(range(x.ndim - num_inputs, x.ndim)), range(num_inputs)
    product = _wide_dot if has_fast_path(x) else _dot  # of wide ones only the sum is rounded
    y = product(x, kernel, inputs_of_x, tuple(inputs_of_kernel))
    return (y if bias is None else y + bias).astype(x.dtype), (x, kernel, bias)


def _matmul_backward(num_inputs, logical, residuals, grad):
    x, kernel, bias = residuals
    outputs_of_grad = tuple(range(x.ndim - num_inputs, grad.ndim))
    outputs_of_kernel = tuple(range(num_inputs, kernel.ndim))
    grad_x = _dot(grad, kernel, outputs_of_grad, outputs_of_kernel)
    product = partial(_kernel_gradient, num_inputs=num_inputs)
    grad_kernel = sum_over_rows(product, x, grad, logical, num_inputs)
    grad_bias = None if bias is None else grad.sum(axis=tuple(range(x.ndim - num_inputs)))
    return grad_x, grad_kernel, grad_bias


matmul.defvjp(_matmul_forward, _matmul_backward)


def logits(hidden: jax.Array, lm_head_DV: jax.Array) -> jax.Array:
    """Returns hidden [..., D] times the head, float32 [..., V]."""
    if context_platform() == "cpu":
        return _logits_on_cpu(hidden, lm_head_DV)
    return jnp.einsum("...D,DV->...V", hidden, lm_head_DV, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _logits_on_cpu(hidden: jax.Array, lm_head_DV: jax.Array) -> jax.Array:
    # Their gradient is as large as they are: transposed, or in float32, it costs a product's time.
    return _wide_dot(hidden, lm_head_DV, (hidden.ndim - 1,), (0,))


def _logits_forward(hidden, lm_head_DV):
    return _logits_on_cpu(hidden, lm_head_DV), (hidden, lm_head_DV)


def _logits_backward(residuals, grad):
    hidden, lm_head_DV = residuals
    grad = grad.astype(hidden.dtype)
    grad_hidden = _dot(grad, lm_head_DV, (grad.ndim - 1,), (1,))
    return grad_hidden, _kernel_gradient(hidden, grad, num_inputs=1)


_logits_on_cpu.defvjp(_logits_forward, _logits_backward)


def _kernel_gradient(x: jax.Array, grad: jax.Array, num_inputs: int) -> jax.Array:
    """Returns x [..., in dims] times grad [..., out dims], added up over `...`."""
    batch = tuple(range(x.ndim - num_inputs))
    inputs, outputs = x.shape[len(batch) :], grad.shape[len(batch) :]
    if has_fast_path(x):
        # It contracts the last axis of the left side. A row of zeros keeps XLA from taking the
        # transposition into the product again, and goes away after it.
        x_IB = jnp.pad(x.reshape(-1, math.prod(inputs)).T, ((0, 1), (0, 0)))
        grad_kernel = _dot(x_IB, grad.reshape(-1, math.prod(outputs)), (1,), (0,))
        return grad_kernel[:-1].reshape(*inputs, *outputs)
    if context_platform() != "cpu" or x.size <= grad.size:
        return _dot(x, grad, batch, batch)
    # XLA's product on a CPU transposes the left side, together with what made it, an activation
    # function for one, at a stride. So the narrower side goes there. Without the barrier XLA
    # would turn the product round again, to save the transposition of what it returns.
    turned = jax.lax.optimization_barrier(_dot(grad, x, batch, batch))
    return jnp.moveaxis(turned, range(len(outputs)), range(-len(outputs), 0))


def _dot(a, b, axes_of_a, axes_of_b):
    """Returns the product over these axes, in the dtype of `a`."""
    if has_fast_path(a):
        return _wide_dot(a, b, axes_of_a, axes_of_b).astype(a.dtype)
    return jax.lax.dot_general(a, b, ((axes_of_a, axes_of_b), ((), ())))


def _wide_dot(a, b, axes_of_a, axes_of_b):
    dims = ((axes_of_a, axes_of_b), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def has_fast_path(x: jax.Array) -> bool:
    """Returns whether products of such arrays are faster when asked for float32 results.

    They are for bfloat16 on a CPU, by a factor of three; elsewhere it would sum up parts of a
    split product in float32, and exchange twice the bytes.
    """
    return x.dtype == jnp.bfloat16 and context_platform() == "cpu"
