"""A compiled program read back from XLA's text: what runs, how often, and how large it is.

The text is what the compiler will execute: one device's share, after partitioning, fusion and
scheduling. A loop body is listed once, so everything that is added up here is multiplied by how
often the loops around it run.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

from qwenvl_jax.planning.pods import PlanError

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128, "token": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
# A computation that runs beside the others, on a v6e's sparse cores too ("call-start"). Newer
# compilers start it empty-handed, ahead, and hand it its operands in an update.
_BESIDE = ("async-start", "call-start")
UPDATES = ("async-update", "call-update")
_NOT_REDUCERS = {"fusion", "call", "while", "conditional", "custom-call", *_BESIDE}


@dataclasses.dataclass(frozen=True)
class ArrayShape:
    """One array as it lies in memory."""

    dtype: str
    dims: tuple[int, ...]
    is_in_hbm: bool
    num_bytes: int  # with the padding of its tiles
    plain_bytes: int  # without

    @classmethod
    def parse(cls, dtype: str, dims: str, layout: str | None) -> "ArrayShape":
        sizes = tuple(int(size) for size in dims.split(",") if size)
        layout = layout or ""
        order, _, rest = layout.partition(":")
        padded = list(sizes)
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if tile and sizes:
            minor_first = [int(axis) for axis in order.split(",") if axis]
            for axis, size in zip(minor_first, reversed(tile[1].split(",")), strict=False):
                padded[axis] = -(-padded[axis] // int(size)) * int(size)
        bits = _BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype[1:]) or 0)
        space = re.search(r"S\((\d+)\)", rest)
        return cls(
            dtype,
            sizes,
            is_in_hbm=space is None or space[1] == "0",
            num_bytes=math.prod(padded) * bits // 8,
            plain_bytes=math.prod(sizes) * bits // 8,
        )

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the program."""

    name: str
    opcode: str
    shapes: tuple[ArrayShape, ...]  # of all arrays of its result, however tuples nest
    parts: tuple[int, ...]  # how many of them each element of a result that is a tuple holds
    operands: tuple[str, ...]
    rest: str  # attributes as text; of a constant or parameter, its value or number in brackets
    is_root: bool
    home: str  # the computation that it stands in

    @property
    def hbm_bytes(self) -> int:
        return sum(shape.num_bytes for shape in self.shapes if shape.is_in_hbm)

    @property
    def num_bytes(self) -> int:
        return sum(shape.num_bytes for shape in self.shapes)

    @cached_property
    def op_name(self) -> str:
        """Where the program's source made it, e.g. `jit(train_step)/while/body/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs; not the scalar functions of reductions."""
        if self.opcode not in _NOT_REDUCERS:
            return ()
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        return (*_CALLED.findall(self.rest), *names)

    def attribute(self, name: str) -> str:
        """Returns the text of `name=...` up to the next comma outside brackets, or ""."""
        found = re.search(rf"(?:^|[ ,]){name}=", self.rest)
        return _balanced(self.rest[found.end() :], ",") if found else ""


Computation = dict[str, Instruction]


class Program:
    """All computations of one compiled module.

    `open_loops_run_once`: a loop that no constant bounds counts as one turn, not as an error.
    """

    def __init__(self, text: str, *, open_loops_run_once: bool = False):
        self._open_loops_run_once = open_loops_run_once
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current, home = {}, ""
        for line in text.splitlines():
            if line.endswith("{") and (header := _HEADER.match(line)):
                home = header[2]
                current: Computation = self.computations.setdefault(home, {})
                if header[1]:
                    self.entry = header[2]
            elif found := _LINE.match(line):
                instruction = _parse(found, home)
                current[instruction.name] = instruction
        if not self.entry:
            raise PlanError("the compiled program is not XLA text: got no ENTRY computation")

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions that this one reads."""
        home = self.computations[instruction.home]
        return [home[name] for name in instruction.operands if name in home]

    def trip_count(self, loop: Instruction) -> int:
        """Returns how often a while loop runs.

        Raises:
            PlanError: its condition is not a comparison with a constant.
        """
        known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
        if known:
            return int(known[1])
        condition = loop.attribute("condition").lstrip("%")
        bounds = [*self._constants(condition)]
        if self._open_loops_run_once and not self._is_counted(condition):
            return 1
        if not bounds:
            raise PlanError(f"cannot read how often the loop {loop.name} runs: no constant bound")
        return max(bounds)

    def _is_counted(self, condition: str) -> bool:
        """Returns whether a loop ends at a number alone, as loops over layers do."""
        body = self.computations[condition]
        root = next(x for x in body.values() if x.is_root)
        return root.opcode == "compare" or any("compare" in x for x in root.called)

    def _constants(self, name: str) -> Iterator[int]:
        for instruction in self.computations[name].values():
            if instruction.opcode == "constant" and instruction.shapes[0].dims == ():
                number = re.match(r"\((-?\d+)\)", instruction.rest)
                if number:
                    yield int(number[1])
            for called in instruction.called:
                yield from self._constants(called)

    def walk(self, name: str | None = None, times: int = 1) -> Iterator[tuple[str, int]]:
        """Yields (computation, how often it runs) of everything that runs outside of fusions."""
        here = name or self.entry
        yield here, times
        for instruction in self.computations[here].values():
            if instruction.opcode == "while":
                body = instruction.attribute("body").lstrip("%")
                yield from self.walk(body, times * self.trip_count(instruction))
            elif instruction.opcode in ("call", "conditional"):
                # Of the branches of a conditional one runs; all are counted, which bounds it.
                for called in instruction.called:
                    yield from self.walk(called, times)

    def awaited(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yields what `inside` yields of the computation that ends here; nothing elsewhere."""
        if instruction.opcode in ("async-done", "call-done"):
            yield from self.inside(self.operands(instruction)[0])

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Yields the instruction, or what its fusions are made of, down to the bottom.

        What runs beside the others begins where it has its operands.
        """
        if instruction.opcode in UPDATES:
            instruction = self.operands(instruction)[0]
        elif instruction.opcode in _BESIDE and not instruction.operands:
            return
        if instruction.opcode not in ("fusion", "custom-call", *_BESIDE):
            yield instruction
            return
        if not instruction.called:
            yield instruction
        for name in instruction.called:
            for inner in self.computations.get(name, {}).values():
                yield from self.inside(inner)


def _parse(found: re.Match[str], home: str) -> Instruction:
    text = found[3]
    if text.startswith("("):
        end = len(_balanced(text[1:], ")")) + 2
    else:
        end = text.index(" ")
    shape, text = text[:end], text[end + 1 :]
    opcode, _, text = text.partition("(")
    inside = _balanced(text, ")")
    rest = f"({inside})" if opcode in ("constant", "parameter") else text[len(inside) + 1 :]
    return Instruction(
        name=found[2],
        opcode=opcode.strip(),
        shapes=tuple(ArrayShape.parse(*array) for array in _ARRAY.findall(shape)),
        parts=_parts(shape),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        rest=rest,
        is_root=bool(found[1]),
        home=home,
    )


def _parts(shape: str) -> tuple[int, ...]:
    """Returns the number of arrays in each element of a tuple's shape; of an array's, one."""
    if not shape.startswith("("):
        return (1,)
    counts, rest = [], shape[1:-1]
    while rest:
        element = _balanced(rest, ",")
        counts.append(len(_ARRAY.findall(element)))
        rest = rest[len(element) + 1 :]
    return tuple(counts)


def _balanced(text: str, stop: str) -> str:
    """Returns `text` up to the first `stop` that is outside of brackets."""
    depth = 0
    for index, letter in enumerate(text):
        if depth == 0 and letter == stop:
            return text[:index]
        depth += (letter in "([{") - (letter in ")]}")
    return text
