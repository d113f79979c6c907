# SPDX-License-Identifier: Apache-2.0
"""The programs that are compiled to answer, each by a process of its own, and what is read from each."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from tpu_inference.errors import TpuInferenceError
from tpu_inference.plan.engine import Engine, build_engine
from tpu_inference.plan.experts import expert_scalars
from tpu_inference.plan.memory import GUESSED_SHARE, Compiled, Pool, guessed_pool
from tpu_inference.plan.slices import TpuSlice
from tpu_inference.plan.steps import FAST, SLOW, Load, StepCost, StepTimer, Timer, with_scalars
from tpu_inference.runner.buckets import Bucket
from tpu_inference.runner.compilation_manager import CompileCase, bytes_beside_arguments
from tpu_inference.tools import schedule

SMALLER_SHARE = 0.5


@dataclass(frozen=True)
class SamplerCost:
    """Microseconds of a sampler's program at the fast and the slow assumptions; with `floor`, only what its bytes take."""

    name: str
    fast: float
    slow: float
    floor: bool


@dataclass(frozen=True)
class Done:
    """What a job found."""

    compiled: tuple[Compiled, ...] = ()
    steps: tuple[StepCost, ...] = ()
    samplers: tuple[SamplerCost, ...] = ()
    untimed: str = ""
    """Why there are no steps though times were wanted."""


@dataclass(frozen=True)
class Compiler:
    """Compiles cases for one slice, with their schedules where times are wanted."""

    where: TpuSlice
    times: bool

    def compile(self, case: CompileCase) -> "Program":
        """Compile one program."""
        start, made = time.monotonic(), []

        def make() -> Any:
            made.append(case.fn.lower(*case.args).compile())
            return made[0]

        recorded, why_not = None, ""
        try:
            _, recorded = schedule.record(make) if self.times else (make(), None)
        except (jax.errors.JaxRuntimeError, schedule.ScheduleError) as error:
            if not made:
                raise
            # jaxlib cannot read every program that libtpu makes.
            why_not = _first_line(error)
        sizes = Compiled(str(case), time.monotonic() - start, bytes_beside_arguments(made[0]))
        return Program(sizes, made[0], recorded, why_not)


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled case."""

    sizes: Compiled
    executable: Any
    recorded: Any
    """Its schedules; None where no times are wanted or there are none."""
    why_not: str


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _prepare(times: bool) -> None:
    """Before libtpu is loaded."""
    if times:
        schedule.prepare()


def _pool(engine: Engine, share: float = GUESSED_SHARE) -> Pool:
    pool = guessed_pool(engine, share)
    assert pool is not None, "the caller has seen that one request fits"
    return pool


def compile_forward(engine: Engine, compiler: Compiler, bucket: Bucket) -> tuple[Pool, Program]:
    """With a smaller cache where the program's temporaries do not fit beside the guessed one."""
    for share in (GUESSED_SHARE, SMALLER_SHARE):
        pool = _pool(engine, share)
        try:
            return pool, compiler.compile(pool.programs.forward_case(bucket))
        except jax.errors.JaxRuntimeError as error:
            reason = _first_line(error)
            if "RESOURCE_EXHAUSTED" not in reason:
                break
    raise TpuInferenceError(f"The compiler refuses the forward program of {bucket}: {reason}.")


def step_job(config: Any, where: TpuSlice, bucket: Bucket, loads: Sequence[Load], times: bool) -> Done:
    """Compile the forward program of a bucket, and time it with each of `loads`."""
    _prepare(times)
    engine = build_engine(config, where)
    pool, program = compile_forward(engine, Compiler(where, times), bucket)
    if program.recorded is None:
        return Done((program.sizes,), untimed=program.why_not)
    windows = Counter(layer.sliding_window for layer in engine.runner.functions.layers)
    shape = (bucket.rows, engine.runner.max_blocks, engine.runner.block_size, pool.num_blocks)
    model = engine.config.model_config
    experts = expert_scalars(
        program.recorded.module, bucket.tokens, model.get_num_experts_per_tok(), model.get_num_experts()
    )
    recorded = with_scalars(program.recorded, experts)
    fast, slow = (Timer(recorded, where.chip.name, assumed) for assumed in (FAST, SLOW))
    timer = StepTimer(fast, slow, engine.tensor_parallel, where.link_bytes_per_s, str(bucket), windows, shape)
    try:
        return Done((program.sizes,), tuple(timer.cost(load) for load in loads))
    except schedule.ScheduleError as error:
        return Done((program.sizes,), untimed=_first_line(error))


def _sampler_cost(where: TpuSlice, program: Program) -> SamplerCost:
    """Its schedule's time; that of the bytes XLA counts where there is none, or it cannot be followed."""
    generation, name = where.chip.name, program.sizes.name
    try:
        if program.recorded is None:
            raise schedule.ScheduleError("not recorded")
        fast, slow = (program.recorded.time(generation, *assumed) for assumed in (FAST, SLOW))
        return SamplerCost(name, fast.microseconds, slow.microseconds, bool(fast.unknown))
    except schedule.ScheduleError:
        moved = program.executable.cost_analysis().get("bytes accessed", 0.0)
        per_us = where.chip.hbm_bytes_per_s / where.chip.devices / 1e6
        return SamplerCost(name, moved / per_us / FAST[1], moved / per_us / SLOW[1], True)


def sampler_job(config: Any, where: TpuSlice, kind: str, row_counts: Sequence[int], times: bool) -> Done:
    """Compile "greedy" or "sample" at every row count."""
    _prepare(times)
    engine = build_engine(config, where)
    programs, compiler = _pool(engine).programs, Compiler(where, times)
    make = {"greedy": programs.greedy_case, "sample": programs.sample_case}[kind]
    made = [compiler.compile(make(rows)) for rows in row_counts]
    return Done(
        tuple(program.sizes for program in made), samplers=tuple(_sampler_cost(where, program) for program in made)
    )
