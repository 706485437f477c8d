"""Prompts to answers: one prefill, then a decode loop that stays on the device.

Axes: B rows  L prompt length, padded  S cached length  T answer slots  D text width
      V vocabulary rows  W tokens fed at a time, of which the first is real.
`start` runs the prompts and chooses the first token; `decode` goes on until every row is done or a
step is reached, so whole answers (one host visit) and streams (one visit every few tokens) run the
same compiled program. Rows are right-padded and all write their keys at the same cache slot:
padding is in segment 0, which nobody sees.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from qwenvl_jax.config import ModelConfig
from qwenvl_jax.inference import sampling as sampling_lib
from qwenvl_jax.inference.cache import SMALLEST_ANSWER, bucket, empty_cache
from qwenvl_jax.inference.prompts import Prompts
from qwenvl_jax.inference.sampling import Sampling, SamplingArrays, host_array
from qwenvl_jax.model.decoder import KVCache, ntk_alpha
from qwenvl_jax.sharding import decoding_sharding

SMALLEST_STOP_LIST = 8  # stop ids a row, padded, so that one more does not compile again
NO_TOKEN = -1


class Request(NamedTuple):
    """What each row asks for besides its prompt."""

    sampling: SamplingArrays
    max_new_B: Int[Array, "B"]
    stop_BX: Int[Array, "B X"]  # ids that end the row and are left out of the answer; or NO_TOKEN


class Decoding(NamedTuple):
    """All that the loop needs besides the weights. Each row has produced `step` tokens."""

    cache: KVCache
    alpha_B: Float[Array, "B"]  # growth of the rotary base, fixed by the prompt
    step: Int[Array, ""]
    position_B: Int[Array, "B"]  # of the newest token
    answer_BT: Int[Array, "B T"]
    count_B: Int[Array, "B"]  # tokens of the answer that count
    is_done_B: Bool[Array, "B"]
    seen_BV: Bool[Array, "B V"]  # tokens of prompt and answer, for the repetition penalty
    logits_BV: Float[Array, "B V"]  # what the newest token was chosen from


class Generator:
    """Compiled generation for one model on one mesh. Holds no state between calls."""

    def __init__(self, config: ModelConfig, graphdef: nnx.GraphDef, state: nnx.State, mesh: Mesh):
        self._state, self._mesh = state, mesh
        fixed = (graphdef, config, mesh)
        self._start = jax.jit(partial(start, *fixed), static_argnames="answer_slots")
        self._decode = jax.jit(partial(decode, *fixed), donate_argnames="decoding")

    def run(
        self,
        prompts: Prompts,
        sampling: Sequence[Sampling],
        max_new_tokens: Sequence[int],
        stop_tokens: Sequence[Sequence[int]],
    ) -> list[list[int]]:
        """Returns the new tokens of each row, without the stop token that ended it."""
        *_, answers = self.stream(
            prompts, sampling, max_new_tokens, stop_tokens, every=max(max_new_tokens)
        )
        return answers

    def stream(
        self,
        prompts: Prompts,
        sampling: Sequence[Sampling],
        max_new_tokens: Sequence[int],
        stop_tokens: Sequence[Sequence[int]],
        *,
        every: int,
    ) -> Iterator[list[list[int]]]:
        """Yields all new tokens of each row so far, again and again, `every` tokens apart."""
        rows, num_rows = len(sampling), len(prompts.tokens_BL)
        spare = num_rows - rows  # rows that only fill the bucket: done before they begin
        request = Request(
            sampling=sampling_lib.stack([*sampling, *[Sampling()] * spare]),
            max_new_B=host_array([*max_new_tokens, *[0] * spare], np.int32),
            stop_BX=_stop_table([*stop_tokens, *[()] * spare]),
        )
        prompts, request = place((prompts, request), self._mesh)
        answer_slots = bucket(max(1, *max_new_tokens), SMALLEST_ANSWER)
        with jax.set_mesh(self._mesh):  # for kernels and constraints that name mesh axes only
            decoding = self._start(self._state, prompts, request, answer_slots=answer_slots)
        until = 0
        is_done = False
        while not is_done:
            until += every
            with jax.set_mesh(self._mesh):
                decoding = self._decode(
                    self._state, request, decoding=decoding, until=np.int32(until)
                )
            answer_BT, count_B, done_B = jax.device_get(
                (decoding.answer_BT, decoding.count_B, decoding.is_done_B)
            )
            is_done = bool(done_B.all())
            yield [answer_BT[b, : count_B[b]].tolist() for b in range(rows)]


def start(
    graphdef: nnx.GraphDef,
    config: ModelConfig,
    mesh: Mesh,
    state: nnx.State,
    prompts: Prompts,
    request: Request,
    *,
    answer_slots: int,
) -> Decoding:
    """Returns the decoding state after the prompts, with the first token chosen.

    Logits are made for the last real token of each row only.
    """
    model = nnx.merge(graphdef, state)
    B, L = prompts.tokens_BL.shape
    width = _feed_width(B, config, mesh)
    slots = L + answer_slots + width - 1
    cache = _pin(empty_cache(config, B, slots), mesh)
    alpha_B = rotary_alpha(prompts, config)
    is_real_BL = jnp.arange(L) < prompts.length_B[:, None]
    hidden_BLD, cache = model(
        prompts.tokens_BL,
        visual_BIQD=prompts.visual_BIQD,
        image_start_BI=prompts.image_start_BI,
        position_BL=prompts.position_start_B[:, None] + jnp.arange(L),
        segment_BL=is_real_BL.astype(jnp.int32),
        ntk_alpha_B=alpha_B,
        cache=cache,
    )
    last_B11 = jnp.maximum(prompts.length_B - 1, 0)[:, None, None]
    last_B1D = jnp.take_along_axis(hidden_BLD, last_B11, axis=1)
    last_BWD = jnp.repeat(last_B1D, width, axis=1)
    vocab_size = config.decoder.vocab_size
    seen_BV = jnp.zeros((B, vocab_size), bool)
    seen_BV = seen_BV.at[
        jnp.arange(B)[:, None], jnp.where(is_real_BL, prompts.tokens_BL, vocab_size)
    ].set(True, mode="drop")
    decoding = Decoding(
        cache=cache,
        alpha_B=alpha_B,
        step=jnp.int32(0),
        position_B=jnp.asarray(prompts.position_start_B + prompts.length_B - 1),
        answer_BT=jnp.zeros((B, answer_slots), jnp.int32),
        count_B=jnp.zeros(B, jnp.int32),
        is_done_B=request.max_new_B <= 0,
        seen_BV=seen_BV,
        logits_BV=model.logits(last_BWD)[:, 0],
    )
    return _pin(_choose(decoding, request), mesh)


def decode(
    graphdef: nnx.GraphDef,
    config: ModelConfig,
    mesh: Mesh,
    state: nnx.State,
    request: Request,
    *,
    decoding: Decoding,
    until: Int[Array, ""],
) -> Decoding:
    """Returns the state once every row is done or has `until` tokens. `decoding` is donated."""
    model = nnx.merge(graphdef, state)
    B = len(decoding.count_B)
    width = _feed_width(B, config, mesh)

    def is_unfinished(decoding: Decoding) -> jax.Array:
        return (decoding.step < until) & ~jnp.all(decoding.is_done_B)

    def step(decoding: Decoding) -> Decoding:
        newest_B1 = jax.lax.dynamic_slice_in_dim(decoding.answer_BT, decoding.step - 1, 1, axis=1)
        is_real_W = jnp.arange(width) == 0
        hidden_BWD, cache = model(
            jnp.pad(newest_B1, ((0, 0), (0, width - 1))),
            position_BL=decoding.position_B[:, None] + jnp.arange(width),
            segment_BL=jnp.broadcast_to(is_real_W.astype(jnp.int32), (B, width)),
            ntk_alpha_B=decoding.alpha_B,
            cache=decoding.cache,
        )
        # The next token overwrites the slots of the fillers.
        cache = cache._replace(length=cache.length - (width - 1))
        logits_BV = model.logits(hidden_BWD)[:, 0]
        return _choose(decoding._replace(cache=cache, logits_BV=logits_BV), request)

    return _pin(jax.lax.while_loop(is_unfinished, step, decoding), mesh)


def _choose(decoding: Decoding, request: Request) -> Decoding:
    """Returns the state with every row's next token chosen from `logits_BV` and written down."""
    B = len(decoding.count_B)
    step_B = jnp.broadcast_to(decoding.step, B)
    token_B = sampling_lib.choose(decoding.logits_BV, decoding.seen_BV, request.sampling, step_B)
    is_stop_B = jnp.any(token_B[:, None] == request.stop_BX, axis=1)
    is_done_B = decoding.is_done_B | is_stop_B
    count_B = decoding.count_B + ~is_done_B
    return decoding._replace(
        step=decoding.step + 1,
        position_B=decoding.position_B + 1,
        answer_BT=jax.lax.dynamic_update_slice_in_dim(
            decoding.answer_BT, token_B[:, None], decoding.step, axis=1
        ),
        count_B=count_B,
        is_done_B=is_done_B | (count_B >= request.max_new_B),
        seen_BV=decoding.seen_BV.at[jnp.arange(B), token_B].set(True),
    )


def rotary_alpha(prompts: Prompts, config: ModelConfig) -> Float[Array, "B"]:
    """Returns how much each row's rotary base grows; fixed by the prompt, also while it goes on."""
    if not config.decoder.use_dynamic_ntk:
        return jnp.ones(len(prompts.length_B), jnp.float32)
    return ntk_alpha(jnp.asarray(prompts.ntk_length_B), config.decoder.seq_length)


def _feed_width(rows: int, config: ModelConfig, mesh: Mesh) -> int:
    """Returns how many tokens of a row one decode step feeds: 1, or more where fillers are faster.

    On a CPU, XLA multiplies fewer than four rows of bf16 on a path about ten times slower than
    four of them. Filler tokens in segment 0 make up the four, without copies of the cache.
    """
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    return max(1, 4 // rows) if is_cpu and config.dtype == "bfloat16" else 1


def _stop_table(stop_tokens: Sequence[Sequence[int]]) -> Any:
    width = bucket(max(len(row) for row in stop_tokens), SMALLEST_STOP_LIST)
    rows = [[*row, *[NO_TOKEN] * (width - len(row))] for row in stop_tokens]
    return host_array(rows, np.int32)


def place(tree, mesh: Mesh):
    """Returns host arrays on the mesh, their first axis over the batch axes where it divides."""
    return jax.tree.map(lambda x: jax.device_put(x, decoding_sharding(x.shape, mesh)), tree)


def _pin(tree, mesh: Mesh):
    """Returns the tree with every placement fixed: rows over the batch axes, heads over `tensor`.

    What goes into `decode` and what comes out must be placed alike, or the second call of a stream
    would compile again.
    """
    pin = jax.lax.with_sharding_constraint
    return jax.tree.map(lambda x: pin(x, decoding_sharding(x.shape, mesh)), tree)
