# SPDX-License-Identifier: Apache-2.0
"""The loops of an operation's schedule: how full their bundles are, what they spill, and where its time goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tpu_inference.tools.schedule.bundles import Program
from tpu_inference.tools.schedule.emulator import Execution

_NAMES = {"MXU": "MATMUL", "VLOAD:FILL": "FILL", "VSTORE:SPILL": "SPILL"}
"""libtpu's names of slots that have a plainer one."""


@dataclass(frozen=True)
class SlotTable:
    """How many instructions of each sort each bundle has."""

    capacity: Mapping[str, int]
    rows: Sequence[Mapping[str, int]]

    @classmethod
    def parse(cls, text: str) -> "SlotTable":
        """Of libtpu's file: a title, names, capacities, a title, and a line for each bundle."""
        lines = text.splitlines()
        names = [_NAMES.get(name.strip(), name.strip()) for name in lines[1].split(",")]
        numbers = [tuple(map(int, line.split())) for line in (lines[2], *lines[4:]) if line.strip()[:1].isdigit()]
        rows = [dict(zip(names, row, strict=True)) for row in numbers]
        return cls(rows[0], rows[1:])

    def use(self, bundles: Sequence[int]) -> dict[str, float]:
        """Fraction of each slot that is taken."""
        count = max(len(bundles), 1)
        return {
            name: sum(self.rows[i][name] for i in bundles) / (count * capacity)
            for name, capacity in self.capacity.items()
            if capacity
        }

    def total(self, name: str, bundles: Sequence[int]) -> int:
        return sum(self.rows[i].get(name, 0) for i in bundles)


@dataclass(frozen=True)
class Loop:
    """A loop without the loops in it."""

    start: int
    """Its first bundle."""
    depth: int
    bundles: int
    cycles: int
    """Spent in it by one run of the operation, stalls included."""
    stalled: int
    """Of these, waiting for DMAs."""
    use: Mapping[str, float]
    """Slot -> fraction taken, over its bundles."""
    spills: int
    """Vector registers written to VMEM for lack of room, in one pass."""
    fills: int
    """And read back."""


def _bundles_of_loops(program: Program) -> list[list[int]]:
    """The bundles of each loop, without those of inner ones; a loop begins where libtpu says so and ends where the depth falls."""
    loops: list[list[int]] = []
    inside: list[list[int]] = []
    for i, (depth, tag) in enumerate(zip(program.depth, program.tags, strict=True)):
        while inside and (
            depth < program.depth[inside[-1][0]] or (tag == "LB" and depth == program.depth[inside[-1][0]])
        ):
            loops.append(inside.pop())
        if tag == "LB":
            inside.append([])
        if inside:
            inside[-1].append(i)
    return loops + inside


def loops_of(program: Program, table: SlotTable, run: Execution) -> list[Loop]:
    """Those that ran, the one with most cycles first."""
    found = []
    for bundles in _bundles_of_loops(program):
        stalled = sum(run.stalls.get(i, 0.0) for i in bundles)
        cycles = sum(run.counts[i] for i in bundles) + stalled
        found.append(
            Loop(
                bundles[0], program.depth[bundles[0]], len(bundles), int(cycles), int(stalled), table.use(bundles),
                table.total("SPILL", bundles), table.total("FILL", bundles),
            )
        )  # fmt: skip
    return sorted((loop for loop in found if loop.cycles), key=lambda loop: -loop.cycles)
