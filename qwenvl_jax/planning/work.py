"""What one step makes a chip do: multiplications, bytes over HBM, bytes over the links.

Everything is read from the compiled program and multiplied by its loops. Counted are matrix
products (convolutions, to the TPU compiler) and the attention kernel; elementwise work is not.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from qwenvl_jax.planning.hlo import UPDATES, ArrayShape, Instruction, Program

_COLLECTIVES = {
    # What crosses a chip's links, as a share of the larger side of the operation, for groups of n.
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
}
# Products of one block of scores that each pass of the attention kernel makes.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
_ASYNC_START = "AsyncCollectiveStart"
_LISTS_BOTH_ENDS = ("copy-start", "all-gather-start", "collective-permute-start")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "optimization-barrier",
    "partition-id",
    "replica-id",
    "iota",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One exchange between chips, all its runs in a step together."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, that the exchanging chips differ in
    shape: str  # of the larger side, e.g. "bf16[4096,11008]"
    times: int
    bytes_each: float  # over the links of one chip
    op_name: str
    is_overlapped: bool = False  # the schedule has products or attention between start and end

    @property
    def num_bytes(self) -> float:
        return self.times * self.bytes_each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """One chip's share of one run of the program."""

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]

    @property
    def overlapped_share(self) -> float:
        """Returns the share of the bytes over links that cross beside compute."""
        total = sum(x.num_bytes for x in self.collectives)
        return (
            sum(x.num_bytes for x in self.collectives if x.is_overlapped) / total if total else 1.0
        )

    def link_bytes(self) -> dict[str, float]:
        """Returns bytes by mesh axis; an exchange over two axes is put to "data+fsdp" and so on."""
        total: dict[str, float] = defaultdict(float)
        for collective in self.collectives:
            total["+".join(collective.axes)] += collective.num_bytes
        return dict(total)


def measure(program: Program, mesh: Mesh | AbstractMesh, *, causal_block: int) -> Work:
    """Returns the work of one chip. `causal_block`: the attention kernel's block, see below."""
    flops = hbm = 0.0
    found: list[tuple[dict[str, _Flight], int, list[int]]] = []
    for name, times in program.walk():
        flights: dict[str, _Flight] = {}
        busy: list[int] = []  # places in the schedule with products
        for index, instruction in enumerate(program.computations[name].values()):
            hbm += times * hbm_bytes(program, instruction)
            products, inside = 0.0, list(program.inside(instruction))
            for inner in inside:
                products += matrix_flops(program, inner, causal_block)
            begins = any(_ASYNC_START in x.attribute("custom_call_target") for x in inside)
            for inner in (*inside, *program.awaited(instruction)):
                if _kind(inner) in _COLLECTIVES:
                    channel = _channel(program, inner)
                    # An exchange in flight is listed in every fusion that it goes on beside.
                    flight = flights.setdefault(channel, _Flight(inner, inner is not instruction))
                    flight.places.append(index)
                    flight.begins |= begins
            flops += times * products
            if products or instruction.opcode == "while":
                busy.append(index)
        found.append((flights, times, busy))
    # It may also go on beside a loop, and is listed in the loop then, where it does not begin.
    begun = {channel for flights, *_ in found for channel, x in flights.items() if x.begins}
    collectives = []
    for flights, times, busy in found:
        for channel, flight in flights.items():
            if flight.begins or channel not in begun:
                collectives.append(_collective(flight, times, mesh, busy))
                hbm += times * _exchanged_bytes(program, flight)
    return Work(flops=flops, hbm_bytes=hbm, collectives=tuple(collectives))


@dataclasses.dataclass
class _Flight:
    """An exchange, and where in the schedule it starts, goes on and ends."""

    instruction: Instruction
    is_inside: bool  # of a fusion, or of what runs beside the others
    places: list[int] = dataclasses.field(default_factory=list)
    begins: bool = False  # in a fusion that starts it, to be gone on with in others


def _kind(instruction: Instruction) -> str:
    return instruction.opcode.removesuffix("-start").removesuffix("-done")


def _channel(program: Program, instruction: Instruction) -> str:
    """Returns what the start, the steps in fusions and the end of one exchange have in common.

    The channel alone does not tell exchanges apart: those of the source's own have channel 1.
    """
    if instruction.opcode.endswith("-done"):
        instruction = program.operands(instruction)[0]
    if chain := re.search(r'chain_id="(\d+)"', instruction.rest):
        return f"chain {chain[1]}"
    return f"{instruction.home} {instruction.name}"


# --- multiplications ------------------------------------------------------------------------------


def matrix_flops(program: Program, instruction: Instruction, causal_block: int) -> float:
    """Returns floating-point operations of one matrix product or attention kernel, else 0."""
    if instruction.opcode == "convolution":
        return _convolution_flops(program.operands(instruction), instruction)
    if instruction.opcode == "dot":
        left = program.operands(instruction)[0].shapes[0].dims
        axes = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims"))
        contracted = math.prod(left[int(axis)] for axis in axes)
        return 2.0 * math.prod(instruction.shapes[0].dims) * contracted
    if instruction.opcode == "custom-call" and instruction.name.startswith("splash_m"):
        return _splash_flops(program.operands(instruction), instruction, causal_block)
    return 0.0


def _convolution_flops(operands: list[Instruction], instruction: Instruction) -> float:
    """Two for every pair of an input and a weight that meet; padding meets nothing."""
    left, right, out = re.split(r"_|->", instruction.attribute("dim_labels"))
    lhs, rhs = (operand.shapes[0].dims for operand in operands[:2])
    result = instruction.shapes[0].dims
    window = dict(re.findall(r"(\w+)=(\S+)", instruction.attribute("window").strip("{}")))
    pairs = 1
    for i, label in enumerate(sorted(set(left) & set("0123456789"))):
        step = {
            name: int(window[name].split("x")[i]) if name in window else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        }
        pad = int(window["pad"].split("x")[i].split("_")[0]) if "pad" in window else 0
        place = (
            np.arange(result[out.index(label)])[:, None] * step["stride"]
            + np.arange(rhs[right.index(label)]) * step["rhs_dilate"]
            - pad
        )
        last = (lhs[left.index(label)] - 1) * step["lhs_dilate"]
        pairs *= int(((place >= 0) & (place <= last) & (place % step["lhs_dilate"] == 0)).sum())
    features = rhs[right.index("i")] * result[out.index("f")] * result[out.index("b")]
    return 2.0 * features * pairs


def _splash_flops(
    operands: list[Instruction], instruction: Instruction, causal_block: int
) -> float:
    """The kernel's products; of a causal square it leaves out the blocks above the diagonal."""
    # By its name: the compiler breaks the line of a kernel before it says where it comes from.
    kind = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.name)
    arrays = [x.shapes[0].dims for x in operands if x.shapes and len(x.shapes[0].dims) >= 3]
    large = sorted((dims for dims in arrays if dims[-1] > 8), key=math.prod)[-3:]
    if kind is None or len(large) < 3:
        return 0.0
    lengths = sorted({dims[-2] for dims in large})
    queries, keys = lengths[0], lengths[-1]
    rows = math.prod(large[-1][:-2])
    share = 1.0
    if "segmented" in instruction.name:  # only the decoder packs
        blocks = max(1, queries // causal_block)
        share = (blocks + 1) / (2 * blocks)
    products = _SPLASH_PRODUCTS[kind[1]]
    return 2.0 * rows * queries * keys * large[-1][-1] * products * share


# --- bytes over HBM -------------------------------------------------------------------------------


def hbm_bytes(program: Program, instruction: Instruction) -> float:
    """Returns what one scheduled instruction reads and writes in HBM.

    A slice of a large array, and an update in place, count with their own size, also inside of
    fusions.
    """
    opcode = instruction.opcode
    if opcode in (*_FREE, *UPDATES, "call-start", "async-start") or opcode.endswith("-done"):
        return 0.0
    operands = program.operands(instruction)
    if opcode == "slice-start":  # lists the array, then the slice
        return float(instruction.shapes[1].num_bytes)
    if opcode in _LISTS_BOTH_ENDS:  # of which one may be on the chip
        return float(instruction.hbm_bytes)
    if opcode == "dynamic-slice":
        return 2.0 * instruction.hbm_bytes
    if opcode == "dynamic-update-slice":
        return 2.0 * operands[1].hbm_bytes if len(operands) > 1 else 0.0
    if opcode != "fusion":
        return float(instruction.hbm_bytes + sum(operand.hbm_bytes for operand in operands))
    body = program.computations[instruction.called[0]]
    if any("AsyncCollective" in x.attribute("custom_call_target") for x in body.values()):
        return 0.0  # starts or awaits an exchange, which is counted by itself
    total = 0.0
    for parameter in (x for x in body.values() if x.opcode == "parameter"):
        total += min(parameter.hbm_bytes, _touched(program, parameter))
    root = next(x for x in body.values() if x.is_root)
    written = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for array in written:
        while array.opcode == "bitcast":
            array = body[array.operands[0]]
        if array.opcode == "dynamic-update-slice":
            total += body[array.operands[1]].num_bytes
        elif array.opcode != "parameter" and array.opcode not in _COLLECTIVES:
            total += array.hbm_bytes  # what an exchange in flight brings is written but once
    return total


def _exchanged_bytes(program: Program, flight: _Flight) -> float:
    """Returns what an exchange reads and writes; 0 where `hbm_bytes` has counted it."""
    if not flight.is_inside:
        return 0.0
    read = sum(operand.hbm_bytes for operand in program.operands(flight.instruction))
    if "reduce-scatter" in flight.instruction.home:  # a sum of which each chip writes its slice
        return float(read)
    return float(read + flight.instruction.hbm_bytes)


def _touched(program: Program, array: Instruction) -> int:
    """Returns how many bytes of an array its users read, following views and inner fusions."""
    body, total = program.computations[array.home], 0
    for user in (x for x in body.values() if array.name in x.operands):
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.num_bytes
        elif user.opcode == "bitcast":
            total += _touched(program, user)
        elif user.opcode == "fusion":
            inner = program.computations[user.called[0]].values()
            number = f"({user.operands.index(array.name)})"
            same = next(x for x in inner if x.opcode == "parameter" and x.rest == number)
            total += _touched(program, same)
            while (view := _only_view(program, same)) is not None:
                same = view
            if same.is_root:  # the fusion only looks at the array another way
                total += _touched(program, user)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == array.name:
            continue  # written in place; counted at the root
        elif user.opcode not in ("tuple", *_COLLECTIVES):
            total += array.num_bytes
    return total


def _only_view(program: Program, array: Instruction) -> Instruction | None:
    """Returns the view that is an array's only user, if it is."""
    users = [x for x in program.computations[array.home].values() if array.name in x.operands]
    return users[0] if len(users) == 1 and users[0].opcode == "bitcast" else None


# --- bytes over the links -------------------------------------------------------------------------


def _collective(
    flight: _Flight, times: int, mesh: Mesh | AbstractMesh, busy: Sequence[int]
) -> Collective:
    instruction, kind = flight.instruction, _kind(flight.instruction)
    groups = exchange_groups(instruction, mesh)
    size = len(groups[0])
    # The compiler writes a scatter of sums as a sum of which each chip keeps its slice.
    if kind == "all-reduce" and "reduce-scatter" in instruction.home:
        kind = "reduce-scatter"
    # Started ahead, an exchange lists what goes in beside what comes out.
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start"):
        shapes = shapes[:1] if kind == "collective-permute" else (max(shapes, key=_plain),)
    num_bytes = sum(shape.plain_bytes for shape in shapes)
    if instruction.opcode == "reduce-scatter":
        num_bytes *= size  # the text shows the slice that a chip keeps
    return Collective(
        kind=kind,
        axes=_axes_that_vary(groups, mesh),
        shape=str(max(shapes, key=_plain)),
        times=times,
        bytes_each=_COLLECTIVES[kind](size) * num_bytes,
        op_name=instruction.op_name,
        is_overlapped=any(flight.places[0] <= i <= flight.places[-1] for i in busy),
    )


def _plain(shape: ArrayShape) -> int:
    return shape.plain_bytes


def exchange_groups(instruction: Instruction, mesh: Mesh | AbstractMesh) -> np.ndarray:
    """Returns int [groups, members]: which devices, counted along the mesh, exchange together."""
    text = instruction.attribute("replica_groups") or instruction.attribute("source_target_pairs")
    everyone = np.arange(mesh.size)
    # A mesh of the compiler's own: sizes, perhaps the devices in another order, the axes in use.
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", instruction.rest):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        moved = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", named[3])]
        if order := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", named[2]):
            everyone = _iota(order[1], order[2])
        grid = everyone.reshape(tuple(sizes.values()))
        grid = np.moveaxis(grid, moved, range(-len(moved), 0))
        return grid.reshape(-1, math.prod(list(sizes.values())[i] for i in moved))
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota[2], iota[3]).reshape([int(n) for n in iota[1].split(",")])
    groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    return np.array(groups) if groups else everyone[None]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Returns 0, 1, 2, ... laid out in `dims` and read in another order of the dimensions."""
    sizes = [int(n) for n in dims.split(",")]
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    return (grid.transpose([int(n) for n in order.split(",")]) if order else grid).ravel()


def _axes_that_vary(groups: np.ndarray, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    places = np.unravel_index(groups[0], tuple(mesh.shape.values()))
    return tuple(
        axis for axis, place in zip(mesh.axis_names, places, strict=True) if np.ptp(place) > 0
    )
