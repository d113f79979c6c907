# SPDX-License-Identifier: Apache-2.0
"""Reads a compiled program's text: its operations, how often each runs, and what its collectives move."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_OPERATION = re.compile(r"^ *(ROOT )?%([\w.\-]+) = (.*?[\]\})]) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_COLLECTIVE = re.compile(r"(all-|reduce-scatter|collective-|ragged-all)")
_GROUPS = re.compile(
    r"replica_groups=(?:\{\{(?P<listed>[\d,]*)\}|\[\d+,(?P<size>\d+)\]|mesh\[(?P<mesh>[^\]]*)\](?: \{(?P<axes>[^}]*)\})?)"
)
_METADATA = re.compile(r", (?:metadata|frontend_attributes)=\{[^}]*\}|%[\w.\-]+|\(param[^)]*\)")
_MOSAIC = 'custom_call_target="tpu_custom_call"'
_PLACES = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
"""Memory that is set aside, and slices that XLA's DMAs have put side by side."""
_CONTROL = ("while", "conditional", "call")
_WITHOUT_CODE = (
    *_CONTROL,
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
)
ASYNC_COPIES = ("copy-start", "slice-start", "dynamic-slice-start")
"""XLA's own DMAs, which run beside other operations."""


def _count(dims: str) -> int:
    """Elements of an array of dimensions "2,3"; 1 of a scalar's ""."""
    return prod(map(int, dims.split(","))) if dims else 1


def shape_bytes(text: str) -> int:
    """Of all arrays of a type, as HLO writes it."""
    return sum(max(int(bits or 8), 8) // 8 * _count(dims) for _, bits, dims in _SHAPE.findall(text))


@dataclass(frozen=True)
class Operation:
    name: str
    opcode: str
    type: str
    rest: str
    """Operands and attributes."""
    computation: str
    is_root: bool = False

    @property
    def kind(self) -> str:
        """The opcode, but "kernel" for a Pallas kernel."""
        return "kernel" if self.opcode == "custom-call" and _MOSAIC in self.rest else self.opcode

    @property
    def has_code(self) -> bool:
        """Whether it is compiled to a schedule of its own; single numbers are computed by the program around them."""
        asynchronous = self.opcode.endswith(("-start", "-update", "-done"))
        if asynchronous or self.opcode in _WITHOUT_CODE or _PLACES.search(self.rest):
            return False
        return any(_count(dims) > 1 for _, _, dims in _SHAPE.findall(self.type))

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def called(self) -> list[str]:
        branches = _BRANCHES.search(self.rest)
        listed = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
        return _CALLED.findall(self.rest) + listed

    @property
    def group_size(self) -> int | None:
        """Devices of a collective's group; None where the text does not say."""
        match = _GROUPS.search(self.rest)
        if match is None:
            return None
        if match["mesh"]:
            sizes = {name: int(size) for name, size in (axis.split("=") for axis in match["mesh"].split(","))}
            return prod(sizes[axis.strip()] for axis in (match["axes"] or ",".join(sizes)).split(","))
        return int(match["size"]) if match["size"] else match["listed"].count(",") + 1


@dataclass(frozen=True)
class Collective:
    """An operation between devices: not emulated. Bytes are one device's, of one execution."""

    name: str
    kind: str
    trips: int
    operand_bytes: int
    result_bytes: int
    group_size: int | None


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    operations: dict[str, Operation] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Module":
        module, computation = cls(), ""
        for line in text.splitlines():
            if (match := _COMPUTATION.match(line)) and not line.startswith(" "):
                computation = match[2]
            elif match := _OPERATION.match(line):
                operation = Operation(match[2], match[4], match[3], match[5], computation, bool(match[1]))
                module.operations[operation.name] = operation
        return module

    def _within(self, computation: str) -> Iterator[Operation]:
        return iter(self._by_computation.get(computation, ()))

    @cached_property
    def _by_computation(self) -> dict[str, list[Operation]]:
        found: dict[str, list[Operation]] = {}
        for operation in self.operations.values():
            found.setdefault(operation.computation, []).append(operation)
        return found

    @cached_property
    def _callers(self) -> dict[str, Operation]:
        return {name: operation for operation in self.operations.values() for name in operation.called}

    def _constant(self, name: str) -> int | None:
        """An operation's value, if it is a constant, or a copy of one."""
        operation = self.operations.get(name)
        if operation is not None and operation.opcode == "copy":
            return self._constant(operation.operands[0])
        value = operation.rest.split(")")[0] if operation is not None and operation.opcode == "constant" else ""
        return int(value) if re.fullmatch(r"-?\d+", value) else None

    def _trip_count(self, loop: Operation) -> int | None:
        """TPU programs carry no trip count: it is that of `while i < constant`, where i goes up from a constant. Else None."""
        condition = re.findall(r"condition=%?([\w.\-]+)", loop.rest)
        test = next((x for name in condition for x in self._within(name) if x.is_root), None)
        if test is None or test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        counter, limit = (self.operations.get(name) for name in test.operands)
        carried = self.operations.get(loop.operands[0])
        if counter is None or limit is None or carried is None or counter.opcode != "get-tuple-element":
            return None
        index = re.search(r"index=(\d+)", counter.rest)
        start = self._constant(carried.operands[int(index[1])]) if index and carried.opcode == "tuple" else None
        end = self._constant(limit.name)
        return None if start is None or end is None else max(end - start, 0)

    @cached_property
    def _trip_counts(self) -> dict[str, int | None]:
        return {x.name: self._trip_count(x) for x in self.operations.values() if x.opcode == "while"}

    @property
    def unknown_loops(self) -> list[str]:
        """Loops whose trip count is not a constant: counted as one trip."""
        return [name for name, count in self._trip_counts.items() if count is None]

    def trips(self, operation: Operation) -> int:
        """The product of the trip counts of the loops around it. Both branches of a conditional count as taken."""
        total, caller, seen = 1, self._callers.get(operation.computation), set()
        while caller is not None and caller.name not in seen:
            seen.add(caller.name)
            count = self._trip_counts.get(caller.name)
            total *= 1 if count is None else count
            caller = self._callers.get(caller.computation)
        return total

    def _parts(self, operation: Operation) -> Iterator[Operation]:
        """The operations of what an operation calls, and of what those call."""
        for name in operation.called:
            for part in self._within(name):
                yield part
                yield from self._parts(part)

    def top_level(self) -> Iterator[Operation]:
        """Operations that are run as such, not as a part of a fusion, a reduction or an asynchronous call."""
        parts = {y.name for x in self.operations.values() if x.opcode not in _CONTROL for y in self._parts(x)}
        return (x for x in self.operations.values() if x.name not in parts)

    def _between_devices(self, operation: Operation) -> Operation | None:
        """The collective that an operation is, that it is fused around, or that it lets another core start."""
        inside = self._parts(operation) if operation.opcode in ("fusion", "async-start") else ()
        found = (x for x in (operation, *inside) if _COLLECTIVE.match(x.opcode) and not x.opcode.endswith("-done"))
        return next(found, None)

    @cached_property
    def collectives(self) -> tuple[Collective, ...]:
        found = ((x, self._between_devices(x)) for x in self.top_level())
        return tuple(
            Collective(
                x.name, inner.opcode.removesuffix("-start"), self.trips(x), sum(map(self._bytes_of, inner.operands)),
                self.result_bytes(inner), inner.group_size,
            )
            for x, inner in found
            if inner is not None
        )  # fmt: skip

    def _bytes_of(self, name: str) -> int:
        return shape_bytes(self.operations[name].type) if name in self.operations else 0

    def result_bytes(self, operation: Operation) -> int:
        """Without the operands, which some -start operations return as well, and without their scalars."""
        size = shape_bytes(operation.type)
        if not operation.opcode.endswith("-start"):
            return size
        arrays = sum(shape_bytes(match[0]) for match in _SHAPE.finditer(operation.type) if match[3])
        return arrays - sum(map(self._bytes_of, operation.operands)) or size

    def signature(self, operation: Operation) -> str:
        """The same for operations that compile to the same code. What a body consists of is listed in any order."""
        bodies = sorted(
            _METADATA.sub("", x.type + x.opcode + x.rest) for c in operation.called for x in self._within(c)
        )
        operands = [self.operations[x].type for x in operation.operands if x in self.operations]
        return "\n".join([operation.type, operation.opcode, _METADATA.sub("", operation.rest), *operands, *bodies])


def base_name(name: str) -> str:
    """Of an operation, without what XLA appends to make it unique."""
    return re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", name)
