# SPDX-License-Identifier: Apache-2.0
"""What the emulation of a program comes to: time and bytes of each operation, and all that is not in the figure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tpu_inference.tools.schedule.chips import Machine
from tpu_inference.tools.schedule.emulator import Execution
from tpu_inference.tools.schedule.hlo import Collective, Operation


@dataclass(frozen=True)
class OpTiming:
    """One operation. Times and bytes are of all of its trips, counters of one."""

    name: str
    kind: str
    """"kernel" for a Pallas kernel, else the HLO opcode."""
    trips: int
    microseconds: float
    read_bytes: int
    written_bytes: int
    local_bytes: int
    waited_microseconds: float
    bundles: int
    dmas: int
    unknown_branches: int
    unknown_waits: int
    unknown_dmas: int
    truncated: int

    @classmethod
    def of(cls, operation: Operation, trips: int, run: Execution, machine: Machine) -> "OpTiming":
        unknown = run.unknown
        return cls(
            operation.name, operation.kind, trips, trips * machine.microseconds(run.cycles), trips * run.read_bytes,
            trips * run.written_bytes, trips * run.local_bytes, trips * machine.microseconds(run.waited), run.bundles, run.dmas,
            unknown.branches, unknown.waits, unknown.dmas, unknown.truncated,
        )  # fmt: skip


@dataclass(frozen=True)
class AsyncCopy:
    """A copy that XLA starts in one place and waits for in another: no time of its own, but bytes through the same HBM."""

    name: str
    trips: int
    bytes: int
    """Of one trip."""


@dataclass(frozen=True)
class Unknown:
    """What could not be followed. With any of it, a time is a lower bound."""

    branches: int
    waits: int
    dmas: int
    truncated: int
    loops: tuple[str, ...]
    """Of the program, with a trip count that is no constant: counted as one trip."""
    operations: tuple[str, ...]
    """Without a schedule."""

    @classmethod
    def of(cls, ops: Sequence[OpTiming], loops: tuple[str, ...], operations: tuple[str, ...]) -> "Unknown":
        total: Counter[str] = Counter()
        for op in ops:
            total.update(
                branches=op.unknown_branches, waits=op.unknown_waits, dmas=op.unknown_dmas, truncated=op.truncated
            )
        return cls(total["branches"], total["waits"], total["dmas"], total["truncated"], loops, operations)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        parts = [f"{len(x) if isinstance(x, tuple) else x} {name}" for name, x in vars(self).items() if x]
        return ", ".join(parts) or "none"


@dataclass(frozen=True)
class Timing:
    """A program, once."""

    ops: tuple[OpTiming, ...]
    async_copies: tuple[AsyncCopy, ...]
    collectives: tuple[Collective, ...]
    """Not in any time here."""
    unknown: Unknown
    machine: Machine

    @property
    def kernels(self) -> tuple[OpTiming, ...]:
        return tuple(op for op in self.ops if op.kind == "kernel")

    @property
    def wrappers(self) -> tuple[OpTiming, ...]:
        """All that is no Pallas kernel."""
        return tuple(op for op in self.ops if op.kind != "kernel")

    @property
    def moved_bytes(self) -> int:
        """Through HBM, both ways."""
        copied = sum(copy.trips * copy.bytes for copy in self.async_copies)
        return copied + sum(op.read_bytes + op.written_bytes for op in self.ops)

    @property
    def microseconds(self) -> float:
        """All operations one after the other; at least what HBM takes for their bytes and those of asynchronous copies."""
        return max(sum(op.microseconds for op in self.ops), self.moved_bytes / self.machine.bytes_per_second * 1e6)
