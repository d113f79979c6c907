# SPDX-License-Identifier: Apache-2.0
"""One slice's answer: which programs are compiled for it, and what they come to."""

from dataclasses import dataclass, replace
from typing import Any

from tpu_inference.plan.arguments import Question
from tpu_inference.plan.children import run_all
from tpu_inference.plan.engine import Engine, build_engine, server_config
from tpu_inference.plan.jobs import Done, SamplerCost, sampler_job, step_job
from tpu_inference.plan.memory import Compiled, MemoryPlan, guessed_pool, plan_memory
from tpu_inference.plan.model import ModelInfo, check_tensor_parallel
from tpu_inference.plan.slices import TpuSlice
from tpu_inference.plan.steps import Load, StepCost
from tpu_inference.runner.buckets import Bucket
from tpu_inference.runner.startup_report import format_bytes
from tpu_inference.tools.schedule import TOPOLOGIES as TIMED

PROMPT_TOKENS = 256
"""Of the prompt's chunk that is timed by default: the TPU compiler takes longest over the largest programs' schedules."""
EXPERTS_AT_RANDOM = "Tokens are taken to choose experts at random, and all layers' tokens the same; experts are those of the first device."


@dataclass(frozen=True)
class Settings:
    """What a server would run with."""

    tensor_parallel: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str
    block_size: int
    gpu_memory_utilization: float

    @classmethod
    def of(cls, config: Any) -> "Settings":
        """From vLLM's configuration."""
        return cls(
            config.parallel_config.tensor_parallel_size,
            config.model_config.max_model_len,
            config.scheduler_config.max_num_seqs,
            config.scheduler_config.max_num_batched_tokens,
            str(config.model_config.dtype).removeprefix("torch."),
            config.cache_config.block_size,
            config.cache_config.gpu_memory_utilization,
        )


@dataclass(frozen=True)
class StepEstimate:
    """A step with its sampler, in microseconds, and what that makes a second."""

    cost: StepCost
    sampling: float
    sampling_is_floor: bool
    fast: float
    """ICI wholly behind the other operations."""
    slow: float
    """ICI after them."""

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """(least, most): tokens that the step's requests take, sampled ones where all decode."""
        tokens = self.cost.load.tokens
        return tokens / self.slow * 1e6, tokens / self.fast * 1e6


@dataclass(frozen=True)
class Answer:
    """All about one slice."""

    model: str
    slice: TpuSlice
    settings: Settings
    memory: MemoryPlan
    compiled: tuple[Compiled, ...] = ()
    steps: tuple[StepEstimate, ...] = ()
    samplers: tuple[SamplerCost, ...] = ()

    @property
    def sampling(self) -> int:
        """Bytes of a device that the samplers need; the budget does not count them, since no forward runs meanwhile."""
        return max((program.needs for program in self.compiled if "sample" in program.name), default=0)

    @property
    def best_decode(self) -> StepEstimate | None:
        """That with the most tokens a second, by its low end."""
        decodes = (step for step in self.steps if step.cost.load.name == "decode")
        return max(decodes, key=lambda step: step.tokens_per_s[0], default=None)


def _held(engine: Engine, context: int, rows: int, num_blocks: int) -> bool:
    return rows * -(-context // engine.runner.block_size) < num_blocks


def _fits(load: Load, memory: MemoryPlan) -> bool:
    """Whether the cache, whose size was guessed when loads were chosen, does hold it."""
    return memory.fits and load.rows * -(-load.context // memory.block_size) < memory.num_blocks


def _decode_loads(engine: Engine, question: Question, num_blocks: int, rows: int) -> list[Load]:
    """Decoding `rows` requests at each context that the cache holds so many of; else at the greatest that it does."""
    longest, size = engine.config.model_config.max_model_len, engine.runner.block_size
    contexts = sorted({min(n, longest) for n in (*question.contexts, longest)})
    kept = [context for context in contexts if _held(engine, context, rows, num_blocks)]
    if not kept and (most := (num_blocks - 1) // rows * size):
        kept = [most]
    return [Load("decode", rows, 0, context) for context in kept]


def _prompt_loads(engine: Engine, tokens: int) -> list[Load]:
    """A prompt's first chunk of `tokens`, its last, and a step that a chunk shares with decoding requests."""
    longest, rows = engine.config.model_config.max_model_len, engine.runner.plan.max_rows
    chunk = min(tokens, longest)
    loads = [Load("prefill", 0, chunk, context) for context in sorted({chunk, longest})]
    if chunk > rows > 1:
        loads.append(Load("mixed", rows - 1, chunk - rows + 1, chunk))
    return loads


def _work(engine: Engine, question: Question, num_blocks: int) -> tuple[list[tuple], list[int]]:
    """(bucket and loads of each forward program, the largest first; row counts of the samplers)."""
    plan, largest = engine.runner.plan, engine.runner.plan.buckets[-1]
    work: dict[Bucket, list[Load]] = {largest: []}
    if question.times:
        tokens = largest.tokens if question.full_prefill else min(PROMPT_TOKENS, largest.tokens)
        loads = _prompt_loads(engine, tokens)
        held = [load for load in loads if _held(engine, load.context, load.rows, num_blocks)]
        work.setdefault(plan.pick(tokens, plan.max_rows if tokens >= plan.max_rows else tokens), []).extend(held)
        for rows in sorted({min(n, plan.max_rows) for n in (*question.batches, plan.max_rows)}, reverse=True):
            loads = _decode_loads(engine, question, num_blocks, rows)
            work.setdefault(plan.pick(rows, rows), []).extend(loads)
    row_counts = {bucket.rows for bucket, loads in work.items() if loads} | {plan.max_rows}
    return list(work.items()), sorted(row_counts)


def _look(config: Any, question: Question, where: TpuSlice) -> tuple[MemoryPlan | None, list, list[int]]:
    """Whether weights and a request fit at all (else the plan that says so), and the work that is to be done then."""
    engine = build_engine(config, where)
    pool = guessed_pool(engine)
    if pool is None:
        return plan_memory(engine, 0, question.contexts), [], []
    return None, *_work(engine, question, pool.num_blocks)


def _memory(config: Any, question: Question, where: TpuSlice, temporaries: int) -> MemoryPlan:
    return plan_memory(build_engine(config, where), temporaries, question.contexts)


def _with_room_to_sample(answer: Answer) -> Answer:
    """The same, unless a sampled batch would find no memory beside weights and cache: no budget counts it."""
    memory = answer.memory
    # Logits of this step, and of the next, which vLLM has already handed over.
    missing = answer.sampling + 2 * memory.logits - memory.free - memory.device.temporaries
    if not memory.fits or missing <= 0:
        return answer
    why = (
        f"Sampling {answer.settings.max_num_seqs} rows needs {format_bytes(missing)} more than gpu_memory_utilization leaves on each device: "
        f"lower it, or --max-num-seqs.\n{memory.device.table()}"
    )
    return replace(answer, memory=replace(memory, why_not=why))


def _estimate(step: StepCost, samplers: dict[int, SamplerCost]) -> StepEstimate:
    rows = int(step.bucket.partition("x")[2])
    sampler = samplers[rows]
    fast, slow = max(step.fast, step.ici.fast) + sampler.fast, step.slow + step.ici.slow + sampler.slow
    return StepEstimate(step, sampler.fast, sampler.floor, fast, slow)


def _programs_compiled(config: Any, question: Question, where: TpuSlice, work: list, rows: list[int]) -> list[Done]:
    """The largest forward program first."""
    jobs: list[tuple] = [(step_job, config, where, bucket, loads, bool(loads)) for bucket, loads in work]
    # Its searches for top-k and top-p end by their values: a schedule would not tell more than its bytes do.
    jobs.append((sampler_job, config, where, "sample", rows[-1:], False))
    # The shortest job last: it fills the other core's wait.
    jobs.append((sampler_job, config, where, "greedy", rows, question.times))
    return run_all(jobs)


def _about_times(config: Any, done: list[Done]) -> list[str]:
    """A note for every reason why a forward program has no times, and one of what those of experts rest on."""
    reasons: dict[str, list[str]] = {}
    for job in done:
        if job.untimed:
            reasons.setdefault(job.untimed, []).append(job.compiled[0].name)
    notes = [f"No times of {', '.join(names)}, whose schedule cannot be read: {why}." for why, names in reasons.items()]
    if config.model_config.get_num_experts() and any(job.steps for job in done):
        notes.append(EXPERTS_AT_RANDOM)
    return notes


def answer(question: Question, model: ModelInfo, where: TpuSlice) -> Answer:
    """Plan one slice.

    Raises:
        TpuInferenceError: what a server would refuse.
    """
    tensor_parallel = check_tensor_parallel(model, question.tensor_parallel, where.num_devices, str(where))
    config = server_config(question, where, tensor_parallel)
    settings = Settings.of(config)
    if untimed := question.times and where.chip.name not in TIMED:
        question = replace(question, times=False)
    ((hopeless, work, rows),) = run_all([(_look, config, question, where)])
    if hopeless:
        return Answer(model.name, where, settings, hopeless)
    done = _programs_compiled(config, question, where, work, rows)
    compiled = tuple(program for job in done for program in job.compiled)
    (memory,) = run_all([(_memory, config, question, where, compiled[0].needs)])
    if untimed:
        memory = replace(memory, notes=(*memory.notes, f"No step times: they are known for {', '.join(TIMED)} only."))
    memory = replace(memory, notes=(*memory.notes, *_about_times(config, done)))
    samplers = tuple(cost for job in done for cost in job.samplers) if question.times else ()
    greedy = {int(cost.name.split("[")[1][:-1]): cost for cost in samplers if "greedy" in cost.name}
    steps = tuple(_estimate(step, greedy) for job in done for step in job.steps if _fits(step.load, memory))
    found = Answer(model.name, where, settings, memory, compiled, steps, samplers)
    return _with_room_to_sample(found)
