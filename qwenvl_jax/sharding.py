"""Where every array lives: the mesh, the one table from logical axes to mesh axes, and a report.

The mesh always has the three axes `data`, `fsdp` and `tensor`, also on one device, so there is one
code path. `data` holds copies of the parameters, `fsdp` splits parameters and batch, `tensor`
splits heads, MLPs and the vocabulary. Activations follow from these by XLA's propagation, pinned by
`constrain` where the compiler could choose to split a width instead of the rows.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qwenvl_jax import axes
from qwenvl_jax.config import ConfigError, MeshConfig
from qwenvl_jax.words import counted

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # that rows are split over

# The whole placement policy. None: this axis is never split.
AXIS_TABLE: dict[str, str | tuple[str, ...] | None] = {
    axes.LAYERS: None,  # the scan walks it
    axes.EMBED: "fsdp",
    axes.EMBED_OUT: "tensor",
    axes.MLP: "tensor",
    axes.VOCAB: "tensor",
    axes.HEADS: "tensor",
    axes.HEAD_DIM: None,
    axes.PATCH: None,
    axes.VIT_POSITION: None,
    axes.VIT_EMBED: "fsdp",
    axes.VIT_HEADS: "tensor",
    axes.VIT_MLP: "tensor",
    axes.QUERY: None,
    axes.RANK: None,
    axes.BATCH: BATCH_AXES,
    axes.COPIES: "data",
}


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh `data x fsdp x tensor` over `devices` (default: all of this job).

    `config=None` is the 1x1x1 mesh of the first device. Devices of several slices (pods joined by a
    data-centre network) split `data`: whole copies of the parameters, and one sum of gradients
    over the slow network a step.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or `data` is no multiple of
            the number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if config is None:
        config, devices = MeshConfig(data=1, fsdp=1, tensor=1), devices[:1]
    sizes = mesh_sizes(config, len(devices))
    # Auto is written out: since jax 0.9 the default is Explicit, where a sharding constraint
    # asserts instead of asking.
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    # Axes may share a dimension of the torus: 2 x 128 chips on 16 x 16.
    num_slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if num_slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=kinds)
    data, *rest = sizes
    if data % num_slices:
        raise ConfigError(
            f"mesh.data must be a multiple of the {num_slices} slices, which are joined by a slow "
            f"network: got data={data}; set mesh.data=-1 and fsdp x tensor to at most one slice"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (data // num_slices, *rest),
        (num_slices, 1, 1),
        devices=devices,
        allow_split_physical_axes=True,
    )
    return Mesh(grid, MESH_AXES, axis_types=kinds)


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Returns the sizes of `data`, `fsdp` and `tensor`, with what -1 stands for.

    Raises:
        ConfigError: they do not multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    has_rest = sizes.count(-1) == 1 and -math.prod(sizes) > 0
    taken = -math.prod(sizes)
    if has_rest:
        sizes[sizes.index(-1)] = max(1, num_devices // taken)
    if min(sizes) < 1 or math.prod(sizes) != num_devices:
        tensor = config.tensor if config.tensor > 0 and num_devices % config.tensor == 0 else 1
        way_out = (
            f"{taken} does not divide {num_devices}, try --mesh.data=1 --mesh.fsdp=-1 "
            f"--mesh.tensor={tensor}"
            if has_rest
            else "set exactly one of them to -1"
        )
        raise ConfigError(
            f"the mesh data x fsdp x tensor must use all devices: got "
            f"{config.data} x {config.fsdp} x {config.tensor} for "
            f"{counted(num_devices, 'device')}; {way_out}"
        )
    data, fsdp, tensor = sizes
    return data, fsdp, tensor


def context_platform() -> str:
    """Returns "cpu", "gpu" or "tpu": where the program that is being traced will run.

    That is the kind of device in the mesh of `jax.set_mesh`, which need not be attached, or else
    jax's default.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.abstract_device is None else platform_of(mesh)


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """Returns "cpu", "gpu" or "tpu": the kind of devices in a mesh that knows them."""
    device = (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).abstract_device
    assert device is not None
    kind = device.device_kind.lower()
    return "tpu" if kind.startswith("tpu") else "cpu" if kind == "cpu" else "gpu"


def num_parts(logical: str, mesh: Mesh | AbstractMesh) -> int:
    """Returns into how many parts the table splits this axis over a mesh, which may be empty."""
    return math.prod(mesh.shape.get(name, 1) for name in AXIS_TABLE[logical] or ())


def parts_of(size: int, num_devices: int) -> int:
    """Returns into how many parts so many devices split a dimension: one where they cannot."""
    return num_devices if size % num_devices == 0 else 1


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Returns `x`, pinned where the table puts these axes on the mesh in context, if there is one.

    Without it, XLA may follow the parameters, which split widths over `fsdp`, and gather or
    exchange activations instead of gathering the much smaller weights.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(logical, x.shape, mesh))


def is_split(logical: Sequence[str | None], shape: Sequence[int]) -> bool:
    """Returns whether the mesh in context splits such an array over `fsdp`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return False
    return "fsdp" in partition_spec(logical, shape, mesh)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(x: jax.Array, logical: tuple[str | None, ...]) -> jax.Array:
    """Returns a weight that `is_split` whole over `fsdp`; its gradient stays where it is."""
    spec = partition_spec(logical, x.shape, jax.sharding.get_abstract_mesh())
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(_but_fsdp, spec)))


gather.defvjp(lambda x, logical: (gather(x, logical), None), lambda logical, _, grad: (grad,))


def _but_fsdp(part: Any) -> Any:
    return None if part == "fsdp" else part


def sum_over_rows(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    left: jax.Array,
    right: jax.Array,
    logical: Sequence[str],
    num_left: int,
) -> jax.Array:
    """Returns `product(left, right)`, the gradient of a kernel, placed as the kernel is.

    The product adds up over rows [rows, ..., dims]; its dimensions are `num_left` of `left` and
    then those of `right`, with the logical axes `logical`.

    Left to itself, XLA on TPUs adds up the whole kernel on every chip where the part to keep is a
    few dozen rows, and cuts it afterwards: twice the bytes. So each chip multiplies its own rows,
    and the sum is scattered here along a dimension of its own, which works for parts of any size if
    the rest is flat.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shape = jax.eval_shape(product, left, right).shape
    if not is_split(logical, shape):
        return product(left, right)
    if left.shape[0] % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return product(left, right)
    spec = partition_spec(logical, shape, mesh)
    cut = tuple(spec).index("fsdp")

    def rows(x: jax.Array, kept: Sequence) -> PartitionSpec:
        between = [None] * (x.ndim - 1 - len(kept))
        return PartitionSpec(BATCH_AXES, *between, *map(_but_fsdp, kept))

    def scatter(left: jax.Array, right: jax.Array) -> jax.Array:
        total = product(left, right)
        before, after = total.shape[:cut], total.shape[cut + 1 :]
        flat = total.reshape(math.prod(before), mesh.shape["fsdp"], -1, math.prod(after))
        mine = jax.lax.psum(jax.lax.psum_scatter(flat, "fsdp", scatter_dimension=1), "data")
        return mine.reshape(*before, -1, *after)

    specs = rows(left, spec[:num_left]), rows(right, spec[num_left:])
    return jax.shard_map(scatter, in_specs=specs, out_specs=spec)(left, right)


def partition_spec(
    logical: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Returns the spec of one array, by the table.

    A mesh axis that does not divide its dimension is left out: that dimension is replicated, and
    `describe` says so.

    Raises:
        ConfigError: two dimensions want the same mesh axis, or an axis has no row in the table.
    """
    used: set[str] = set()
    parts: list[str | tuple[str, ...] | None] = []
    for name, size in zip(logical, shape, strict=True):
        if name is not None and name not in AXIS_TABLE:
            raise ConfigError(f"no row in AXIS_TABLE for the logical axis {name!r} of {logical}")
        target = AXIS_TABLE[name] if name is not None else None
        mesh_axes = (target,) if isinstance(target, str) else target or ()
        if used.intersection(mesh_axes):
            raise ConfigError(f"logical axes {logical} use one mesh axis twice: {mesh_axes}")
        used.update(mesh_axes)
        fits = size % math.prod(mesh.shape[axis] for axis in mesh_axes) == 0
        parts.append(target if mesh_axes and fits else None)
    return PartitionSpec(*parts)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the placement of step inputs: rows over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(AXIS_TABLE[axes.BATCH]))


def decoding_sharding(shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Returns the placement of what an answer carries: rows, or (5 dims) keys and values."""
    logical = (axes.BATCH, *[None] * len(shape))[: len(shape)]
    if len(shape) == 5:
        logical = (axes.LAYERS, axes.BATCH, None, axes.HEADS, axes.HEAD_DIM)
    return NamedSharding(mesh, partition_spec(logical, shape, mesh))


def with_shardings(state: nnx.State, mesh: Mesh | AbstractMesh) -> nnx.State:
    """Returns an abstract state whose ShapeDtypeStructs carry their shardings.

    Restore, conversion and compilation for absent hardware all start from this tree.
    """

    def attach(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        spec = partition_spec(variable.axes, value.shape, mesh)
        return variable.replace(
            jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, spec))
        )

    return jax.tree.map(attach, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def named_variables(state: nnx.State) -> dict[str, nnx.Variable]:
    """Returns dotted path -> Variable, e.g. `decoder.blocks.attn.q_proj.kernel`, sorted."""
    flat = {_dotted(path): leaf for path, leaf in nnx.to_flat_state(state)}
    return dict(sorted(flat.items()))


def named_arrays(state: nnx.State) -> dict[str, Any]:
    """Returns dotted path -> array, or its shape in an abstract state, sorted."""
    return {path: variable.get_value() for path, variable in named_variables(state).items()}


def fill(state: nnx.State, arrays: Mapping[str, Any]) -> nnx.State:
    """Returns the state with these in place of its arrays, by dotted path."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, v.replace(arrays[_dotted(path)])) for path, v in flat])


def select(state: nnx.State, wanted: Callable[[str], bool]) -> nnx.State:
    """Returns the part of a state whose dotted paths are `wanted`."""
    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, v) for path, v in flat if wanted(_dotted(path))])


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """One parameter's row in the report."""

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes_per_device: int
    note: str


def placements(state: nnx.State, mesh: Mesh | AbstractMesh) -> list[Placement]:
    """Returns one row a parameter; `note` names each dimension that should be split and is not."""
    rows = []
    for path, variable in named_variables(state).items():
        value = variable.get_value()
        spec = partition_spec(variable.axes, value.shape, mesh)
        shard = NamedSharding(mesh, spec).shard_shape(value.shape)
        refused = [
            f"{name}={size} over {AXIS_TABLE[name]}"
            for name, size, part in zip(variable.axes, value.shape, spec, strict=True)
            if name and AXIS_TABLE[name] and part is None
        ]
        rows.append(
            Placement(
                path=path,
                shape=tuple(value.shape),
                spec=spec,
                bytes_per_device=math.prod(shard) * np.dtype(value.dtype).itemsize,
                note="replicated: does not divide " + ", ".join(refused) if refused else "",
            )
        )
    return rows


def replicated(state: nnx.State, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Returns the parameters of at least 1 MB that a mesh axis should split and does not."""
    rows = sorted(placements(state, mesh), key=lambda row: -row.bytes_per_device)
    return tuple(
        f"{row.path} {row.bytes_per_device / 1e6:.1f} MB: {row.note}"
        for row in rows
        if row.note and row.bytes_per_device >= 1e6
    )


def replicated_lines(rows: Sequence[str]) -> list[str]:
    """Returns what `replicated` found, as lines."""
    if not rows:
        return ["replicated: nothing of 1 MB or more"]
    return ["replicated on every chip along that axis:", *(f"  {row}" for row in rows)]


def describe(state: nnx.State, mesh: Mesh | AbstractMesh) -> str:
    """Returns a table: path, shape, spec and bytes a device, with a total.

    >>> print(describe(abstract_state(config)[1], make_mesh()))  # doctest: +SKIP
    """
    rows = placements(state, mesh)
    width = max(len(row.path) for row in rows)
    lines = [f"mesh {dict(mesh.shape)}"]
    for row in rows:
        spec = ", ".join("-" if part is None else str(part) for part in row.spec)
        lines.append(
            f"{row.path:<{width}}  {row.shape!s:<24} ({spec})  {row.bytes_per_device:,} B"
            + (f"  {row.note}" if row.note else "")
        )
    lines.append(f"total {sum(row.bytes_per_device for row in rows):,} B a device")
    return "\n".join(lines)
