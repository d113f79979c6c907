# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation: every program a server can need, compiled before the first request, and a watch on any after."""

import atexit
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
from tqdm import tqdm

from tpu_inference.errors import TpuInferenceError
from tpu_inference.logger import init_logger

logger = init_logger(__name__)

SLOW_COMPILE_S = 10.0
COMPILE_THREADS = 4
"""The compiler releases the interpreter's lock; more than a few programs at a time cost memory."""


class RecompilationError(TpuInferenceError):
    """A program was compiled while serving, in strict mode (VLLM_XLA_CHECK_RECOMPILATION=1)."""


@dataclass(frozen=True)
class CompileCase:
    """One program to compile: a jitted function and the abstract arguments of one bucket."""

    name: str
    bucket: Hashable
    fn: Any
    """A `jax.jit` function."""
    args: tuple[Any, ...]

    @property
    def key(self) -> tuple[str, Hashable]:
        return self.name, self.bucket

    def __str__(self) -> str:
        return f"{self.name}[{self.bucket}]"


def bytes_beside_arguments(compiled: Any) -> int:
    """Of a device: a program's temporaries, and what of its results does not take the place of an argument."""
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


@dataclass
class WarmUpReport:
    """What a warm-up did."""

    programs: int = 0
    cached: int = 0
    in_background: int = 0
    """Programs that compile while serving."""
    seconds: float = 0.0
    slowest: list[tuple[float, str]] = field(default_factory=list)


class CompilationManager:
    """Compiles cases, keeps the executables, and accounts for what the persistent cache held."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._programs: dict[tuple[str, Hashable], Any] = {}
        self._serving = False
        self._cache_hits = 0
        self.compiled_while_serving: list[str] = []
        self.late_compiles = 0
        """Programs that steps have waited for."""
        self._watched_thread: int | None = None
        self._background: threading.Thread | None = None
        self._stopping = threading.Event()
        # JAX keeps listeners for ever: weakly bound, they keep no engine's programs and parameters alive.
        on_event, on_duration = weakref.WeakMethod(self._on_event), weakref.WeakMethod(self._on_duration)
        jax.monitoring.register_event_listener(lambda *a, **k: (m := on_event()) and m(*a, **k))
        jax.monitoring.register_event_duration_secs_listener(lambda *a, **k: (m := on_duration()) and m(*a, **k))

    def _on_event(self, event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self._cache_hits += 1

    def _on_duration(self, event: str, _seconds: float, **details: Any) -> None:
        """Any compile during a step, a program's or a stray jnp call's; not those of another engine in this process."""
        if threading.get_ident() == self._watched_thread and event == "/jax/core/compile/backend_compile_duration":
            self.compiled_while_serving.append(str(details.get("fun_name", "a function")))

    def __len__(self) -> int:
        return len(self._programs)

    def warm_up(self, cases: Sequence[CompileCase], *, progress: bool = True) -> WarmUpReport:
        """Compile all `cases`: traced one by one, compiled side by side."""
        report, start, hits = WarmUpReport(), time.monotonic(), self._cache_hits
        todo = [case for case in cases if case.key not in self._programs]
        bar = tqdm(total=len(todo), desc="Compiling", unit="program", disable=not progress)

        def compile_lowered(case: CompileCase, lowered: Any) -> None:
            began = time.monotonic()
            self._programs[case.key] = lowered.compile()
            seconds = time.monotonic() - began
            report.slowest.append((seconds, str(case)))
            if seconds > SLOW_COMPILE_S:
                logger.info("Compiling %s took %.1f s", case, seconds)
            bar.update()

        with bar, ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="compile") as pool:
            # Programs wait for a thread in order of size: the largest are traced, hence compiled, first.
            futures = [pool.submit(compile_lowered, case, case.fn.lower(*case.args)) for case in reversed(todo)]
            for future in futures:
                future.result()
        report.slowest = sorted(report.slowest, reverse=True)[:3]
        report.programs, report.cached = len(todo), self._cache_hits - hits
        report.seconds = time.monotonic() - start
        return report

    def has(self, name: str, bucket: Hashable) -> bool:
        """Whether a program is compiled."""
        return (name, bucket) in self._programs

    def warm_up_in_background(self, cases: Sequence[CompileCase]) -> int:
        """Compile in a thread, in order, those of `cases` that are not compiled yet. Returns how many."""
        todo = [case for case in cases if case.key not in self._programs]
        # A daemon, stopped at exit: the interpreter would otherwise wait for every program, or end it inside the compiler.
        self._background = threading.Thread(target=self._compile_each, args=(todo,), name="compile", daemon=True)
        atexit.register(self.stop)
        self._background.start()
        return len(todo)

    def _compile_each(self, cases: Sequence[CompileCase]) -> None:
        start, hits = time.monotonic(), self._cache_hits
        for case in cases:
            if self._stopping.is_set():
                return
            try:
                self._programs[case.key] = case.fn.lower(*case.args).compile()
            except Exception:
                logger.exception("Compiling %s failed: larger shapes serve in its place", case)
        logger.info(
            "Compiled the other %d programs while serving, %d from the cache, in %.1f s",
            sum(case.key in self._programs for case in cases), self._cache_hits - hits, time.monotonic() - start,
        )  # fmt: skip

    def wait(self) -> None:
        """Until nothing compiles in the background."""
        if self._background is not None:
            self._background.join()

    def stop(self) -> None:
        """Compile no further program in the background; returns when the one at hand is done."""
        self._stopping.set()
        self.wait()
        atexit.unregister(self.stop)

    def start_serving(self) -> None:
        """From here on a compilation is an event to report."""
        self._serving = True

    def get(self, name: str, bucket: Hashable, make_case: Callable[[], CompileCase]) -> Any:
        """The executable of a bucket; compiled now if warm-up was skipped or did not foresee it."""
        program = self._programs.get((name, bucket))
        if program is None:
            program = self._compile_late(make_case())
        return program

    def _compile_late(self, case: CompileCase) -> Any:
        self.late_compiles += 1
        known = sorted(str(bucket) for name, bucket in self._programs if name == case.name)
        if self._serving and known:
            shapes = [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(case.args[-1])]
            message = (
                f"{case} is compiled while serving (last argument {', '.join(shapes)}); compiled are {', '.join(known)}"
            )
            if self._strict:
                raise RecompilationError(message)
            logger.warning("%s. Requests wait for it: report this shape.", message)
        watched, self._watched_thread = self._watched_thread, None
        try:
            self.warm_up([case], progress=False)
        finally:
            self._watched_thread = watched
        return self._programs[case.key]

    @contextmanager
    def watch(self) -> Iterator[None]:
        """A part of a step in which nothing may compile once serving: strict mode raises, else a warning names it."""
        self._watched_thread = threading.get_ident() if self._serving else None
        self.compiled_while_serving = []
        try:
            yield
        finally:
            self._watched_thread = None
        if self.compiled_while_serving:
            names, self.compiled_while_serving = self.compiled_while_serving, []
            self.late_compiles += len(names)
            message = f"compiled while serving: {', '.join(names)}"
            if self._strict:
                raise RecompilationError(message)
            logger.warning("%s. Requests waited for it.", message)
