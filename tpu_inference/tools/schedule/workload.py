# SPDX-License-Identifier: Apache-2.0
"""A workload: the lengths and tables that kernels are given at run time, so that loops over them run as they would."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tpu_inference.tools.schedule.environment import ScheduleError
from tpu_inference.tools.schedule.hlo import base_name

Scalars = Mapping[int, np.ndarray]


@dataclass
class Workload:
    """Kernel's `name=` -> index of a scalar-prefetch argument -> its values."""

    values: dict[str, Scalars] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def scalars_of(self, operation: str) -> Scalars | None:
        name = base_name(operation)
        if name not in self.values:
            return None
        self.used.add(name)
        return self.values[name]


_ACTIVE: ContextVar[Workload | None] = ContextVar("workload", default=None)


def active() -> Workload:
    """That of the innermost `workload` around the caller; an empty one outside."""
    return _ACTIVE.get() or Workload()


@contextmanager
def workload(values: Mapping[str, Mapping[int, Any]]) -> Iterator[Workload]:
    """What is recorded inside runs its kernels on these scalar-prefetch arguments.

    The emulator puts them into SMEM where the kernel's own program brings them in, so the program is the one that serves. Where a kernel is called
    several times in a program, all calls get the same values.

    Args:
        values: The `name=` of a `pallas_call` -> index among its scalar-prefetch arguments -> array.

    Raises:
        ScheduleError: at exit, a name that no recorded program has as a kernel.
    """
    made = Workload({name: {i: np.asarray(x) for i, x in arrays.items()} for name, arrays in values.items()})
    token = _ACTIVE.set(made)
    try:
        yield made
    finally:
        _ACTIVE.reset(token)
    if unused := sorted(set(made.values) - made.used):
        raise ScheduleError(f"no kernel named {', '.join(unused)} was recorded within the workload")
