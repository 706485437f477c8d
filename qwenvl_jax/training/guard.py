"""Which updates are applied: decided inside the step, from numbers that every device agrees on.

A step whose loss or gradient is not finite, that scores nothing, or whose loss jumps (policies
`skip` and `rewind`) leaves parameters and moments bit-equal and is counted. After one that the host
runs again, to tell data from hardware, the state is on hold: the steps that were sent behind it
change nothing, so that the host finds the very state that the bad step had met.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwenvl_jax.config import GuardConfig

WINDOW = 128  # accepted losses that a new one is held against
ENOUGH = 32  # of them, before a jump can be told from a start

# What a step comes to: the metric `verdict`.
FINE, NOT_FINITE, SPIKE, NOTHING_SCORED, HELD = range(5)
REASONS = {
    FINE: "fine",
    NOT_FINITE: "not finite",
    SPIKE: "loss spike",
    NOTHING_SCORED: "nothing scored",
    HELD: "on hold",
}


class GuardState(NamedTuple):
    """The guard's memory, a part of the training state; in an abstract state, its shapes."""

    skipped: jax.Array  # int32: steps so far whose update was refused
    in_a_row: jax.Array  # int32: of them, those since the last good one
    hold: jax.Array  # int32: 1 while steps change nothing, until the host has looked
    seen: jax.Array  # int32: accepted losses so far
    losses: jax.Array  # float32 [WINDOW]: the last of them, loss n at n mod WINDOW


def fresh_guard() -> GuardState:
    """Returns the memory of a run that has not begun."""
    # One array each, not one four times: the step donates every one of them.
    zeros = [jnp.zeros((), jnp.int32) for _ in range(4)]
    return GuardState(*zeros, losses=jnp.zeros(WINDOW, jnp.float32))


def spike_score(guard: GuardState, loss: jax.Array) -> jax.Array:
    """Returns by how many deviations `loss` lies above the last ones; 0 while they are too few."""
    known = jnp.arange(WINDOW) < guard.seen
    count = jnp.maximum(known.sum(), 1)
    mean = jnp.where(known, guard.losses, 0.0).sum() / count
    variance = jnp.where(known, jnp.square(guard.losses - mean), 0.0).sum() / count
    # The floor: losses that hardly vary, as of a model that has learned its data by heart.
    deviation = jnp.maximum(jnp.sqrt(variance), 1e-3 * jnp.abs(mean) + 1e-6)
    return jnp.where(guard.seen >= ENOUGH, (loss - mean) / deviation, 0.0)


def refuses_spikes(config: GuardConfig) -> bool:
    """Returns whether the policy leaves out the update of a step whose loss jumps."""
    return config.spike in ("skip", "rewind")


def judge(
    guard: GuardState,
    loss: jax.Array,
    norm: jax.Array,
    scored: jax.Array,
    config: GuardConfig,
) -> tuple[jax.Array, jax.Array, jax.Array, GuardState]:
    """Returns (is the update applied, the verdict, the spike score, the guard after this step)."""
    score = spike_score(guard, loss)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(scored)
    is_spike = (score > config.spike_sigmas) & (config.spike != "off")
    verdict = jnp.where(is_spike, SPIKE, FINE)
    verdict = jnp.where(scored > 0, verdict, NOTHING_SCORED)
    verdict = jnp.where(is_finite, verdict, NOT_FINITE)
    is_refused_spike = (verdict == SPIKE) & refuses_spikes(config)
    is_good = (verdict == FINE) | ((verdict == SPIKE) & ~is_refused_spike)
    needs_look = (verdict == NOT_FINITE) | is_refused_spike

    in_a_row = jnp.where(is_good, 0, guard.in_a_row + 1)
    needs_look |= in_a_row >= config.stop_after
    index = jnp.arange(WINDOW) == guard.seen % WINDOW
    after = GuardState(
        skipped=guard.skipped + jnp.where(is_good, 0, 1),
        in_a_row=in_a_row,
        hold=needs_look.astype(jnp.int32),
        seen=guard.seen + jnp.where(is_good, 1, 0),
        losses=jnp.where(index & is_good, loss, guard.losses),
    )
    is_held = guard.hold > 0
    after = jax.tree.map(lambda old, new: jnp.where(is_held, old, new), guard, after)
    return is_good & ~is_held, jnp.where(is_held, HELD, verdict), score, after
