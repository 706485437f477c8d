"""How the next token is chosen: greedy or drawn, with every knob an array with one value a row.

Axes: B rows  V vocabulary rows.
Everything runs on the device in float32. A row's draws depend on its own seed and on how many
tokens it has produced, never on its batch mates. Order of the filters: repetition penalty,
temperature, top-k, top-p. Source: the logits processors of transformers 4.32, which the released
`generate` goes through.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from qwenvl_jax.inference.errors import InputError, RequestOptions

GREEDY = 0.0
# Devices flush what is smaller to zero, and dividing by it would give no order.
SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
ALL_TOKENS = 2**31 - 1  # as many as the device's integers count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(RequestOptions):
    """One row's way of choosing; the defaults choose the most likely token.

    Raises:
        InputError: a value of another type or outside its range, by name.
    """

    temperature: float = GREEDY  # 0: the most likely token, and the filters below do nothing
    top_k: int = 0  # draw among so many most likely tokens; 0: among all
    top_p: float = 1.0  # draw among the fewest most likely tokens that hold this probability
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the answer become unlikely
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.temperature < 1e38:  # so that it is finite in float32 too
            raise InputError(
                f"temperature must be 0 or more, and below 1e38: got {self.temperature}"
            )
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or more: got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1]: got {self.top_p}")
        if not 0 < self.repetition_penalty < 1e38:  # so that it is finite in float32 too
            raise InputError(
                f"repetition_penalty must be above 0 and below 1e38: got {self.repetition_penalty}"
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must lie in 0 .. 2**63 - 1: got {self.seed}")


class SamplingArrays(NamedTuple):
    """The same for a batch, as the device sees it."""

    temperature_B: Float[Array, "B"]
    top_k_B: Int[Array, "B"]
    top_p_B: Float[Array, "B"]
    repetition_penalty_B: Float[Array, "B"]
    seed_B2: UInt32[Array, "B 2"]  # the upper and the lower half of the seed


def stack(rows: Sequence[Sampling]) -> SamplingArrays:
    """Returns the rows' values as host arrays."""
    seeds = [(row.seed >> 32, row.seed & 0xFFFFFFFF) for row in rows]
    temperatures = [
        row.temperature if row.temperature >= SMALLEST_TEMPERATURE else GREEDY for row in rows
    ]
    return SamplingArrays(
        temperature_B=host_array(temperatures, np.float32),
        top_k_B=host_array([min(row.top_k, ALL_TOKENS) for row in rows], np.int32),
        top_p_B=host_array([row.top_p for row in rows], np.float32),
        repetition_penalty_B=host_array([row.repetition_penalty for row in rows], np.float32),
        seed_B2=host_array(seeds, np.uint32),
    )


def host_array(values: Sequence[Any], dtype: type[np.generic]) -> Any:
    """Returns a NumPy array, typed as what it becomes once it is placed on the device."""
    return np.array(values, dtype)


def choose(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    sampling: SamplingArrays,
    step_B: Int[Array, "B"],
) -> Int[Array, "B"]:
    """Returns the next token of each row.

    `seen_BV` marks the tokens of the prompt and of the answer so far; `step_B` counts the tokens
    that each row has produced, and with the row's seed decides its draw.
    """
    penalty_B1 = sampling.repetition_penalty_B[:, None]
    penalised = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        keys = jax.vmap(_row_key)(sampling.seed_B2, step_B)
        drawn_B = jax.vmap(jax.random.categorical)(keys, keep_likely(logits_BV, sampling))
        return jnp.where(sampling.temperature_B > GREEDY, drawn_B.astype(jnp.int32), best_B)

    # A branch on the device: greedy batches never pay for sorting the vocabulary, and both kinds
    # share one compiled program.
    return jax.lax.cond(jnp.any(sampling.temperature_B > GREEDY), draw, lambda: best_B)


def keep_likely(logits_BV: Float[Array, "B V"], sampling: SamplingArrays) -> Float[Array, "B V"]:
    """Returns logits over temperature, minus infinity where top-k or top-p leave a token out.

    Each row's likeliest has 0, so that a small temperature makes no two of them infinite. Tokens
    exactly as likely as the last one kept are kept too. The likeliest always stays.
    """
    is_drawn_B1 = sampling.temperature_B[:, None] > GREEDY
    logits_BV -= jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = logits_BV / jnp.where(is_drawn_B1, sampling.temperature_B[:, None], 1.0)
    ranked_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    vocab_size = logits_BV.shape[-1]
    top_k_B1 = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, vocab_size)[:, None]
    in_k_BV = jnp.arange(vocab_size) < top_k_B1
    probability_BV = jax.nn.softmax(jnp.where(in_k_BV, ranked_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # top_p 1 must keep everything: rounding can lift the sum to 1 before the last token.
    in_p_BV = (before_BV < sampling.top_p_B[:, None]) | (sampling.top_p_B[:, None] >= 1)
    num_kept_B = jnp.maximum(1, jnp.sum(in_k_BV & in_p_BV, axis=-1))
    floor_B1 = jnp.take_along_axis(ranked_BV, num_kept_B[:, None] - 1, axis=-1)
    return jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)


def _row_key(seed_2: jax.Array, step: jax.Array) -> jax.Array:
    # threefry is named, because its draws are the same on every backend and for every sharding.
    return jax.random.fold_in(jax.random.wrap_key_data(seed_2, impl="threefry2x32"), step)
