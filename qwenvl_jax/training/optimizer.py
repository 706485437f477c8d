"""Which parameter is trained, how fast, and the AdamW update (paper Table 8).

Everything is keyed by the dotted parameter path. `plan_parameters` decides once, before any array
exists; `describe_plan` prints that decision; the update only carries it out.

K: stacked layers.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qwenvl_jax.config import ConfigError, OptimizerConfig, TrainConfig
from qwenvl_jax.sharding import named_variables

PARTS = ("vit", "adapter", "decoder")

# Weight decay by the last name of the path: a tensor decays when it has two or more dimensions in
# the released layout. Our own dimensions do not tell, because projection biases are [N, H] here.
DECAYS = {
    "kernel": True,
    "embedding": True,
    "position_embed": True,  # of the tower; the adapter's table is never trained
    "query": True,
    "scale": False,
    "bias": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterPlan:
    """What happens to one parameter."""

    is_trained: bool
    decays: bool
    rate: tuple[float, ...]  # factor on the learning rate: one for all, or one a stacked layer

    def rate_for(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the factor as an array that broadcasts against a parameter of `shape`."""
        return np.asarray(self.rate, np.float32).reshape(-1, *(1,) * (len(shape) - 1))


def plan_parameters(abstract: nnx.State, config: TrainConfig) -> dict[str, ParameterPlan]:
    """Returns the plan of every parameter, by path.

    Tower layer decay d over K blocks: block i has factor d**(K-i), what comes before the blocks
    d**(K+1); adapter and decoder have 1. Weight decay is scaled by the same factor, as in AdamW
    with one parameter group a layer.

    Raises:
        ConfigError: a parameter has a last name without a row in DECAYS, or nothing is trained.
    """
    variables = named_variables(abstract)
    plan = {}
    for path, variable in variables.items():
        part, leaf = path.split(".")[0], path.split(".")[-1]
        if part not in PARTS or leaf not in DECAYS:
            raise ConfigError(
                f"no weight decay rule for {path}: got part {part!r} and last name {leaf!r}, "
                f"expected one of {PARTS} and one of {tuple(DECAYS)}; add a row to DECAYS"
            )
        plan[path] = ParameterPlan(
            # A Variable that is no Param is a fixed table: saved and converted, never trained.
            is_trained=isinstance(variable, nnx.Param) and part not in config.freeze,
            decays=DECAYS[leaf],
            rate=_layer_rates(path, variables, config.optimizer.vit_layer_decay),
        )
    if not any(row.is_trained for row in plan.values()):
        raise ConfigError(f"nothing is trained: freeze={config.freeze}")
    return plan


def _layer_rates(path: str, variables: dict[str, nnx.Variable], decay: float) -> tuple[float, ...]:
    if not path.startswith("vit.") or decay == 1.0:
        return (1.0,)
    stacked = [v for name, v in variables.items() if name.startswith("vit.blocks.")]
    num_layers = stacked[0].get_value().shape[0]
    if path.startswith("vit.blocks."):
        return tuple(decay ** (num_layers - i) for i in range(num_layers))
    return (decay ** (num_layers + 1),)


def learning_rate(step: jax.Array, config: OptimizerConfig, num_steps: int) -> jax.Array:
    """Returns the rate of the 0-based `step`: linear from 0, then cosine to `end_lr`."""
    step = jnp.asarray(step, jnp.float32)
    warm = config.peak_lr * step / max(1, config.warmup_steps)
    past = (step - config.warmup_steps) / (num_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + jnp.cos(math.pi * jnp.clip(past, 0.0, 1.0)))
    decayed = config.end_lr + (config.peak_lr - config.end_lr) * cosine
    return jnp.where(step < config.warmup_steps, warm, decayed)


def make_optimizer(
    config: OptimizerConfig, plan: dict[str, ParameterPlan]
) -> optax.GradientTransformation:
    """Returns AdamW without its learning rate, over a dict of the trained parameters.

    The rate is not inside, because it follows the run's step and not the number of updates made:
    a step whose update was dropped must not shift the schedule.
    """

    def scale_by_rates(updates: Any, _: Any) -> dict[str, jax.Array]:
        return {name: u * plan[name].rate_for(u.shape) for name, u in updates.items()}

    def decays(parameters: Any) -> dict[str, bool]:
        return {name: plan[name].decays for name in parameters}

    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.stateless(scale_by_rates),
    )


def clip_by_norm(
    gradients: dict[str, jax.Array], limit: float
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns (gradients scaled to a global norm of at most `limit`, the norm before)."""
    norm = optax.tree.norm(gradients)
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
    return {name: g * scale for name, g in gradients.items()}, norm


def describe_plan(abstract: nnx.State, plan: dict[str, ParameterPlan]) -> str:
    """Returns a table: what trains, with sizes, rate factors and weight decay, part by part."""
    groups: dict[str, list[tuple[int, ParameterPlan]]] = {}
    for path, variable in named_variables(abstract).items():
        names = path.split(".")
        group = ".".join(names[:2]) if names[1] == "blocks" else names[0]
        groups.setdefault(group, []).append((variable.get_value().size, plan[path]))
    lines = [f"{'part':<16}{'trained':>16}{'fixed':>16}{'decayed':>16}  rate factor"]
    totals = [0, 0, 0]
    for group, rows in groups.items():
        trained = [(size, row) for size, row in rows if row.is_trained]
        counts = [
            sum(size for size, _ in trained),
            sum(size for size, row in rows if not row.is_trained),
            sum(size for size, row in trained if row.decays),
        ]
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        rates = [rate for _, row in trained for rate in row.rate]
        span = f"{min(rates):.4g} .. {max(rates):.4g}" if rates else "frozen"
        lines.append(f"{group:<16}" + "".join(f"{c:>16,}" for c in counts) + f"  {span}")
    lines.append(f"{'total':<16}" + "".join(f"{c:>16,}" for c in totals))
    return "\n".join(lines)
