# SPDX-License-Identifier: Apache-2.0
"""The model runner: what vLLM scheduled becomes one step on the device. Orchestration only."""

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import jax
import numpy as np
from jax.sharding import Mesh
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from tpu_inference import envs
from tpu_inference.compat.sampling import counts_nans
from tpu_inference.config import TpuConfig
from tpu_inference.errors import TpuInferenceError
from tpu_inference.kernels import mla
from tpu_inference.kernels.ragged_paged_attention import implementation_for, misfit
from tpu_inference.layers.common.attention import KVCache, KVCacheLayout
from tpu_inference.layers.common.sharding import shard_bytes
from tpu_inference.logger import init_logger
from tpu_inference.models.common.interface import ModelFunctions
from tpu_inference.models.common.kv_cache_dtype import cache_torch_dtype
from tpu_inference.models.common.vllm_loader import load_model
from tpu_inference.runner.async_output import AsyncOutput
from tpu_inference.runner.buckets import Bucket, BucketPlan
from tpu_inference.runner.compilation_manager import CompilationManager, WarmUpReport, bytes_beside_arguments
from tpu_inference.runner.input_batch import InputBatch
from tpu_inference.runner.kv_cache_manager import (
    abstract_kv_cache,
    allocate_kv_cache,
    kv_cache_specs,
    layout_from_config,
    uniform_layout,
)
from tpu_inference.runner.logits_processors import HostProcessors
from tpu_inference.runner.metrics import StepMetrics
from tpu_inference.runner.programs import StepPrograms
from tpu_inference.runner.prompt_logprobs import PromptLogprobs
from tpu_inference.runner.requests import RequestStates
from tpu_inference.runner.residence import Residence, abstract
from tpu_inference.runner.sampler import PendingStep, Sampler

logger = init_logger(__name__)


class TPUModelRunner:
    """Owns the parameters, the KV cache, the requests' state and the programs."""

    def __init__(self, vllm_config: VllmConfig, mesh: Mesh, *, on_tpu: bool) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.mesh = mesh
        scheduler, tpu_config = vllm_config.scheduler_config, TpuConfig.from_vllm(vllm_config)
        self.plan = BucketPlan.build(
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
            on_tpu=on_tpu,
            token_sizes=tpu_config.token_buckets,
        )
        self.compilation = CompilationManager(strict=envs.VLLM_XLA_CHECK_RECOMPILATION)
        # A second phase of compiling would leave hosts of one program at different shapes, and TPU hosts have the cores to do it at once.
        background = tpu_config.background_compile
        self._in_background = not on_tpu if background is None else background
        self._is_ready: Callable[[Bucket], bool] = lambda _: True
        # Not `model`: vLLM takes an attribute of that name for a torch module.
        self.functions: ModelFunctions
        self.kv_cache: KVCache | None
        self.residence = Residence(self)
        self.metrics = StepMetrics(self.model_config.served_model_name, vllm_config.parallel_config.data_parallel_index)
        self.metrics.weights_version(self.residence.version)
        self._host_seconds = 0.0
        self._pending: PendingStep | None = None
        self.host_processors = HostProcessors(vllm_config)

    def load_model(self, *, dummy: bool = False) -> None:
        """Parameters onto the devices."""
        self.functions = load_model(self.vllm_config, self.mesh, dummy=dummy)

    @property
    def block_size(self) -> int:
        return self.vllm_config.cache_config.block_size

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest request; one more for the step that async scheduling runs past its end."""
        return -(-self.model_config.max_model_len // self.block_size) + 1

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return kv_cache_specs(self.functions, self.block_size, cache_torch_dtype(self.vllm_config))

    def make_programs(self, layout: KVCacheLayout, num_groups: int) -> StepPrograms:
        """The programs over a KV cache of this layout, none of them compiled yet."""
        return StepPrograms(
            replace(self.functions, params=abstract(self.functions.params)),
            self.plan,
            self.mesh,
            self.compilation,
            kv_cache=abstract_kv_cache(self.functions, layout, self.block_size, self.functions.kv_dtype, self.mesh),
            num_groups=num_groups,
            max_blocks=self.max_blocks,
            num_slots=self.vllm_config.scheduler_config.max_num_seqs,
            max_logprobs=self.model_config.max_logprobs,
            hidden=self.functions.hidden,
            logprobs_mode=self.model_config.logprobs_mode,
            host_processors=bool(self.host_processors),
            counts_nans=counts_nans(),
        )

    def programs_for_budget(self) -> StepPrograms:
        """Programs over a small cache: what they need beside it does not depend on its size."""
        return self.make_programs(uniform_layout(self.functions, num_blocks=self.max_blocks), 1)

    def temporary_bytes(self) -> int:
        """Bytes per device besides parameters and cache: what the largest forward program needs, as compiled, and the sampler's tables."""
        programs = self.programs_for_budget()
        case = programs.forward_case(self.plan.buckets[-1])
        return bytes_beside_arguments(case.fn.lower(*case.args).compile()) + programs.tables_bytes

    def initialize_kv_cache(self, config: KVCacheConfig) -> int:
        """Allocate what vLLM decided; returns its bytes over all devices."""
        layout = layout_from_config(
            config, [layer.name for layer in self.functions.layers], flat=self.functions.flat_kv
        )
        num_groups = len(config.kv_cache_groups)
        self._say_if_attention_is_slow(layout)
        self.programs = self.make_programs(layout, num_groups)
        self.kv_cache = allocate_kv_cache(
            abstract_kv_cache(self.functions, layout, self.block_size, self.functions.kv_dtype, self.mesh)
        )
        self.prompt_logprobs = PromptLogprobs(self.programs)
        self.states = RequestStates(
            max_num_seqs=self.vllm_config.scheduler_config.max_num_seqs,
            max_model_len=self.model_config.max_model_len,
            vocab_size=self.functions.vocab_size,
            num_groups=num_groups,
            max_blocks=self.max_blocks,
            seed=self.model_config.seed,
            follow_all=bool(self.host_processors),
        )
        self.sampler = Sampler(self.programs, self.states, self.vllm_config, self.host_processors)
        return sum(map(shard_bytes, self.kv_cache.pages)) * self.mesh.size

    def why_attention_is_slow(self, layout: KVCacheLayout) -> str | None:
        """What keeps the TPU kernels from serving this chip or these shapes, so that attention runs in its XLA form; None where nothing does."""
        device = self.mesh.devices.flat[0]
        if implementation_for(device) != "pallas":
            on_tpu = device.platform == "tpu"
            return f"they are for v4 and later, and this is a {device.device_kind}" if on_tpu else None
        cache = abstract_kv_cache(self.functions, layout, self.block_size, self.functions.kv_dtype, self.mesh)
        shard = cache.pages[0].sharding.shard_shape(cache.pages[0].shape)
        pages = jax.ShapeDtypeStruct(shard, cache.pages[0].dtype)
        tables = jax.ShapeDtypeStruct((self.plan.max_rows, self.max_blocks), np.int32)
        latent = self.functions.layers[0].latent
        reason = misfit(pages, tables) if latent is None else mla.misfit(pages, tables, latent)
        return reason and f"{reason}; try --block-size 128, a shorter --max-model-len or a lower --max-num-seqs"

    def _say_if_attention_is_slow(self, layout: KVCacheLayout) -> None:
        if reason := self.why_attention_is_slow(layout):
            logger.warning("Attention runs in its XLA form, much slower than the TPU kernels: %s.", reason)

    def warm_up(self) -> WarmUpReport:
        """Compile every program, some of them while serving where that is chosen; none when told to compile on first use."""
        if envs.SKIP_JAX_PRECOMPILE or self.model_config.enforce_eager:
            return WarmUpReport()
        programs = self.programs
        report = self.compilation.warm_up(programs.first_cases() if self._in_background else programs.cases())
        self.compilation.start_serving()
        if self._in_background:
            self._is_ready = programs.is_ready
            report.in_background = self.compilation.warm_up_in_background(programs.cases())
        return report

    @property
    def last_tokens(self) -> jax.Array:
        """int32 [slots]: the last sampled token of each, on the device."""
        return self.sampler.last_tokens

    def shutdown(self) -> None:
        """Stop what runs beside the steps."""
        self.compilation.stop()

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run the step up to the logits; `sample_tokens` takes them on. A step without tokens ends here."""
        start = perf_counter()
        if self._pending is not None:
            raise TpuInferenceError("execute_model was called twice without sample_tokens in between")
        states = self.states
        states.apply(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        if self.functions.params is None or self.kv_cache is None:
            raise TpuInferenceError(self.residence.why_absent())
        with self.compilation.watch():
            self.sampler.follow()
            self._pending = self._forward(InputBatch.build(states, scheduler_output.num_scheduled_tokens))
        self._host_seconds = perf_counter() - start
        return None

    def _forward(self, batch: InputBatch) -> PendingStep:
        states = self.states
        bucket = self.plan.pick(batch.total_tokens, batch.num_rows, self._is_ready)
        buffer = batch.pack(states, bucket, self.programs.sizes(bucket))
        params = self.functions.params
        hidden, logits, sample_slots, self.kv_cache = self.programs.forward(
            bucket, params, self.kv_cache, self.sampler.last_tokens, buffer
        )
        prompt_logprobs = self.prompt_logprobs.collect(states, batch, params, hidden)
        return PendingStep(batch, bucket, logits, sample_slots, prompt_logprobs)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> AsyncOutput:
        """Sample from the pending step's logits; the result is on its way to the host when this returns."""
        start = perf_counter()
        step, self._pending = self._pending, None
        if step is None:
            raise TpuInferenceError("sample_tokens was called without a step to sample from")
        with self.compilation.watch():
            output = self.sampler(step, grammar_output)
        tokens, host_seconds = step.batch.total_tokens, self._host_seconds + perf_counter() - start
        self.metrics.step(step.bucket, tokens, step.bucket.tokens - tokens, host_seconds)
        self.metrics.recompiles(self.compilation.late_compiles)
        return output
