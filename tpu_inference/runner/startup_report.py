# SPDX-License-Identifier: Apache-2.0
"""One table at INFO of where start-up time and memory went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Phase:
    """A row: what, how long, how many bytes it left allocated, and a remark."""

    name: str
    seconds: float = 0.0
    num_bytes: int | None = None
    note: str = ""


@dataclass
class StartupReport:
    """Phases in the order they happened."""

    phases: list[Phase] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Time a phase; the caller may set its bytes and note."""
        phase = Phase(name)
        start = time.monotonic()
        yield phase
        phase.seconds = time.monotonic() - start
        self.phases.append(phase)

    def render(self) -> str:
        """The table, one line a phase and a total."""
        rows = [("phase", "seconds", "memory", "")]
        rows += [(p.name, f"{p.seconds:.2f}", format_bytes(p.num_bytes), p.note) for p in self.phases]
        rows.append(("total", f"{sum(p.seconds for p in self.phases):.2f}", "", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{name:<{widths[0]}}  {seconds:>{widths[1]}}  {memory:>{widths[2]}}  {note}".rstrip()
            for name, seconds, memory, note in rows
        ]
        return "\n".join(lines)


def format_bytes(num_bytes: int | None) -> str:
    """`1.50 GiB`; empty for None."""
    if num_bytes is None:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size * 0.99999:  # what would print as 1024.00 of the smaller unit
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
