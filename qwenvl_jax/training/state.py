"""What a run carries from step to step, and how it lies on the mesh.

Weights are flat dicts from the dotted parameter path to an array, split into the trained and the
frozen ones: only the first has gradients and optimizer memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qwenvl_jax.checks import unused
from qwenvl_jax.config import TrainConfig
from qwenvl_jax.model.qwenvl import QwenVL, abstract_state, draw_state
from qwenvl_jax.sharding import fill, named_arrays, named_variables, select, with_shardings
from qwenvl_jax.training.guard import GuardState, fresh_guard
from qwenvl_jax.training.optimizer import ParameterPlan, make_optimizer, plan_parameters

Weights = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a step reads and writes; `step` counts finished steps, applied or not.

    In an abstract state every leaf is a ShapeDtypeStruct.
    """

    step: Any  # int32 scalar
    trainable: Weights
    frozen: Weights
    optimizer: Any  # of optax: two moments of every trained parameter
    guard: GuardState


class Layout(NamedTuple):
    """The fixed side of a run: decided from the config and the mesh, before any array exists."""

    mesh: Any  # a Mesh; abstract where only sizes are asked for
    graphdef: nnx.GraphDef
    model_state: nnx.State  # of ShapeDtypeStructs that carry their shardings
    plan: dict[str, ParameterPlan]
    abstract: TrainState  # of ShapeDtypeStructs that carry their shardings

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def make_layout(config: TrainConfig, mesh: Mesh | AbstractMesh) -> Layout:
    """Returns names, shapes, placement and training plan of a run; allocates nothing."""
    graphdef, state = abstract_state(config.model)
    state = with_shardings(state, mesh)
    plan = plan_parameters(state, config.parameters)
    state = _with_frozen_dtype(state, plan, config.frozen_dtype or config.model.param_dtype)
    trainable, frozen = split_weights(named_arrays(state), plan)
    moments = jax.eval_shape(make_optimizer(config.optimizer).init, trainable)
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A moment lies where its parameter lies; both are found under the same dict key.
        parameter = trainable.get(getattr(path[-1], "key", ""))
        sharding = parameter.sharding if parameter is not None else replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    abstract = TrainState(
        step=scalar,
        trainable=trainable,
        frozen=frozen,
        optimizer=jax.tree_util.tree_map_with_path(place, moments),
        guard=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
            jax.eval_shape(fresh_guard),
        ),
    )
    return Layout(mesh, graphdef, state, plan, abstract)


def check_frozen_dtype(config: TrainConfig, layout: Layout) -> None:
    """Raises ConfigError where `frozen_dtype` is set, and every parameter trains."""
    variables = named_variables(layout.model_state).items()
    trains = (layout.plan[path].is_trained for path, x in variables if isinstance(x, nnx.Param))
    if all(trains):
        under = "a table by which all trains; freeze some with is_trained=False"
        unused(config, "TrainConfig", ["frozen_dtype"], under)


def _with_frozen_dtype(state: nnx.State, plan: dict[str, ParameterPlan], dtype: str) -> nnx.State:
    """Returns the state with this dtype for parameters that do not train; tables keep theirs."""
    arrays = {}
    for path, variable in named_variables(state).items():
        x = variable.get_value()
        if isinstance(variable, nnx.Param) and not plan[path].is_trained:
            x = jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)
        arrays[path] = x
    return fill(state, arrays)


def split_weights(
    weights: dict[str, Any], plan: dict[str, ParameterPlan]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (trained, frozen), two dicts by path."""
    trainable = {name: x for name, x in weights.items() if plan[name].is_trained}
    frozen = {name: x for name, x in weights.items() if not plan[name].is_trained}
    return trainable, frozen


def random_weights(
    config: TrainConfig, layout: Layout, only: Callable[[str], bool] = lambda path: True
) -> Weights:
    """Returns fresh weights from the run's seed, born sharded; `only` says which, by path."""
    wanted = select(layout.model_state, only)
    return named_arrays(draw_state(config.model, jax.random.key(config.seed), wanted))


def start_state(config: TrainConfig, layout: Layout, weights: Weights) -> TrainState:
    """Returns the state before the first step: given weights, empty optimizer."""
    trainable, frozen = split_weights(weights, layout.plan)
    optimizer = make_optimizer(config.optimizer)

    shardings = layout.shardings

    @jax.jit(out_shardings=(shardings.step, shardings.optimizer, shardings.guard))
    def begin(trainable):
        return jnp.zeros((), jnp.int32), optimizer.init(trainable), fresh_guard()

    step, moments, guard = begin(trainable)
    return TrainState(step, trainable, frozen, moments, guard)


def with_scalars(state: TrainState, step: int, **guard: int) -> TrainState:
    """Returns the state with its step, and the named counters of its guard, set by the host."""

    def scalar(value: int) -> jax.Array:
        # No transfer of a global array: every process makes its own copy, of the same number.
        return jax.make_array_from_callback(
            (), state.step.sharding, lambda _: np.asarray(value, np.int32)
        )

    counters = {name: scalar(value) for name, value in guard.items()}
    return state._replace(step=scalar(step), guard=state.guard._replace(**counters))


def to_items(state: TrainState) -> dict[str, dict[str, Any]]:
    """Returns the state as flat dicts for the checkpoint store; works on abstract states too.

    `weights` holds the whole model, whatever was frozen, so any later run can start from it.
    """
    guard = dict(state.guard._asdict())
    # Here since format 1, and read by those who look at checkpoints.
    rest = {"step": state.step, "skipped": guard.pop("skipped"), "optimizer": state.optimizer}
    return {
        "weights": state.trainable | state.frozen,
        "optimizer": _flatten(rest),
        "guard": guard,
    }


def new_items(layout: Layout) -> dict[str, dict[str, jax.Array]]:
    """Returns what checkpoints of format 1 lack, as a fresh run has it."""
    guard = jax.jit(fresh_guard, out_shardings=layout.shardings.guard)()._asdict()
    del guard["skipped"]
    return {"guard": guard}


def from_items(items: dict[str, dict[str, Any]], abstract: TrainState) -> TrainState:
    """Returns the state again; the inverse of `to_items`."""
    rest = {"step": abstract.step, "skipped": abstract.step, "optimizer": abstract.optimizer}
    leaves = [items["optimizer"][name] for name in _flatten(rest)]
    rest = jax.tree.unflatten(jax.tree.structure(rest), leaves)
    weights = items["weights"]
    return TrainState(
        step=rest["step"],
        trainable={name: weights[name] for name in abstract.trainable},
        frozen={name: weights[name] for name in abstract.frozen},
        optimizer=rest["optimizer"],
        guard=GuardState(skipped=rest["skipped"], **items["guard"]),
    )


def _flatten(tree: Any) -> dict[str, Any]:
    """Returns dotted path -> leaf, in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def merge_model(graphdef: nnx.GraphDef, weights: Weights) -> QwenVL:
    """Returns the model that holds these arrays; the inverse of naming them by path."""
    nested: dict[str, Any] = {}
    for path, array in weights.items():
        *parents, leaf = path.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return nnx.merge(graphdef, nested)
