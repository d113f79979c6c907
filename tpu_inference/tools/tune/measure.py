# SPDX-License-Identifier: Apache-2.0
"""What a config costs on a shape, by the compiler's schedule; and a search over configs."""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax

from tpu_inference.tools import schedule
from tpu_inference.tools.kernel_report.cases import device_of, lower
from tpu_inference.tools.kernel_report.measure import Figure, roofs_of
from tpu_inference.tools.tune.search import descend, geometric_mean
from tpu_inference.tools.tune.spaces import Part

MOST_SECONDS = 40.0
"""Of a compile that is recorded, some three times as long as one that is not: a config that takes longer is not wanted."""


@dataclass(frozen=True)
class Cost:
    """Of a shape with a config. Microseconds of the whole op at DMA latencies of 300 and 1000 cycles."""

    microseconds: tuple[float, ...]
    spills: int
    """In the hottest loop of the op's costliest kernel."""
    unknown: int
    """Branches, waits and DMAs that could not be followed."""
    seconds: float
    """Of the compile, recorded."""

    @property
    def score(self) -> float:
        return geometric_mean(list(self.microseconds))


def cost(shape: Any, chip: str, config: Any) -> Cost | None:
    """None where the compiler refuses the config."""
    device = device_of(chip)
    start = time.monotonic()
    try:
        with schedule.workload(shape.workload(device)):
            _, recorded = schedule.record(lambda: lower(shape, device, config).compile())
    except jax.errors.JaxRuntimeError:
        return None
    seconds = time.monotonic() - start
    timings = [recorded.time(chip, latency) for latency in schedule.LATENCIES]
    figures = [
        Figure.of(timing, latency, 1.0, roofs_of(shape, chip, 1.0))
        for timing, latency in zip(timings, schedule.LATENCIES, strict=True)
    ]
    first, spills = timings[0], 0
    if hottest := max(first.kernels, key=lambda op: op.microseconds, default=None):
        loops = recorded.loops(hottest.name, first.machine)
        spills = loops[0].spills if loops else 0
    unknown = first.unknown.branches + first.unknown.waits + first.unknown.dmas
    return Cost(tuple(figure.total for figure in figures), spills, unknown, seconds)


@dataclass(frozen=True)
class Tuned:
    """A search's end, for one part of an op on shapes that share a key."""

    part: str
    key: str
    fields: Mapping[str, Any]
    start: Mapping[str, Any]
    """The heuristic's."""
    costs: Mapping[str, Cost]
    """By shape."""
    start_costs: Mapping[str, Cost]
    tried: int

    @property
    def gain(self) -> float:
        """Share of the heuristic's time that is saved; the geometric mean of the shapes."""
        ratios = [self.costs[name].score / self.start_costs[name].score for name in self.costs]
        return 1 - geometric_mean(ratios)

    @property
    def worst(self) -> float:
        """The same, of the shape and latency that gains least; below 0 where one loses."""
        pairs = [
            (mine, old)
            for name, found in self.costs.items()
            for mine, old in zip(found.microseconds, self.start_costs[name].microseconds, strict=True)
        ]
        return 1 - max(mine / old for mine, old in pairs)


class Search:
    """Over one part's configs, measured on `shapes`, which share a key."""

    def __init__(self, part: Part, shapes: Mapping[str, Any], chip: str) -> None:
        self.part, self.shapes, self.chip = part, shapes, chip
        self.key = next(iter(shapes.values())).key(device_of(chip))
        self.config = part.heuristic(self.key, chip)
        self.start = part.read(self.config)
        self._costs: dict[Any, Cost | None] = {}

    def _cost(self, name: str, fields: Any) -> Cost | None:
        """Once for each program."""
        program = (name, self.part.effective(self.shapes[name], fields))
        if program not in self._costs:
            self._costs[program] = cost(self.shapes[name], self.chip, self.part.make(self.config, fields))
        return self._costs[program]

    def costs(self, fields: Any) -> dict[str, Cost]:
        """By shape; without those that the compiler refuses."""
        found = {name: self._cost(name, fields) for name in self.shapes}
        return {name: x for name, x in found.items() if x is not None}

    def _score(self, fields: Any) -> float:
        # A figure with more unknown in it is a lower bound, and would win for being less honest.
        total, spills, first = [], [], self.costs(self.start)
        for name in self.shapes:
            mine = self._cost(name, fields)
            if mine is None or mine.seconds > MOST_SECONDS or mine.unknown > first[name].unknown:
                return math.inf
            total.append(mine.score)
            spills.append(mine.spills)
        score = geometric_mean(total)
        print(f"  {self.part.name} {asdict(fields)}: {score:.2f} µs, spills {spills}", file=sys.stderr, flush=True)
        return score

    def run(self) -> Tuned:
        """Raises ScheduleError where the compiler refuses the heuristic's own config."""
        if len(self.costs(self.start)) < len(self.shapes):
            raise schedule.ScheduleError(f"the compiler refuses {self.start} for {self.key} on {self.chip}")
        found = descend(
            self.start,
            self.part.axes(self.key, self.start),
            lambda fields: self.part.possible(self.key, fields),
            self._score,
        )
        costs, first = self.costs(found.best), self.costs(self.start)
        return Tuned(
            self.part.name, str(self.key), asdict(found.best), asdict(self.start), costs, first, len(found.scores)
        )
