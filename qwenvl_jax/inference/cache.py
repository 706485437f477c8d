"""The few sizes that compiled programs come in, and the empty key-value cache.

XLA compiles once for every shape. Prompts, answers, rows and pictures are therefore rounded up to
the sizes 1, 2, 3, 4, 6, 8, 12, ... times a smallest one: at most half is padding, a quarter on
average, and a second prompt of another length usually meets a program that is there already.
"""

import jax.numpy as jnp

from qwenvl_jax.config import ModelConfig
from qwenvl_jax.model.decoder import KVCache
from qwenvl_jax.model.narrow import held_dtype

SMALLEST_PROMPT = 64
SMALLEST_ANSWER = 32


def bucket(count: int, smallest: int) -> int:
    """Returns the least of smallest x (1, 1.5, 2, 3, 4, 6, ...) that holds `count`.

    The half steps are left out where they are no whole numbers.

    >>> [bucket(count, 64) for count in (1, 65, 97, 200)]
    [64, 96, 128, 256]
    """
    size = smallest
    while size < count:
        half_step = size + size // 2
        if size % 2 == 0 and half_step >= count:
            return half_step
        size *= 2
    return size


def prompt_bucket(length: int, config: ModelConfig) -> int:
    """Returns the padded length of a prompt, never beyond what the model accepts."""
    return max(length, min(bucket(length, SMALLEST_PROMPT), config.decoder.max_positions))


def row_bucket(rows: int) -> int:
    """Returns the next power of two."""
    return 1 << (rows - 1).bit_length()


def empty_cache(config: ModelConfig, rows: int, slots: int) -> KVCache:
    """Returns a cache of zeros for the compute dtype: [layers, rows, slots, heads, head_dim]."""
    decoder = config.decoder
    shape = (decoder.num_layers, rows, slots, decoder.num_heads, decoder.head_dim)
    return KVCache(
        k_KBSNH=jnp.zeros(shape, held_dtype(config.dtype)),
        v_KBSNH=jnp.zeros(shape, held_dtype(config.dtype)),
        segment_BS=jnp.zeros((rows, slots), jnp.int32),
        position_BS=jnp.zeros((rows, slots), jnp.int32),
        length=jnp.int32(0),
    )
