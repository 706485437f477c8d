"""Which arrays fill the memory when it is fullest, found by walking the compiled schedule.

The TPU compiler says how much temporary memory a program needs but not what lies there. Its text
lists instructions in the order in which they run, so what is alive at each of them can be counted:
from the instruction that makes an array to the last one that reads it. Arrays that are written in
place (loop carries, slice updates, views) are followed to the array that they stand for.
"""

import dataclasses
from functools import cached_property

from qwenvl_jax.planning.hlo import Computation, Instruction, Program

# These give another name to memory that exists already.
_VIEWS = {
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "optimization-barrier",
    "dynamic-update-slice",
    "copy-done",
    "slice-done",
    "async-done",
    "all-gather-done",
    "all-reduce-done",
    "collective-permute-done",
}
_NOTHING = {"parameter", "constant", "after-all", "partition-id", "replica-id"}


@dataclasses.dataclass(frozen=True)
class Peak:
    """The fullest moment of a computation: what is alive then, largest first."""

    arrays: tuple[Instruction, ...] = ()

    @cached_property
    def num_bytes(self) -> int:
        return sum(array.hbm_bytes for array in self.arrays)


def fullest_moment(program: Program) -> Peak:
    """Returns the temporary arrays alive at the fullest moment of the whole program.

    Arrays of arguments are not among them, nor is what lies outside of HBM. Fragmentation, and what
    the compiler shares or keeps apart in ways that its text does not show, make this differ from
    its own total; `memory.classes` reports the difference.
    """
    return _peak(program, program.entry, {})


def _peak(program: Program, name: str, known: dict[str, Peak]) -> Peak:
    if name not in known:
        known[name] = _walk(program, program.computations[name], known)
    return known[name]


def _walk(program: Program, body: Computation, known: dict[str, Peak]) -> Peak:
    order = list(body.values())
    owners = _owners(program, body)
    last_use: dict[str, int] = {}
    for index, instruction in enumerate(order):
        for operand in instruction.operands:
            for owner in owners.get(operand, ()):
                last_use[owner] = index
    ends: dict[int, list[str]] = {}
    for owner, index in last_use.items():
        ends.setdefault(index, []).append(owner)
    alive: dict[str, Instruction] = {}
    size, best, best_size = 0, Peak(), 0
    for index, instruction in enumerate(order):
        if owners[instruction.name] == {instruction.name}:
            alive[instruction.name] = instruction
            size += instruction.hbm_bytes
        inner = _inner_peak(program, instruction, known)
        if size + inner.num_bytes > best_size:
            best_size = size + inner.num_bytes
            best = Peak((*alive.values(), *inner.arrays))
        for owner in ends.get(index, ()):
            if owner in alive:
                size -= alive.pop(owner).hbm_bytes
    return Peak(tuple(sorted(best.arrays, key=lambda array: -array.hbm_bytes)))


def _inner_peak(program: Program, instruction: Instruction, known: dict[str, Peak]) -> Peak:
    if instruction.opcode == "while":
        return _peak(program, instruction.attribute("body").lstrip("%"), known)
    if instruction.opcode in ("call", "conditional"):
        peaks = [_peak(program, name, known) for name in instruction.called]
        return max(peaks, key=lambda peak: peak.num_bytes, default=Peak())
    return Peak()


def _owners(program: Program, body: Computation) -> dict[str, set[str]]:
    """Returns, for each name, the instructions whose memory it stands for.

    What a loop body hands to its next turn is written over what it got, so it owns nothing.
    """
    handed_on = _handed_on(body)
    owners: dict[str, set[str]] = {}
    for name, instruction in body.items():
        if instruction.opcode in _NOTHING or name in handed_on:
            owners[name] = set()
        elif instruction.opcode == "dynamic-update-slice":
            owners[name] = set(owners.get(instruction.operands[0], ()))
        elif instruction.opcode in _VIEWS:
            owners[name] = set().union(*(owners.get(x, set()) for x in instruction.operands))
        elif instruction.opcode == "fusion" and (source := _updated_in_place(program, instruction)):
            owners[name] = set(owners.get(source, ()))
        else:
            owners[name] = {name}
    return owners


def _handed_on(body: Computation) -> set[str]:
    root = next((x for x in body.values() if x.is_root), None)
    if root is None or root.opcode != "tuple":
        return set()
    parameters = [x for x in body.values() if x.opcode == "parameter"]
    if len(parameters) != 1 or len(parameters[0].shapes) != len(root.shapes):
        return set()  # no loop body: the entry, whose results are new or were donated
    return {name for name in root.operands if body[name].opcode not in _VIEWS}


def _updated_in_place(program: Program, fusion: Instruction) -> str | None:
    """Returns the operand that a fusion writes a slice into, or None."""
    body = program.computations[fusion.called[0]]
    root = next(x for x in body.values() if x.is_root)
    while root.opcode == "bitcast":
        root = body[root.operands[0]]
    if root.opcode != "dynamic-update-slice":
        return None
    source = body[root.operands[0]]
    while source.opcode == "bitcast":
        source = body[source.operands[0]]
    if source.opcode != "parameter":
        return None
    return fusion.operands[int(source.rest.strip("()"))]
