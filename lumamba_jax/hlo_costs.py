"""What a compiled program sends between chips and moves through memory, read from its text.

XLA's own cost analysis counts the body of a loop once. Here every computation has a number of runs: those of its
caller, times the trip count where it is the body of a `while`. The compiler writes that beside the loop, or the loop's
condition compares a counter, taken to begin at 0, with a constant; any other loop counts once, and is named.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BITS: Mapping[str, int] = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "f8e5m2": 8, "s16": 16, "u16": 16, "f16": 16,
    "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)"?')


class Instruction(NamedTuple):
    """One line of a computation: `%name = result operation(rest`."""

    name: str
    result: str
    operation: str
    rest: str


@dataclass(frozen=True)
class Collective:
    """Equal collectives of a program.

    Attributes:
        kind: one of `COLLECTIVES`.
        size: bytes per chip of one of them: the larger of operands and result.
        group: chips that take part in it.
        count: how often it runs in one run of the program.
    """

    kind: str
    size: int
    group: int
    count: int


@dataclass(frozen=True)
class Program:
    """A compiled module's text, taken apart.

    Attributes:
        computations: instructions by name of the computation.
        runs: how often each computation runs; fused ones and those of reductions have the runs of their callers.
        unknown_loops: names of `while` instructions whose trip count is not known.
        chips: that the module is partitioned over.
    """

    computations: dict[str, list[Instruction]]
    runs: dict[str, int]
    unknown_loops: list[str]
    chips: int


def parse_program(text: str) -> Program:
    """Take `compiled.as_text()` apart. Raises ValueError when it has no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(Instruction(*found.groups()))
    if entry is None:
        raise ValueError("this is not the text of a compiled module: it has no ENTRY computation")
    runs, unknown = _runs(computations, entry)
    sizes = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text[: text.find("\n")])]
    return Program(computations, runs, unknown, math.prod(sizes))


def _runs(computations: dict[str, list[Instruction]], entry: str) -> tuple[dict[str, int], list[str]]:
    """Callees are written before their callers, so that one pass from the last to the first sees all calls."""
    runs: dict[str, int] = defaultdict(int, {entry: 1})
    unknown = []
    for name in reversed(computations):
        for instruction in computations[name]:
            trips = 1
            if instruction.operation == "while":
                known = _trip_count(instruction, computations)
                trips = known or 1
                if known is None:
                    unknown.append(instruction.name)
            for callee in called(instruction):
                runs[callee] += runs[name] * trips
    return dict(runs), unknown


def _trip_count(loop: Instruction, computations: Mapping[str, list[Instruction]]) -> int | None:
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    name = re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)
    condition = computations.get(name[1], []) if name else []
    constants = {i.name: int(i.rest.split(")", 1)[0]) for i in condition if re.match(r"-?\d+\)", i.rest)}
    if condition and condition[-1].operation == "compare" and "direction=LT" in condition[-1].rest:
        limits = [constants[operand] for operand in _operands(condition[-1])[1:] if operand in constants]
        return limits[0] if limits else None
    return None


def called(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction calls."""
    names = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


def array_bytes(shape: str) -> int:
    """Bytes of all arrays of a type such as `(f32[8,128]{1,0}, s32[])`, without padding."""
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        if kind in ITEM_BITS:
            total += ITEM_BITS[kind] * math.prod(int(n) for n in sizes.split(",") if n) // 8
    return total


def collectives(program: Program) -> list[Collective]:
    """Every collective of the program, equal ones together, those that move most first."""
    counts: Counter[tuple[str, int, int]] = Counter()
    for name, instructions in program.computations.items():
        types = {i.name: i.result for i in instructions}
        for instruction in instructions:
            kind = instruction.operation.removesuffix("-start")
            if kind in COLLECTIVES and program.runs.get(name):
                operands = sum(array_bytes(types.get(operand, "")) for operand in _operands(instruction))
                # The result of an asynchronous start holds the operand as well.
                result = array_bytes(instruction.result) - (operands if instruction.operation != kind else 0)
                if instruction.operation == "all-reduce-start":
                    result = operands
                size = max(operands, result)
                counts[kind, size, _group_size(instruction.rest, program.chips)] += program.runs[name]
    found = [Collective(kind, size, group, count) for (kind, size, group), count in counts.items()]
    return sorted(found, key=lambda c: -c.size * c.count)


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split("), ", 1)[0])


def _group_size(rest: str, chips: int) -> int:
    """Of `replica_groups={{0,1},{2,3}}`, `=[2,4]<=[8]` or `=mesh['a'=2,'b'=4] {'b'}`, or of a permutation.

    All chips when the list is empty.
    """
    if found := re.search(r"replica_groups=@?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if "source_target_pairs=" in rest:
        return 2
    return chips


# ---- memory traffic -------------------------------------------------------------------------------------------------

_MOVES_NOTHING = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "iota",
    "after-all", "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
_CONTROL = ("while", "conditional", "call")
_LAID_OUT = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?([^}]*)\})?")


def hbm_bytes(program: Program) -> int:
    """Bytes that a TPU program reads from and writes to HBM, as its instructions say.

    Operands and results of every instruction outside fusions that lie in HBM (the memory space without a number), in
    their tiled layout, as often as they run. What the compiler copies ahead between HBM and the chip's own memory
    counts once, where the copy is done. An array of which only a slice is used counts whole.
    """
    total = 0
    for name, instructions in _unfused(program).items():
        types = {i.name: i.result for i in instructions}
        total += program.runs[name] * sum(_traffic(i, types) for i in instructions)
    return total


def estimated_cycles(program: Program) -> int:
    """Cycles of the chip that the TPU compiler expects for its own instructions; a custom kernel has no such figure."""
    total = 0
    for name, instructions in _unfused(program).items():
        found = (re.search(r'"estimated_cycles":"(\d+)"', i.rest) for i in instructions)
        total += program.runs[name] * sum(int(cycles[1]) for cycles in found if cycles)
    return total


def _unfused(program: Program) -> dict[str, list[Instruction]]:
    """The computations that run as such: the entry, and bodies and branches of control flow."""
    fused = {
        callee
        for instructions in program.computations.values()
        for instruction in instructions
        if instruction.operation not in _CONTROL
        for callee in called(instruction)
    }
    return {n: i for n, i in program.computations.items() if n not in fused and program.runs.get(n)}


def _traffic(instruction: Instruction, types: Mapping[str, str]) -> int:
    operation = instruction.operation
    if operation in _MOVES_NOTHING or operation.endswith("-start") or '"ConcatBitcast"' in instruction.rest:
        return 0
    if operation.endswith("-done"):  # one side of the copy is in HBM
        return _hbm_array_bytes(re.sub(r"S\(\d+\)", "", instruction.result))
    read = sum(_hbm_array_bytes(types.get(operand, "")) for operand in _operands(instruction))
    return read + _hbm_array_bytes(instruction.result)


def _hbm_array_bytes(shape: str) -> int:
    total = 0
    for kind, sizes, order, tile, rest in _LAID_OUT.findall(shape):
        if kind in ITEM_BITS and "S(" not in rest:
            dims = [int(n) for n in sizes.split(",") if n]
            minor_first = [dims[int(i)] for i in order.split(",") if i] or dims[::-1]
            total += ITEM_BITS[kind] * _padded(minor_first, [int(n) for n in tile.split(",") if n]) // 8
    return total


def _padded(minor_first: list[int], tile: list[int]) -> int:
    """Elements with the most minor axes rounded up to whole tiles."""
    for i, side in enumerate(reversed(tile)):
        if i < len(minor_first):
            minor_first[i] = -(-minor_first[i] // side) * side
    return math.prod(minor_first)
