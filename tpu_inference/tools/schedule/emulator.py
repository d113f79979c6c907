# SPDX-License-Identifier: Apache-2.0
"""Executes the scalar program of an operation's bundles: which bundles run, how often, what DMAs move and where they are waited for.

A bundle takes a cycle, since the compiler has padded final bundles for every fixed latency. Scalar registers, SMEM, predicates, branches with
their delay slots, DMAs, semaphores and waits are followed; vector instructions only take their place. HBM is one pipe that reads and writes share,
plus a latency. What comes from vectors, from other devices or from arrays that nobody gave is not known: a branch on it is not taken, a wait for
it does not wait, and both are counted.
"""

import heapq
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from tpu_inference.tools.schedule.arithmetic import Value, signed
from tpu_inference.tools.schedule.bundles import Instruction, Program
from tpu_inference.tools.schedule.chips import GRANULE, LOCAL_BYTES_PER_CYCLE, LOCAL_LATENCY, Machine
from tpu_inference.tools.schedule.environment import ScheduleError

MAX_STEPS, MAX_SECONDS = 30_000_000, 120
_LARGEST_COUNT = 0x7FFFFFFF


@dataclass
class Unknown:
    """How often something could not be followed; with all of them 0 the execution is the program's own."""

    branches: int = 0
    waits: int = 0
    dmas: int = 0
    truncated: int = 0
    """1 where the execution was given up after MAX_STEPS or MAX_SECONDS."""

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass
class Execution:
    """One run of an operation."""

    cycles: int = 0
    bundles: int = 0
    """Executed ones."""
    waited: float = 0.0
    """Cycles stalled for DMAs."""
    dmas: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    """Read from and written to HBM."""
    local_bytes: int = 0
    """Moved inside the chip."""
    unknown: Unknown = field(default_factory=Unknown)
    stalls: dict[int, float] = field(default_factory=dict)
    """Cycles stalled at each bundle."""
    counts: list[int] = field(default_factory=list)
    """How often each bundle ran."""


class Emulator:
    """A run of one program."""

    def __init__(self, program: Program, machine: Machine, scalars: Mapping[int, np.ndarray] | None = None) -> None:
        """`scalars`: values of the operation's parameters that go into SMEM, by index."""
        self.program, self.machine, self.scalars = program, machine, scalars or {}
        self.values: dict[str, Value] = {}
        self.result = Execution()
        self._registers: dict[str, Value] = {}
        self._smem: dict[int, Value] = {}
        self._bases: dict[str, int] = {}
        self._flags: Counter[int] = Counter()
        self._flying: dict[int, list[tuple[float, int]]] = {}
        """Semaphore -> (arrival, granules) of DMAs."""
        self._time: float = 0.0
        self._hbm_free: float = 0.0
        self._place = 0
        self._jump: int | None = None
        """Where the branch in this bundle leads, if it is taken."""

    def base_of(self, symbol: str) -> int:
        """Of an allocation: somewhere of its own."""
        return self._bases.setdefault(symbol, (len(self._bases) + 1) << 20)

    def run(self) -> Execution:
        program, size = self.program, len(self.program.bundles)
        methods = {kind: getattr(self, f"_{kind}") for bundle in program.bundles for kind in {x.kind for x in bundle}}
        following = _next_with_work(program)
        changes = [0] * (size + 1)
        jump: tuple[int, int] | None = None  # (bundle after the delay slots, where it goes instead)
        steps, started, here = 0, time.monotonic(), 0
        while here < size:
            stop = here + 1 if program.bundles[here] else min(following[here], jump[0] if jump else size)
            changes[here] += 1
            changes[stop] -= 1
            self._place, self._jump = here, None
            for instruction in program.bundles[here]:
                taken = True if instruction.predicate is None else instruction.predicate(self)
                methods[instruction.kind](instruction, taken)
            self._time += stop - here
            here = stop
            if jump and here == jump[0]:
                here, jump = jump[1], None
            if self._jump is not None:
                slots = program.slots_after(stop - 1, self.machine.delay_slots)
                self._time += self.machine.delay_slots - slots
                here, jump = (stop, (stop + slots, self._jump)) if slots else (self._jump, None)
            steps += 1
            if steps > MAX_STEPS or (steps & 0xFFFF == 0 and time.monotonic() - started > MAX_SECONDS):
                self.result.unknown.truncated = 1
                break
        self.result.counts = list(accumulate(changes[:-1]))
        self.result.bundles = sum(self.result.counts)
        self.result.cycles = int(max(self._time, self._hbm_free))
        return self.result

    # One method for each kind of instruction. `taken` is its predicate: None where that is not known.

    def _write(self, instruction: Instruction, taken: Value, value: Value) -> None:
        if not taken:
            kept = instruction.otherwise(self) if instruction.otherwise else self._registers.get(instruction.register)
            value = kept if taken is not None or kept == value else None
        self.values[instruction.target] = self._registers[instruction.register] = value

    def _compute(self, instruction: Instruction, taken: Value) -> None:
        value = None if taken is False else instruction.function(*(operand(self) for operand in instruction.operands))
        self._write(instruction, taken, value)

    def _load(self, instruction: Instruction, taken: Value) -> None:
        address = instruction.operands[0](self)
        self._write(instruction, taken, None if address is None else self._smem.get(address))

    def _pop(self, instruction: Instruction, taken: Value) -> None:
        """A result of an earlier division; of two, the quotient first."""
        value = instruction.operands[0](self)
        if isinstance(value, list):
            value = value.pop(0) if value else None
        self._write(instruction, taken, value)

    def _parameter(self, instruction: Instruction, taken: Value) -> None:
        given = self.scalars.get(instruction.parameter)
        self._write(instruction, taken, None if given is None else int(given.flat[0]) & 0xFFFFFFFF)

    def _phi(self, instruction: Instruction, taken: Value) -> None:
        self.values[instruction.target] = self._registers.get(instruction.register)

    def _store(self, instruction: Instruction, taken: Value) -> None:
        address, value = (operand(self) for operand in instruction.operands)
        if address is not None and (taken or taken is None):
            self._smem[address] = value if taken else None

    def _branch(self, instruction: Instruction, taken: Value) -> None:
        self.result.unknown.branches += taken is None
        if taken:
            if instruction.region not in self.program.regions:
                raise ScheduleError(
                    f"bundle {self._place:#x} branches to region {instruction.region}, which is not there"
                )
            self._jump = self.program.regions[instruction.region]

    def _copy(self, instruction: Instruction, taken: Value) -> None:
        if taken is not None and not taken:
            return
        operands = [operand(self) for operand in instruction.operands]
        granules = operands[1] if len(operands) > 1 else None
        self.result.unknown.dmas += granules is None or taken is None
        granules = 0 if granules is None or granules > _LARGEST_COUNT else granules
        self.result.dmas += 1
        arrival = self._move(instruction.name, granules * GRANULE)
        if instruction.parameter in self.scalars and operands[2] is not None:
            for i, value in enumerate(self.scalars[instruction.parameter].flat):
                self._smem[operands[2] + i] = int(value) & 0xFFFFFFFF
        if len(operands) > 3 and operands[3] is not None:
            heapq.heappush(self._flying.setdefault(operands[3], []), (arrival, granules))

    def _move(self, name: str, size: int) -> float:
        """Count `size` bytes; when they have arrived."""
        result, ends = self.result, name.count("hbm")
        if not ends:
            result.local_bytes += size
            return self._time + LOCAL_LATENCY + size / LOCAL_BYTES_PER_CYCLE
        self._hbm_free = max(self._time, self._hbm_free) + ends * size / self.machine.bytes_per_cycle
        result.read_bytes += size if name.startswith("hbm") else 0
        result.written_bytes += size if ends == 2 or not name.startswith("hbm") else 0
        return self._hbm_free + self.machine.latency

    def _land(self, flag: int) -> None:
        flying = self._flying.get(flag)
        while flying and flying[0][0] <= self._time:
            self._flags[flag] += heapq.heappop(flying)[1]

    def _wait(self, instruction: Instruction, taken: Value) -> None:
        if taken is not None and not taken:
            return
        flag, wanted = (operand(self) for operand in instruction.operands[:2])
        if taken is None or flag is None or wanted is None or wanted > _LARGEST_COUNT:
            self.result.unknown.waits += 1
            return
        self._land(flag)
        flying, began = self._flying.get(flag, []), self._time
        while self._flags[flag] < wanted and flying:
            arrival, granules = heapq.heappop(flying)
            self._flags[flag] += granules
            self._time = max(self._time, arrival)
        if self._flags[flag] < wanted:
            self.result.unknown.waits += 1
            self._flags[flag] = wanted
        if self._time > began:
            self.result.waited += self._time - began
            self.result.stalls[self._place] = self.result.stalls.get(self._place, 0.0) + self._time - began

    def _signal(self, instruction: Instruction, taken: Value) -> None:
        operands = [operand(self) for operand in instruction.operands]
        if (taken or taken is None) and len(operands) > 1 and None not in operands[:2]:
            self._land(operands[0])
            self._flags[operands[0]] += signed(operands[1])

    def _delay(self, instruction: Instruction, taken: Value) -> None:
        self._time += instruction.operands[0](self) or 0


def _next_with_work(program: Program) -> list[int]:
    """For each bundle the first from it on with scalar instructions."""
    following = [len(program.bundles)] * (len(program.bundles) + 1)
    for i in range(len(program.bundles) - 1, -1, -1):
        following[i] = i if program.bundles[i] else following[i + 1]
    return following
