# SPDX-License-Identifier: Apache-2.0
"""A case's report: the figure under each assumption, and what guards it."""

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from tpu_inference.tools import schedule
from tpu_inference.tools.kernel_report.cases import Case, Shape
from tpu_inference.tools.schedule.environment import ScheduleError, without_recording

_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')
HOT_LOOPS = 2
LEAST_USE = 0.02


@dataclass(frozen=True)
class Figure:
    """The op under one pair of assumptions. Microseconds."""

    latency: int
    bandwidth: float
    kernels: float
    wrappers: float
    total: float
    roofline: float
    """Of the roof at full bandwidth: 1 is as fast as the chip can be."""

    @classmethod
    def of(cls, timing: schedule.Timing, latency: int, bandwidth: float, roofs: tuple[float, float]) -> "Figure":
        """`roofs`: microseconds of the useful work at full bandwidth, and at this one."""
        kernels = sum(op.microseconds for op in timing.kernels)
        wrappers = sum(op.microseconds for op in timing.wrappers)
        # Without kernels all is wrappers, and the roof is that of them.
        total = max(kernels, roofs[1]) + wrappers if timing.kernels else max(wrappers, roofs[1])
        total = max(total, timing.microseconds)
        return cls(
            latency, bandwidth, round(kernels, 2), round(wrappers, 2), round(total, 2), round(roofs[0] / total, 4)
        )


@dataclass(frozen=True)
class Kernel:
    """Of one run, at the first of the assumptions."""

    name: str
    microseconds: float
    vmem_bytes: int | None
    loops: list[dict[str, Any]]
    """`schedule.slots.Loop`s with most cycles, as dicts; slots that are hardly used are left out."""


@dataclass(frozen=True)
class Report:
    op: str
    shape: str
    about: str
    chip: str
    form: str
    compile_seconds: float
    """In a process that records nothing."""
    useful_bytes: int
    useful_flops: int
    moved_bytes: int
    temporary_bytes: int
    """HBM that the program needs beside its arguments and results."""
    figures: list[Figure]
    kernels: list[Kernel]
    unknown: Mapping[str, Any]
    versions: Mapping[str, str]
    date: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Report":
        figures, kernels = [Figure(**x) for x in data["figures"]], [Kernel(**x) for x in data["kernels"]]
        return cls(**{**data, "figures": figures, "kernels": kernels})

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


def _compile_seconds(case: Case) -> float:
    """Of a process of its own: recording makes compiles of long straight code several times as slow."""
    command = [sys.executable, "-m", "tpu_inference.tools.kernel_report", "--compile-only"]
    command += ["--op", case.op, "--shape", case.name, "--chip", case.chip]
    done = subprocess.run(command, env=without_recording(), capture_output=True, text=True)
    if done.returncode:
        raise ScheduleError(f"{case.name} does not compile for {case.chip}:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def _kernels(recorded: schedule.Recorded, timing: schedule.Timing) -> list[Kernel]:
    found = []
    for op in timing.kernels:
        vmem = _VMEM.search(recorded.module.operations[op.name].rest)
        loops = [asdict(loop) for loop in recorded.loops(op.name, timing.machine)[:HOT_LOOPS]]
        for loop in loops:
            loop["use"] = {slot: round(use, 2) for slot, use in loop["use"].items() if use >= LEAST_USE}
        found.append(Kernel(op.name, round(op.microseconds, 2), int(vmem[1]) if vmem else None, loops))
    return found


def roofs_of(shape: Shape, chip: str, bandwidth: float) -> tuple[float, float]:
    """Microseconds of the useful work at full bandwidth, and at this share of it."""
    full = schedule.Machine.of(chip, 0, 1.0)
    compute = shape.useful_flops / full.flops(shape.dtype)
    memory = shape.useful_bytes / full.bytes_per_second
    return max(compute, memory) * 1e6, max(compute, memory / bandwidth) * 1e6


def measure(case: Case) -> Report:
    """Compile, emulate under every assumption, and put together."""
    schedule.prepare()
    shape, seconds = case.shape, _compile_seconds(case)
    with schedule.workload(shape.workload(case.device)):
        compiled, recorded = schedule.record(lambda: case.lower().compile())
    figures = []
    for bandwidth in schedule.BANDWIDTHS:
        for latency in schedule.LATENCIES:
            timing = recorded.time(case.chip, latency, bandwidth)
            figures.append(Figure.of(timing, latency, bandwidth, roofs_of(shape, case.chip, bandwidth)))
    first = recorded.time(case.chip, schedule.LATENCIES[0], schedule.BANDWIDTHS[0])
    return Report(
        case.op, case.name, shape.about, case.chip, shape.form(case.device), round(seconds, 1), shape.useful_bytes,
        shape.useful_flops, first.moved_bytes, compiled.memory_analysis().temp_size_in_bytes, figures,
        _kernels(recorded, first), {name: x for name, x in asdict(first.unknown).items() if x},
        {name: version(name) for name in ("jax", "libtpu")}, datetime.date.today().isoformat(),
    )  # fmt: skip
