# SPDX-License-Identifier: Apache-2.0
"""Records the schedules of a compile, and times them."""

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tpu_inference.tools.schedule.bundles import Program
from tpu_inference.tools.schedule.chips import Machine
from tpu_inference.tools.schedule.emulator import Emulator, Execution
from tpu_inference.tools.schedule.environment import HLO, ScheduleError, prepare
from tpu_inference.tools.schedule.hlo import ASYNC_COPIES, Module, Operation
from tpu_inference.tools.schedule.slots import Loop, SlotTable, loops_of
from tpu_inference.tools.schedule.timing import AsyncCopy, OpTiming, Timing, Unknown
from tpu_inference.tools.schedule.workload import Scalars, active

_FILE = re.compile(r"^\d+-(?P<operation>.+?)-\d+-(?P<what>final_bundles|final_hlo-static-per-bundle-utilization)\.txt$")
_NOT_OPERATIONS = ("TLP", "<late-")
"""The program around the operations, and what is linked to it."""
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Schedule:
    """Of one operation: libtpu's texts, and the values of its scalar arguments where a workload gave them."""

    bundles: str
    slots: str
    scalars: Scalars | None = None

    @cached_property
    def program(self) -> Program:
        return Program.parse(self.bundles)


@dataclass(frozen=True)
class Recorded:
    """The schedules of a compiled program."""

    module: Module
    schedules: dict[str, Schedule]
    """By operation."""
    _runs: dict[tuple, Execution] = field(default_factory=dict, init=False, repr=False)

    def execute(self, name: str, machine: Machine) -> Execution:
        """One run of an operation."""
        key = (name, machine.chip.name, machine.latency, machine.bytes_per_second)
        if key not in self._runs:
            schedule = self.schedules[name]
            self._runs[key] = Emulator(schedule.program, machine, schedule.scalars).run()
        return self._runs[key]

    def loops(self, name: str, machine: Machine) -> list[Loop]:
        """Of an operation, the one with most cycles first."""
        schedule = self.schedules[name]
        return loops_of(schedule.program, SlotTable.parse(schedule.slots), self.execute(name, machine))

    @cached_property
    def _twins(self) -> dict[str, str]:
        """Operation -> one with the same code that has a schedule: libtpu writes identical ones only once."""
        having = {self.module.signature(self.module.operations[x]): x for x in self.schedules}
        return {x.name: having[s] for x in self.module.top_level() if (s := self.module.signature(x)) in having}

    def _emulated(self) -> Iterator[tuple[Operation, str]]:
        """(operation, the one whose schedule it has)."""
        between_devices = {x.name for x in self.module.collectives}
        for operation in self.module.top_level():
            source = operation.name if operation.name in self.schedules else self._twins.get(operation.name)
            if source and operation.name not in between_devices:
                yield operation, source

    def time(self, generation: str, latency: int = 300, bandwidth: float = 1.0) -> Timing:
        """Emulate every operation.

        Args:
            generation: A name of `tpu_info.CHIPS`, the one that the program was compiled for.
            latency: Cycles of an HBM DMA.
            bandwidth: Fraction of the published HBM bandwidth.
        """
        machine = Machine.of(generation, latency, bandwidth)
        ops = []
        for operation, source in self._emulated():
            run = self.execute(source, machine)
            ops.append(OpTiming.of(operation, self.module.trips(operation), run, machine))
        copies = tuple(
            AsyncCopy(x.name, self.module.trips(x), self.module.result_bytes(x))
            for x in self.module.top_level()
            if x.opcode in ASYNC_COPIES
        )
        timed = {x.name for x in ops}
        timed.update(x.name for x in self.module.collectives)
        missing = tuple(x.name for x in self.module.top_level() if x.has_code and x.name not in timed)
        unknown = Unknown.of(ops, tuple(self.module.unknown_loops), missing)
        return Timing(tuple(ops), copies, self.module.collectives, unknown, machine)


@contextmanager
def no_compile_cache() -> Iterator[None]:
    """A program that comes from the persistent cache is not compiled, and leaves no schedule."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _collect(directory: Path) -> dict[str, dict[str, str]]:
    """Operation -> what -> text, from libtpu's files, which are removed."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        match = _FILE.match(path.name)
        if match and not match["operation"].startswith(_NOT_OPERATIONS):
            found.setdefault(match["operation"], {})[match["what"]] = path.read_text(errors="replace")
        path.unlink()
    return {name: texts for name, texts in found.items() if "final_bundles" in texts}


def _hlo_of(compiled: Any, directory: Path) -> str:
    """The optimized program: jaxlib's text of it, or XLA's own where jaxlib cannot read what libtpu made (0.10.2: asynchronous calls on tpu7x)."""
    import jax

    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        dumped = sorted(directory.glob("*.after_codegen.txt"), key=lambda path: path.stat().st_mtime)
        if not dumped:  # XLA read its flags before `prepare`
            raise
        return dumped[-1].read_text(encoding="utf-8")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _operation_of(dumped: str, module: Module) -> str | None:
    """The operation that a file's name means: some carry what it refers to."""
    names = (dumped, dumped.split(".refs_")[0].split(".group_")[0])
    return next((name for name in names if name in module.operations), None)


def record(compile_it: Callable[[], Any]) -> tuple[Any, Recorded]:
    """Compile one program, and keep its schedules.

    Args:
        compile_it: Compiles one program for a TPU topology, that this process has not compiled before, and returns it:
            `lambda: jitted.lower(*arguments).compile()`.

    Returns:
        (the compiled program, its schedules with the values of the `workload` around this call).

    Raises:
        ScheduleError: nothing was compiled for a TPU.
    """
    directory = prepare()
    with _LOCK, no_compile_cache():
        _collect(directory)
        compiled = compile_it()
        texts = _collect(directory)
    if not texts:
        raise ScheduleError(
            "libtpu wrote no schedule: the program is not for a TPU topology, or this process has compiled the same one before."
        )
    module, values, schedules = Module.parse(_hlo_of(compiled, directory / HLO)), active(), {}
    for dumped, found in texts.items():
        if name := _operation_of(dumped, module):
            slots = found.get("final_hlo-static-per-bundle-utilization", "")
            schedules[name] = Schedule(found["final_bundles"], slots, values.scalars_of(name))
    return compiled, Recorded(module, schedules)
