# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker: device, memory, KV cache, warm-up, and steps handed to the runner."""

# First: process defaults that must precede JAX.
import tpu_inference.env_override  # noqa: F401  isort: skip

import time
from typing import Any

import jax
import psutil
import torch
from vllm.config import VllmConfig
from vllm.config.profiler import validate_profile_prefix
from vllm.tasks import SupportedTask
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

from tpu_inference import envs
from tpu_inference.compat.lowering import quiet_torch_accelerator
from tpu_inference.compat.processes import keep_torch_to_one_thread_if_forked, skip_the_last_collection
from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.sharding import make_mesh
from tpu_inference.logger import init_logger
from tpu_inference.runner.compile_cache import enable_compile_cache
from tpu_inference.runner.startup_report import Phase, StartupReport
from tpu_inference.runner.tpu_runner import TPUModelRunner
from tpu_inference.tpu_info import detect
from tpu_inference.worker.health import DeviceProbe, Watchdog
from tpu_inference.worker.memory import kv_cache_budget
from tpu_inference.worker.profiler import Profiler

logger = init_logger(__name__)

KV_CACHE_LAYOUT = "LBNHC"
"""vLLM's name for layer-outermost pages; the order inside a page is ours."""

NO_LORA = "LoRA adapters are not served by tpu_inference: merge the adapter into the checkpoint and load that."


def _bytes_of(tree: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


class TPUWorker(WorkerBase):
    """One process drives all devices of the mesh."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
        **_: Any,
    ) -> None:
        """The executor's extra arguments concern several workers a machine, which there are not."""
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)
        self.report = StartupReport()
        self.report.phases.append(Phase("imports and engine", time.time() - psutil.Process().create_time()))
        self.model_runner: TPUModelRunner
        self.watchdog: Watchdog | None = None

    # Start-up, in the order that vLLM calls.

    def init_device(self) -> None:
        quiet_torch_accelerator()
        keep_torch_to_one_thread_if_forked()
        skip_the_last_collection()
        parallel = self.parallel_config.tensor_parallel_size
        with self.report.phase("device") as phase:
            detection = detect()
            jax.config.update("jax_platforms", "tpu,cpu" if detection.platform == "tpu" else "cpu")
            if detection.platform == "cpu" and parallel > 1:
                _make_virtual_devices(parallel)
            self.cache_dir = enable_compile_cache(envs.VLLM_XLA_CACHE_PATH)
            devices = jax.devices(detection.platform)
            self.mesh = make_mesh(devices, parallel)
            self.devices = list(self.mesh.devices.flat)
            phase.note = f"{len(self.devices)} x {self.devices[0].device_kind}"
        self.model_runner = TPUModelRunner(self.vllm_config, self.mesh, on_tpu=detection.platform == "tpu")
        self.probe = DeviceProbe(self.devices)
        self.profiler = Profiler(self.vllm_config.profiler_config, self.synchronize_device)

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        with self.report.phase("weights") as phase:
            self.model_runner.load_model(dummy=load_dummy_weights)
            phase.num_bytes = _bytes_of(self.model_runner.functions.params)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return self.model_runner.get_kv_cache_spec()

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return [KV_CACHE_LAYOUT]

    def determine_available_memory(self) -> int:
        with self.report.phase("memory budget") as phase:
            on_cpu = self.devices[0].platform == "cpu"
            measured = not (on_cpu or self.cache_config.kv_cache_memory_bytes)
            temporaries = self.model_runner.temporary_bytes() if measured else 0
            weights = _bytes_of(self.model_runner.functions.params)
            phase.num_bytes = kv_cache_budget(self.cache_config, self.devices, weights, temporaries)
            phase.note = "allowed for the KV cache"
        return phase.num_bytes

    def update_max_model_len(self, max_model_len: int) -> None:
        """vLLM chose the longest context that fits (max_model_len=auto)."""
        self.model_config.max_model_len = max_model_len

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        self.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
        with self.report.phase("KV cache") as phase:
            phase.num_bytes = self.model_runner.initialize_kv_cache(kv_cache_config)
            phase.note = f"{kv_cache_config.num_blocks} blocks of {self.cache_config.block_size} tokens"

    def compile_or_warm_up_model(self) -> CompilationTimes:
        with self.report.phase("warm-up") as phase:
            done = self.model_runner.warm_up()
            phase.note = f"{done.programs} programs, {done.cached} from the cache" if done.programs else "skipped"
            if done.in_background:
                phase.note += f"; {done.in_background} more while serving"
        if Watchdog.is_wanted(interval := envs.TPU_HEALTH_TIMEOUT):
            self.watchdog = Watchdog(self.probe, interval)
            self.watchdog.start()
        slow = ", ".join(f"{name} {seconds:.1f} s" for seconds, name in done.slowest)
        logger.info("Start-up:\n%s%s", self.report.render(), f"\nslowest to compile: {slow}" if slow else "")
        return CompilationTimes(language_model=done.seconds, encoder=0.0)

    def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    # Steps.

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        return self.model_runner.execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        output = self.model_runner.sample_tokens(grammar_output)
        if self.profiler.active:
            self.profiler.step_done()
        return output

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        return None

    def execute_dummy_batch(self) -> None:
        """Only data parallel ranks that idle need one, and that is refused at config time."""

    # Service.

    def synchronize_device(self) -> None:
        jax.block_until_ready(self.model_runner.last_tokens)

    def get_model(self) -> torch.nn.Module:
        """vLLM walks the modules of what it gets here when an engine goes: there are none, the weights are JAX's."""
        return torch.nn.Module()

    def check_health(self) -> None:
        """Raises TpuInferenceError where a device does not answer in TPU_HEALTH_TIMEOUT seconds (60 where that is 0)."""
        self.probe.ask(envs.TPU_HEALTH_TIMEOUT or 60)

    def profile(
        self,
        is_start: bool = True,
        profile_prefix: str | None = None,
        *,
        delay_iterations: int | None = None,
        max_iterations: int | None = None,
    ) -> None:
        """A JAX profiler trace (for TensorBoard or XProf) in the directory that vLLM's profiler config names."""
        if is_start:
            self.profiler.start(validate_profile_prefix(profile_prefix), delay_iterations, max_iterations)
        else:
            self.profiler.stop()

    def sleep(self, level: int = 1) -> None:
        self.model_runner.residence.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.model_runner.residence.wake_up(tags)

    def discard(self, tags: tuple[str, ...]) -> None:
        self.model_runner.residence.discard(tags)

    def reload_weights(self, weights_path: str | None = None) -> dict[str, Any]:
        """Replace the weights in place by those of another checkpoint of the model; see `Residence.reload`."""
        return self.model_runner.residence.reload(weights_path)

    def weights_info(self) -> dict[str, Any]:
        """{"version": whole number from 1, "source": checkpoint}"""
        return self.model_runner.residence.info()

    def compute_weight_checksums(self) -> dict[str, str]:
        """Name of each parameter -> SHA-256, which vLLM's `/weight_checker` compares."""
        return self.model_runner.residence.checksums()

    def add_lora(self, lora_request: Any) -> bool:
        raise TpuInferenceError(NO_LORA)

    def remove_lora(self, lora_id: int) -> bool:
        raise TpuInferenceError(NO_LORA)

    def pin_lora(self, lora_id: int) -> bool:
        raise TpuInferenceError(NO_LORA)

    def list_loras(self) -> set[int]:
        """None can be loaded."""
        return set()

    def reset_encoder_cache(self) -> None:
        """There is no encoder, hence no cache of one: multimodal input is refused."""

    def shutdown(self) -> None:
        """Nothing outlives the process; arrays go with the runner."""
        if self.watchdog is not None:
            self.watchdog.stop()
        if runner := self.__dict__.pop("model_runner", None):
            runner.shutdown()


def _make_virtual_devices(count: int) -> None:
    """Let JAX's CPU backend show `count` devices, unless it has started or shows more; `make_mesh` reports too few."""
    if jax.config.jax_num_cpu_devices >= count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        logger.debug("JAX's CPU backend has started; it keeps its number of devices")
