"""The randomness of a training step: a key that the step lends, and dropout that takes it.

Everywhere else a model is a pure function of its arguments, so no signature carries a key: the step
lends one while it is traced, `layers.scan_layers` deals it out to the layers, and whoever computes
without one (inference, evaluation, conversion) gets no noise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp

_KEY: ContextVar[jax.Array | None] = ContextVar("key of a training step", default=None)


@contextmanager
def noise(key: jax.Array | None) -> Iterator[None]:
    """Lends a key to what is traced inside; None lends none."""
    token = _KEY.set(key)
    try:
        yield
    finally:
        _KEY.reset(token)


def layer_keys(num_layers: int) -> jax.Array | None:
    """Returns a key for each of so many layers, if one was lent."""
    key = _KEY.get()
    return None if key is None else jax.random.split(key, num_layers)


def dropout(x: jax.Array, rate: float, number: int) -> jax.Array:
    """Returns x with a share `rate` of its numbers at zero, the others larger: the mean stays.

    Without a key x as it is. Calls in one layer need different numbers, lest they drop the same.
    """
    key = _KEY.get()
    if key is None or not rate:
        return x
    is_kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - rate, x.shape)
    return jnp.where(is_kept, x / (1 - rate), 0)
