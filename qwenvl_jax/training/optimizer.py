"""Which parameter is trained, how fast, and the AdamW update (paper Table 8).

Everything is keyed by the dotted parameter path. `plan_parameters` decides once, before any array
exists; `describe_plan` prints that decision; the update only carries it out.

K: stacked layers.
"""

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qwenvl_jax.config import ConfigError, OptimizerConfig, ParameterRule
from qwenvl_jax.model.lora import pair_of
from qwenvl_jax.sharding import named_variables
from qwenvl_jax.words import counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterPlan:
    """What happens to one parameter."""

    is_trained: bool
    weight_decay: float
    rate: tuple[float, ...]  # factor on the learning rate: one for all, or one a stacked layer

    def rate_for(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the factor as an array that broadcasts against a parameter of `shape`."""
        return np.asarray(self.rate, np.float32).reshape(-1, *(1,) * (len(shape) - 1))


def plan_parameters(
    abstract: nnx.State, table: Sequence[ParameterRule]
) -> dict[str, ParameterPlan]:
    """Returns the plan of every parameter, by path: what the first row that matches it says.

    Fixed tables (a Variable that is no Param) are saved and converted but no parameters: no row
    reaches them.

    Raises:
        ConfigError: rows that match nothing, that earlier ones leave nothing to, or whose layer
            decay meets no stacked layers; parameters without a row; all are named together.
    """
    variables = named_variables(abstract)
    paths = [path for path, variable in variables.items() if isinstance(variable, nnx.Param)]
    depth = {
        path.split(".")[0]: variables[path].get_value().shape[0]
        for path in paths
        if _is_stacked(path)
    }
    rows = {path: next((r for r in table if _matches(r, path)), None) for path in paths}
    problems = _problems(table, rows, depth) + _trained_twice(rows)
    if problems:
        raise ConfigError(
            f"the table TrainConfig.parameters does not fit the model: {'; '.join(problems)}"
        )
    fixed = ParameterPlan(is_trained=False, weight_decay=0.0, rate=(1.0,))
    plan = dict.fromkeys(variables, fixed)
    for path, row in rows.items():
        assert row is not None  # _problems names paths without one
        plan[path] = ParameterPlan(
            is_trained=row.is_trained,
            weight_decay=row.weight_decay,
            rate=_rates(row, path, depth.get(path.split(".")[0], 0)),
        )
    return plan


def trained_parts(plan: Mapping[str, ParameterPlan]) -> set[str]:
    """Returns those of `vit`, `adapter` and `decoder` that hold a trained parameter."""
    return {path.split(".")[0] for path, parameter in plan.items() if parameter.is_trained}


def _matches(row: ParameterRule, path: str) -> bool:
    return fnmatch.fnmatchcase(path, row.pattern)


def _is_stacked(path: str) -> bool:
    return path.split(".")[1] == "blocks"


def _trained_twice(rows: Mapping[str, ParameterRule | None]) -> list[str]:
    """Returns a phrase where kernels train beside their LoRA pairs, which are to save just that."""

    def trains(path: str) -> bool:
        row = rows.get(path)
        return row is not None and row.is_trained

    twice = [path for path in rows if trains(path) and any(map(trains, pair_of(path)))]
    if not twice:
        return []
    more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
    return [
        f"{twice[0]}{more} would train beside a LoRA pair: use the table lora_only(), as in "
        "configs/finetune_lora.py, or set model.lora.rank=0"
    ]


def _problems(
    table: Sequence[ParameterRule],
    rows: dict[str, ParameterRule | None],
    depth: dict[str, int],
) -> list[str]:
    """Returns what is wrong with the table, one phrase a fault."""
    found = []
    for number, row in enumerate(table):
        reached = [path for path in rows if _matches(row, path)]
        earlier = {r.pattern: None for r in table[:number] for p in reached if _matches(r, p)}
        if not reached:
            near = difflib.get_close_matches(row.pattern, rows, n=1, cutoff=0.0)[0]
            found.append(f"row {row.pattern!r} matches no parameter (one is {near})")
        elif all(any(_matches(r, path) for r in table[:number]) for path in reached):
            found.append(
                f"row {row.pattern!r} has no effect, because {', '.join(map(repr, earlier))} "
                "before it match all that it does: move it up, or drop it"
            )
        elif row.layer_decay != 1.0 and not any(p.split(".")[0] in depth for p in reached):
            found.append(f"row {row.pattern!r} has a layer_decay and matches no stacked layers")
    bare = [path for path, row in rows.items() if row is None]
    if bare:
        listed = ", ".join(bare[:3]) + (", ..." if len(bare) > 3 else "")
        found.append(
            f"no row matches {counted(len(bare), 'parameter')} ({listed}): add a row '*' at the end"
        )
    return found


# All that follows a part's blocks; the tower and the adapter have nothing there.
_BEHIND_THE_BLOCKS = ("decoder.ln_f.", "decoder.lm_head.")


def _rates(row: ParameterRule, path: str, num_layers: int) -> tuple[float, ...]:
    if row.layer_decay == 1.0:
        return (row.rate,)
    if _is_stacked(path):
        return tuple(row.rate * row.layer_decay ** (num_layers - i) for i in range(num_layers))
    if not num_layers or path.startswith(_BEHIND_THE_BLOCKS):
        return (row.rate,)
    return (row.rate * row.layer_decay ** (num_layers + 1),)


def learning_rate(step: jax.Array, config: OptimizerConfig, num_steps: int) -> jax.Array:
    """Returns the rate of the 0-based `step`: linear from 0, then cosine to `end_lr`."""
    step = jnp.asarray(step, jnp.float32)
    warm = config.peak_lr * step / max(1, config.warmup_steps)
    past = (step - config.warmup_steps) / (num_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + jnp.cos(math.pi * jnp.clip(past, 0.0, 1.0)))
    decayed = config.end_lr + (config.peak_lr - config.end_lr) * cosine
    return jnp.where(step < config.warmup_steps, warm, decayed)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns what keeps AdamW's moments, of a dict of the trained parameters."""
    return optax.chain(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.identity(),  # so that the state is what it was when runs of before were saved
    )


def stepped(
    parameters: dict[str, jax.Array],
    moments: Any,
    rate: jax.Array,
    config: OptimizerConfig,
    plan: dict[str, ParameterPlan],
) -> dict[str, jax.Array]:
    """Returns the parameters after AdamW's step, from moments that have seen its gradients.

    The learning rate is an argument, because it follows the run's step and not the number of
    updates made: a step whose update was dropped must not shift the schedule.
    """
    adam = moments[0]
    means = optax.tree.bias_correction(adam.mu, config.beta1, adam.count)
    squares = optax.tree.bias_correction(adam.nu, config.beta2, adam.count)

    def of(name: str, p: jax.Array) -> jax.Array:
        scaled = means[name] / (jnp.sqrt(squares[name]) + config.eps)
        step = (scaled + plan[name].weight_decay * p) * plan[name].rate_for(p.shape)
        return p - (rate * step).astype(p.dtype)

    return {name: of(name, p) for name, p in parameters.items()}


def clipped_mean(
    sums: dict[str, jax.Array], count: jax.Array, limit: float
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns (sums over count, scaled to a global norm of at most `limit`; the norm before).

    In one multiplication: the mean by itself is never written to memory.
    """
    norm = optax.tree.norm(sums) / count
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12)) / count
    return {name: g * scale for name, g in sums.items()}, norm


def describe_plan(abstract: nnx.State, plan: dict[str, ParameterPlan]) -> str:
    """Returns a table: what trains, with sizes, rate factors and weight decay, part by part."""
    groups: dict[str, list[tuple[int, ParameterPlan]]] = {}
    for path, variable in named_variables(abstract).items():
        names = path.split(".")
        group = ".".join(names[:2]) if names[1] == "blocks" else names[0]
        groups.setdefault(group, []).append((variable.get_value().size, plan[path]))
    lines = [f"{'part':<14}{'trained':>14}{'fixed':>14}{'decayed':>14}  {'rate':<16}decay"]
    totals = [0, 0, 0]
    for group, rows in groups.items():
        trained = [(size, row) for size, row in rows if row.is_trained]
        counts = [
            sum(size for size, _ in trained),
            sum(size for size, row in rows if not row.is_trained),
            sum(size for size, row in trained if row.weight_decay),
        ]
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        rates = _span([rate for _, row in trained for rate in row.rate]) if trained else "frozen"
        decays = _span([row.weight_decay for _, row in trained if row.weight_decay])
        counted = "".join(f"{count:>14,}" for count in counts)
        lines.append(f"{group:<14}{counted}  {rates:<16}{decays}".rstrip())
    lines.append(f"{'total':<14}" + "".join(f"{count:>14,}" for count in totals))
    return "\n".join(lines)


def _span(values: list[float]) -> str:
    if not values:
        return ""
    least, most = min(values), max(values)
    return f"{least:.4g}" if least == most else f"{least:.4g} .. {most:.4g}"
