# SPDX-License-Identifier: Apache-2.0
"""The search: one parameter after the other, from the heuristic's config on, as long as something gains."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tpu_inference.tools.tune.spaces import Axes

ROUNDS = 2
MOST_MISSES = 1
"""Values of a parameter, one after the other, that may gain nothing before the search turns back: a last block that is cut short makes bumps."""
LEAST_STEP = 0.995
"""Of the best score so far, what another config must be below: less is noise of the compiler's."""


@dataclass(frozen=True)
class Found:
    """The best fields, and what every one tried came to."""

    best: Any
    scores: Mapping[Any, float]


def descend(start: Any, axes: Axes, possible: Callable[[Any], bool], score: Callable[[Any], float]) -> Found:
    """Coordinate descent: along each axis from value to value, as long as one of the next two is better.

    Args:
        start: A dataclass of parameters.
        axes: Parameter -> values to try, in order; the start's own need not be one.
        possible: Whether a config is to be scored at all.
        score: What is to become small; infinite for one that cannot be.
    """
    scores: dict[Any, float] = {}

    def scored(fields: Any) -> float:
        if fields not in scores:
            scores[fields] = score(fields) if possible(fields) else math.inf
        return scores[fields]

    def walk(best: Any, name: str, values: list[Any]) -> Any:
        misses = 0
        for value in values:
            following = replace(best, **{name: value})
            if scored(following) < LEAST_STEP * scored(best):
                best, misses = following, 0
            elif (misses := misses + 1) > MOST_MISSES:
                break
        return best

    best = start
    for _ in range(ROUNDS):
        before = best
        for name, values in axes.items():
            here = getattr(best, name)
            up, down = [x for x in values if x > here], [x for x in reversed(list(values)) if x < here]
            moved = walk(best, name, up)
            best = walk(best, name, down) if moved == best else moved
        if best == before:
            break
    return Found(best, {fields: x for fields, x in scores.items() if x < math.inf})


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
