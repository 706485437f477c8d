"""One optimizer step, as a pure function of (state, batch).

Axes: B batch rows, L text length, I pictures of a row, Y X C pixels, Q queries, D text width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwenvl_jax import axes
from qwenvl_jax.config import NO_IMAGE, ConfigError, TrainConfig
from qwenvl_jax.data.example import Batch
from qwenvl_jax.model.noise import noise
from qwenvl_jax.sharding import AXIS_TABLE, batch_sharding, num_parts
from qwenvl_jax.training.compiler import compiler_options
from qwenvl_jax.training.faults import disturb, parse_faults
from qwenvl_jax.training.guard import HELD, judge
from qwenvl_jax.training.loss import Sums, next_token_loss, no_sums, sum_up
from qwenvl_jax.training.optimizer import clipped_mean, learning_rate, make_optimizer, stepped
from qwenvl_jax.training.state import Layout, TrainState, Weights, merge_model
from qwenvl_jax.words import counted

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(config: TrainConfig, layout: Layout) -> TrainStep:
    """Returns the compiled step; the state that goes in is given up (donated).

    Metrics, scalars on the device: `loss` (mean over scored tokens of the whole batch),
    `grad_norm` (before clipping, trained parameters only), `lr`, `tokens` (without padding),
    `pairs` (of a token and one that it may look at), `scored_tokens`, `images`, `verdict` (one of
    `guard.REASONS`), `spike_score`, and the updates refused so far, `skipped`, and since the last
    good step, `refused_in_a_row`; and of `loss.Sums` the arrays `task_loss` and `task_weight`.

    Raises:
        ConfigError: the rows of a micro-batch do not divide over the devices.
    """
    check_rows(config, layout.mesh)
    optimizer = make_optimizer(config.optimizer)
    faults = parse_faults(config.simulate_fault)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, sums = _gradients(state, batch, config, layout)
        gradients, loss_sum = disturb(gradients, sums.loss, state.step + 1, faults)
        scored = jnp.where(sums.weight > 0, sums.weight, 1.0)
        loss = loss_sum / scored
        clipped, norm = clipped_mean(gradients, scored, config.optimizer.clip_norm)

        lr = learning_rate(state.step, config.optimizer, config.steps)
        is_applied, verdict, score, guard = judge(
            state.guard, loss, norm, sums.weight, config.guard
        )
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(is_applied, a, b), new, old)  # noqa: E731
        # Dropped, where they are, before they are used: XLA copies the old moments otherwise.
        moments = keep(optimizer.update(clipped, state.optimizer)[1], state.optimizer)
        trainable = stepped(state.trainable, moments, lr, config.optimizer, layout.plan)
        new_state = TrainState(
            step=state.step + jnp.where(verdict == HELD, 0, 1),
            trainable=keep(trainable, state.trainable),
            frozen=state.frozen,
            optimizer=moments,
            guard=guard,
        )
        metrics = _counts(batch, sums) | {
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "verdict": verdict,
            "spike_score": score,
            "skipped": guard.skipped,
            "refused_in_a_row": guard.in_a_row,
        }
        return new_state, metrics

    replicated = NamedSharding(layout.mesh, PartitionSpec())
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(layout.shardings, batch_sharding(layout.mesh)),
        out_shardings=(layout.shardings, replicated),
        compiler_options=compiler_options(layout.mesh),
    )


def _counts(batch: Batch, sums: Sums) -> Metrics:
    """Returns what is in a batch, which its work follows from, and what was scored of each task."""
    is_token = batch.segment > 0
    return {
        "tokens": is_token.sum(),
        "pairs": jnp.where(is_token, batch.position + 1.0, 0.0).sum(),
        "images": (batch.image_start < NO_IMAGE).sum(),
        "scored_tokens": sums.weight,
        "task_loss": sums.task_loss,
        "task_weight": sums.task_weight,
    }


def check_rows(config: TrainConfig, mesh: Mesh) -> None:
    """Raises ConfigError unless the rows of a micro-batch divide over the devices."""
    num_shards = num_parts(axes.BATCH, mesh)
    if config.data.rows % (config.micro_batches * num_shards):
        raise ConfigError(
            "data.rows must be a multiple of micro_batches x data x fsdp: "
            f"got rows={config.data.rows}, micro_batches={config.micro_batches} and rows split "
            f"over {counted(num_shards, 'device')}; change data.rows, micro_batches or mesh"
        )


def _gradients(
    state: TrainState, batch: Batch, config: TrainConfig, layout: Layout
) -> tuple[Weights, Sums]:
    """Returns (gradients of the summed loss, the sums)."""

    def loss_sum(trainable: Weights, part: Batch, key: jax.Array | None) -> tuple[jax.Array, Sums]:
        weights = trainable | state.frozen
        with noise(key):
            total, losses = batch_loss(layout.graphdef, weights, part, config.loss_chunk)
        return total, sum_up(losses, part)

    differentiate = jax.grad(loss_sum, has_aux=True)
    # Of the step alone: a run that goes on, and a step that is made again, draw what was drawn.
    key = None
    if config.model.lora.dropout:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    if config.micro_batches == 1:
        return differentiate(state.trainable, batch, key)

    spread = NamedSharding(layout.mesh, PartitionSpec(None, AXIS_TABLE[axes.BATCH]))

    def deal(x: jax.Array) -> jax.Array:
        # Row r goes to micro-batch r mod n: every device keeps its own rows in every micro-batch.
        parts = x.reshape(-1, config.micro_batches, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, spread)

    def add(total, dealt):
        return jax.tree.map(jnp.add, total, differentiate(state.trainable, *dealt)), None

    start = (jax.tree.map(jnp.zeros_like, state.trainable), no_sums())
    keys = None if key is None else jax.random.split(key, config.micro_batches)
    total, _ = jax.lax.scan(add, start, (jax.tree.map(deal, batch), keys))
    return total


def batch_loss(
    graphdef: nnx.GraphDef, weights: Weights, batch: Batch, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Returns what `next_token_loss` does of a batch: the sum, and every target's loss [B, L].

    In training mode: no NTK, no log-n. Dropout, where `noise` lends a key.
    """
    model = merge_model(graphdef, weights)
    arrays: Any = jax.tree.map(jnp.asarray, batch)
    num_rows, num_images = arrays.image_start.shape
    visual_BIQD = None
    if num_images:
        images_IYXC = arrays.images.reshape(-1, *arrays.images.shape[2:])
        visual_IQD = model.encode_images(images_IYXC)
        visual_BIQD = visual_IQD.reshape(num_rows, num_images, *visual_IQD.shape[1:])
    hidden_BLD, _ = model(
        arrays.tokens,
        visual_BIQD=visual_BIQD,
        image_start_BI=arrays.image_start if num_images else None,
        position_BL=arrays.position,
        segment_BL=arrays.segment,
    )
    lm_head_DV = model.decoder.lm_head.kernel[...]
    return next_token_loss(hidden_BLD, lm_head_DV, arrays.targets, arrays.loss_weight, chunk)
