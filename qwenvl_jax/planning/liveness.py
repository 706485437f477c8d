"""Which arrays fill the memory when it is fullest, found by walking the compiled schedule.

The TPU compiler says how much temporary memory a program needs but not what lies there. Its text
lists instructions in the order in which they run, so what is alive at each of them can be counted:
from the instruction that makes an array to the last one that reads it. Arrays that are written in
place (loop carries, slice updates, views) are followed, each element of a tuple by itself, to the
array that they stand for.
"""

import dataclasses
import re
from functools import cached_property
from typing import NamedTuple

from qwenvl_jax.planning.hlo import UPDATES, ArrayShape, Computation, Instruction, Program

# The memory of an array: the instruction that makes it and which of its results it is. None is
# memory that does not belong to the computation.
Place = tuple[str, int] | None
Places = dict[str, tuple[Place, ...]]

_NOTHING = {"parameter", "constant", "after-all", "partition-id", "replica-id"}
_SAME = {"bitcast", "while", "optimization-barrier", "all-reduce-done"}
# What an exchange or a copy in flight lists beside its result: the arrays that it reads.
_STARTS = {
    "all-gather-start",
    "collective-permute-start",
    "async-start",
    "call-start",
    "slice-start",
}
_DONES = {"all-gather-done", "collective-permute-done", "async-done", "call-done", "slice-done"}


class Array(NamedTuple):
    """One array in HBM, and the instruction that makes it."""

    shape: ArrayShape
    maker: Instruction


@dataclasses.dataclass(frozen=True)
class Peak:
    """The fullest moment of a computation: what is alive then, largest first."""

    arrays: tuple[Array, ...] = ()

    @cached_property
    def num_bytes(self) -> int:
        return sum(array.shape.num_bytes for array in self.arrays)


def fullest_moment(program: Program) -> Peak:
    """Returns the temporary arrays alive at the fullest moment of the whole program.

    Arrays of arguments and results are not among them, nor is what lies outside of HBM.
    Fragmentation, and what the compiler shares or keeps apart in ways that its text does not show,
    make this differ from its own total; `memory.classes` reports the difference.
    """
    return _peak(program, program.entry, {})


def _peak(program: Program, name: str, known: dict[str, Peak]) -> Peak:
    if name not in known:
        known[name] = _walk(program, program.computations[name], known)
    return known[name]


def _walk(program: Program, body: Computation, known: dict[str, Peak]) -> Peak:
    places = places_of(program, body)
    last_use: dict[Place, int] = {}
    for index, (name, instruction) in enumerate(body.items()):
        for user in (name, *instruction.operands):
            for place in places.get(user, ()):
                last_use[place] = index
    ends: dict[int, list[Place]] = {}
    for place, index in last_use.items():
        ends.setdefault(index, []).append(place)
    alive: dict[Place, Array] = {}
    size, best, best_size = 0, Peak(), 0
    for index, instruction in enumerate(body.values()):
        for i, shape in enumerate(instruction.shapes):
            if (instruction.name, i) in places[instruction.name] and shape.is_in_hbm:
                alive[instruction.name, i] = Array(shape, instruction)
                size += shape.num_bytes
        inner = _inner_peak(program, instruction, known)
        if size + inner.num_bytes > best_size:
            best_size = size + inner.num_bytes
            best = Peak((*alive.values(), *inner.arrays))
        for place in ends.get(index, ()):
            if place in alive:
                size -= alive.pop(place).shape.num_bytes
    return Peak(tuple(sorted(best.arrays, key=lambda array: -array.shape.num_bytes)))


def _inner_peak(program: Program, instruction: Instruction, known: dict[str, Peak]) -> Peak:
    if instruction.opcode == "while":
        return _peak(program, instruction.attribute("body").lstrip("%"), known)
    if instruction.opcode in ("call", "conditional"):
        peaks = [_peak(program, name, known) for name in instruction.called]
        return max(peaks, key=lambda peak: peak.num_bytes, default=Peak())
    return Peak()


def places_of(program: Program, body: Computation) -> Places:
    """Returns, for each name, the memory that each array of its result lies in.

    What a computation hands to its caller, or a loop body to its next turn, lies in memory that is
    counted there.
    """
    places: Places = {}
    handed_on: set[Place] = set()
    for name, instruction in body.items():
        places[name] = _places(program, instruction, places)
        if instruction.is_root:
            handed_on.update(places[name])
    return {
        name: tuple(None if place in handed_on else place for place in found)
        for name, found in places.items()
    }


def _places(program: Program, instruction: Instruction, places: Places) -> tuple[Place, ...]:
    new = tuple((instruction.name, i) for i in range(len(instruction.shapes)))
    given = [places[name] for name in instruction.operands if name in places]
    opcode = instruction.opcode
    if opcode in _NOTHING:
        return (None,) * len(new)
    if opcode == "tuple":
        return tuple(place for places_ in given for place in places_)
    if opcode == "get-tuple-element":
        return _element(program, instruction, given[0])
    if opcode in _SAME or opcode == "dynamic-update-slice":
        return given[0]
    if opcode == "copy-start":  # lists the copy, then what it reads
        return (new[0], *given[0], *new[2:])
    if opcode == "copy-done":
        return given[0][:1]
    if opcode in UPDATES:  # its first operand is the start, which made nothing yet
        given = given[1:]
    if opcode in _STARTS or opcode in UPDATES:
        read = tuple(place for places_ in given for place in places_)
        return (*read, *new[len(read) :])
    if opcode in _DONES:
        start = program.operands(instruction)[0]
        return given[0][start.parts[0] :][: len(new)]
    shared = _shared(instruction)
    return tuple(given[shared[i]][0] if i in shared else place for i, place in enumerate(new))


def _element(program: Program, instruction: Instruction, given: tuple[Place, ...]):
    source = program.operands(instruction)[0]
    index = int(instruction.attribute("index"))
    start = sum(source.parts[:index])
    return given[start : start + source.parts[index]]


def _shared(instruction: Instruction) -> dict[int, int]:
    """Returns which results the compiler writes over an operand, and over which.

    It says so in lists of equal places, counted through the operands and on through the results.
    """
    _, _, text = instruction.rest.partition('"aliasing_operands":{"lists":[')
    num_operands, shared = len(instruction.operands), {}
    for places in re.findall(r'\{"indices":\[([^\]]*)\]\}', text.partition("]}]}")[0] + "]}"):
        first, *others = sorted(int(place.strip('"')) for place in places.split(","))
        if first < num_operands:
            shared |= {place - num_operands: first for place in others if place >= num_operands}
    return shared
