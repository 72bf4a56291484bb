"""What one device does in a compiled program: FLOPs of products, bytes of collectives.

Loops are multiplied by their length, which XLA's own `cost_analysis` does not do, and of the
branches of a conditional the dearest counts: it is some device's.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%([\w.-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w-]+)\((.*)$"
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})")


class Instruction(NamedTuple):
    """One line of HLO: what comes out, of which operation, and the rest of the line."""

    shape: str
    operation: str
    rest: str


class Program:
    """The text of a compiled program, as computations.

    Args:
      text: As `jax.stages.Compiled.as_text` gives it.
      devices: That it runs on.
    """

    def __init__(self, text: str, devices: int) -> None:
        self._devices = devices
        self._computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self._computations[found[1]] = {}
                if line.startswith("ENTRY"):
                    self._entry = found[1]
            elif found := _INSTRUCTION.match(line):
                current[found[1]] = Instruction(found[2], found[3], found[4])

    def flops(self) -> float:
        """Sums multiplications and additions of all products."""
        return self._total(self._flops)

    def bytes_out(self, kind: str | None = None) -> float:
        """Sums bytes that come out of collectives, or of those of one kind."""
        kinds = COLLECTIVES if kind is None else (kind,)
        return self._total(lambda _, own: _size(own.shape) if own.operation in kinds else 0)

    def wire_bytes(self) -> float:
        """Sums bytes that one device sends, where every collective goes round a ring."""
        return self._total(self._wire)

    def count(self, kind: str) -> float:
        """Counts the collectives of a kind that run."""
        return self._total(lambda _, own: own.operation == kind)

    def largest_gather(self) -> int:
        """Finds the bytes of the largest array that an all-gather makes."""
        everything = (own for names in self._computations.values() for own in names.values())
        return max(
            (_size(own.shape) for own in everything if own.operation == "all-gather"), default=0
        )

    def _total(self, measure: Callable[[dict[str, Instruction], Instruction], float]) -> float:
        @functools.cache
        def of_computation(name: str) -> float:
            names = self._computations[name]
            return sum(measure(names, own) + of_called(own) for own in names.values())

        def of_called(own: Instruction) -> float:
            if own.operation == "conditional":
                found = _BRANCHES.findall(own.rest)
                branches = re.findall(r"%([\w.-]+)", " ".join(map(" ".join, found)))
                return max(map(of_computation, branches))
            inner = sum(map(of_computation, _CALLED.findall(own.rest)))
            if own.operation != "while" or not inner:
                return inner
            trips = _TRIPS.search(own.rest)
            if trips is None:
                raise ValueError("A loop of unknown length holds products or collectives.")
            return int(trips[1]) * inner

        return of_computation(self._entry)

    def _flops(self, names: dict[str, Instruction], own: Instruction) -> float:
        if own.operation != "dot":
            return 0
        left = re.match(r"(?:[^%]*)%([\w.-]+)", own.rest)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", own.rest)
        assert left and contracted
        lengths = _lengths(names[left[1]].shape)[0]
        axes = map(int, contracted[1].split(","))
        return 2 * math.prod(_lengths(own.shape)[0]) * math.prod(lengths[axis] for axis in axes)

    def _wire(self, _: dict[str, Instruction], own: Instruction) -> float:
        if own.operation not in COLLECTIVES:
            return 0
        groups = _GROUPS.search(own.rest)
        n = self._devices if groups is None else int(groups[1] or 1 + groups[2].count(","))
        rounds = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        return rounds.get(own.operation, (n - 1) / n) * _size(own.shape)


def _lengths(shape: str) -> list[list[int]]:
    """Reads the lengths of the axes of each array of a shape, which may be a tuple."""
    return [
        [int(length) for length in found.split(",") if length] for _, found in _SHAPE.findall(shape)
    ]


def _size(shape: str) -> int:
    kinds = [kind for kind, _ in _SHAPE.findall(shape)]
    return sum(
        BYTES[kind] * math.prod(lengths)
        for kind, lengths in zip(kinds, _lengths(shape), strict=True)
    )
