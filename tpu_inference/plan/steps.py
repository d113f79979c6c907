# SPDX-License-Identifier: Apache-2.0
"""What a step costs by the compiler's own schedule: the engine's programs, compiled for the slice and followed bundle by bundle."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from tpu_inference.kernels.ragged_paged_attention.paged import NO_WINDOW
from tpu_inference.plan.ici import IciCost, ici_cost
from tpu_inference.tools import schedule
from tpu_inference.tools.schedule.hlo import base_name

FAST, SLOW = (300, 1.0), (1000, 0.83)
"""(cycles of a DMA, share of the published HBM bandwidth): what the estimate ranges between."""
KINDS = ("attention", "matmul", "weight loads", "norm and elementwise", "copies")
_MATMULS = {"convolution", "dot"}
_MOVES = {
    "bitcast", "broadcast", "concatenate", "constant", "copy", "dynamic-slice", "dynamic-update-slice", "fusion", "gather", "iota",
    "pad", "parameter", "reshape", "slice", "transpose", "tuple", "get-tuple-element",
}  # fmt: skip


@dataclass(frozen=True)
class Load:
    """What a step is given: rows that decode, each with `context` tokens before it, and one prompt's chunk that ends at `context`."""

    name: str
    decodes: int
    prompt: int
    context: int

    @property
    def rows(self) -> int:
        return self.decodes + bool(self.prompt)

    @property
    def tokens(self) -> int:
        return self.decodes + self.prompt


@dataclass(frozen=True)
class StepCost:
    """Microseconds of one step on every device, without the sampler."""

    load: Load
    bucket: str
    kinds: dict[str, float]
    """At the fast assumptions."""
    fast: float
    slow: float
    ici: IciCost
    unknown: str
    """What could not be followed, which makes the times lower bounds; empty where all was."""


def kernel_scalars(
    load: Load, rows: int, width: int, block_size: int, num_blocks: int, window: int | None
) -> dict[str, Any]:
    """Values of the attention kernels' scalar arguments, by kernel and argument, as `attention_pallas` would make them of this load."""
    lengths = [1] * load.decodes + [load.prompt] * bool(load.prompt)
    seq_lens = np.zeros(rows, np.int32)
    seq_lens[: load.rows] = load.context
    starts = np.full(rows + 1, load.tokens, np.int32)
    starts[: load.rows + 1] = np.cumsum([0, *lengths])
    pages = -(-load.context // block_size)
    tables = np.zeros((rows, width), np.int32)
    tables[: load.rows, :pages] = 1 + np.arange(load.rows * pages).reshape(load.rows, pages) % (num_blocks - 1)
    scalars = np.asarray([load.decodes, load.rows, 0, window or NO_WINDOW], np.int32)
    many = {0: scalars, 1: seq_lens, 2: starts, 3: tables.reshape(-1)}
    return {"paged_decode": {0: scalars, 1: seq_lens, 2: many[3]}, "paged_write": many, "paged_prefill": many}


def _inside(module: Any) -> dict[str, set[str]]:
    """Computation -> opcodes in it and in what its fusions call."""
    direct: dict[str, set[str]] = {}
    calls: dict[str, list[str]] = {}
    for operation in module.operations.values():
        direct.setdefault(operation.computation, set()).add(operation.opcode)
        calls.setdefault(operation.computation, []).extend(operation.called)

    def opcodes(computation: str) -> set[str]:
        return direct.get(computation, set()).union(*(opcodes(name) for name in calls.get(computation, ())))

    return {name: opcodes(name) for name in direct}


def _is_attention(operation: Any) -> bool:
    """Whether it is a kernel that `kernel_scalars` has values for."""
    return operation.kind == "kernel" and base_name(operation.name).startswith("paged")


def kind_of(operation: Any, inside: Mapping[str, set[str]], written_bytes: int = 0) -> str:
    """One of KINDS, by what an operation consists of and what it writes to HBM."""
    if operation.kind == "kernel":  # the others multiply
        return "attention" if _is_attention(operation) else "matmul"
    opcodes = {operation.opcode}.union(*(inside.get(name, set()) for name in operation.called))
    if opcodes & _MATMULS:
        return "matmul"
    if opcodes <= _MOVES:
        # Of stacked weights, each step of the scan takes its layer's into VMEM, where the matmul finds it; to HBM it is a copy.
        slices = operation.opcode == "fusion" and "dynamic-slice" in opcodes
        return "weight loads" if slices and not written_bytes else "copies"
    return "norm and elementwise"


def with_scalars(recorded: Any, scalars: Mapping[str, Any]) -> Any:
    """A recorded program with values for the scalar arguments of kernels, by operation, that are the same for all loads."""
    schedules = {name: _on(old, scalars[name]) if name in scalars else old for name, old in recorded.schedules.items()}
    return schedule.Recorded(recorded.module, schedules)


def _on(old: Any, scalars: Any) -> Any:
    """A schedule with these values for its scalar arguments; its text, which takes longer to read than to follow, is read once."""
    new = replace(old, scalars=scalars)
    vars(new)["program"] = old.program
    return new


@dataclass(frozen=True)
class Timer:
    """A recorded program under one pair of assumptions. What is not attention does not depend on the load, and is followed once."""

    recorded: Any
    generation: str
    assumed: tuple[int, float]
    """FAST or SLOW."""

    @cached_property
    def _opcodes(self) -> dict[str, set[str]]:
        return _inside(self.recorded.module)

    @cached_property
    def _others(self) -> Any:
        operations = self.recorded.module.operations
        schedules = {x: y for x, y in self.recorded.schedules.items() if not _is_attention(operations[x])}
        return schedule.Recorded(self.recorded.module, schedules).time(self.generation, *self.assumed)

    def time(self, scalars: Mapping[str, Any]) -> Any:
        """The whole program's Timing with these values for its kernels."""
        schedules = {
            name: _on(old, scalars.get(base_name(name)))
            for name, old in self.recorded.schedules.items()
            if _is_attention(self.recorded.module.operations[name])
        }
        kernels = schedule.Recorded(self.recorded.module, schedules).time(self.generation, *self.assumed)
        ops = (*self._others.ops, *kernels.ops)
        timed = {op.name for op in ops}
        missing = tuple(name for name in self._others.unknown.operations if name not in timed)
        unknown = schedule.Unknown.of(ops, self._others.unknown.loops, missing)
        return replace(self._others, ops=ops, unknown=unknown)

    def by_kind(self, timing: Any) -> dict[str, float]:
        """Microseconds of each of KINDS."""
        kinds = dict.fromkeys(KINDS, 0.0)
        for op in timing.ops:
            operation = self.recorded.module.operations[op.name]
            kinds[kind_of(operation, self._opcodes, op.written_bytes)] += op.microseconds
        # HBM is still busy with XLA's asynchronous copies when the operations are done.
        kinds["copies"] += max(timing.microseconds - sum(kinds.values()), 0.0)
        return kinds


@dataclass(frozen=True)
class StepTimer:
    """Prices loads of one forward program."""

    fast: Timer
    slow: Timer
    devices: int
    link_bytes_per_s: float
    bucket: str
    windows: Mapping[int | None, int]
    """Sliding window -> number of layers that have it; the kernels' time is the layers' mean."""
    shape: tuple[int, int, int, int]
    """(rows, table width, block size, number of blocks)"""

    def cost(self, load: Load) -> StepCost:
        """Of one step."""
        layers = sum(self.windows.values())
        kinds, fast, slow, unknown = dict.fromkeys(KINDS, 0.0), 0.0, 0.0, ""
        for window, count in self.windows.items():
            scalars = kernel_scalars(load, *self.shape, window)
            timed, share = self.fast.time(scalars), count / layers
            for kind, microseconds in self.fast.by_kind(timed).items():
                kinds[kind] += share * microseconds
            fast += share * timed.microseconds
            slow += share * self.slow.time(scalars).microseconds
            unknown = str(timed.unknown) if timed.unknown else unknown
        ici = ici_cost(timed.collectives, self.devices, self.link_bytes_per_s)
        return StepCost(load, self.bucket, kinds, fast, slow, ici, unknown)
