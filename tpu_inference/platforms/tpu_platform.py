# SPDX-License-Identifier: Apache-2.0
"""vLLM's platform: what device this is, what configuration it needs, what it refuses. Runs in the front end too, so no JAX."""

# First: process defaults that must precede JAX.
import tpu_inference.env_override  # noqa: F401  isort: skip

import logging
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import psutil
import torch
from vllm.platforms.interface import Platform, PlatformEnum

from tpu_inference import envs, tpu_info
from tpu_inference.compat.lowering import quiet_torch_accelerator
from tpu_inference.compat.processes import (
    choose_start_method,
    exit_with_error_when_engine_dies,
    grant_engine_shutdown_grace,
    skip_the_last_collection,
)
from tpu_inference.compat.sampling import loaded_logits_processors
from tpu_inference.logger import init_logger, log_once
from tpu_inference.models.common.kv_cache_dtype import quantized_cache_dtype
from tpu_inference.models.common.quantization import SERVED, QuantizationError
from tpu_inference.platforms.checks import SERVED_DTYPES, is_served, refuse_unserved
from tpu_inference.runner import metrics

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

WORKER = "tpu_inference.worker.tpu_worker.TPUWorker"
ATTENTION_BACKEND = "tpu_inference.layers.vllm.attention.TpuAttentionBackend"
CPU_BLOCK_SIZE = 16
CPU_MEMORY_SHOWN = 64 * 2**30
# On TPU a block is what one DMA moves, and each DMA costs scalar work: with one KV head a chip, decoding from blocks of 16 tokens takes
# three times as long as from 128, by the compiler's schedule. Short contexts would waste too much of a partly filled last block.
TPU_BLOCK_SIZES = ((512, 64), (131072, 128))
TPU_LARGEST_BLOCK_SIZE = 256


def default_block_size(max_model_len: int, platform: str) -> int:
    """Tokens a KV cache block holds where the user does not say."""
    if platform == "cpu":
        return CPU_BLOCK_SIZE
    return next((size for limit, size in TPU_BLOCK_SIZES if max_model_len <= limit), TPU_LARGEST_BLOCK_SIZE)


def _log_device() -> None:
    detection = tpu_info.detect_once()
    chip = f" ({detection.num_chips} x {detection.chip.name})" if detection.chip else ""
    message = "tpu_inference serves on %s%s: %s. Set JAX_PLATFORMS to cpu or tpu to choose."
    log_once(logger, logging.INFO, message, detection.platform.upper(), chip, detection.reason)


def _change(owner: Any, name: str, value: Any, why: str) -> None:
    """Set `owner.name`, and say so at INFO the first time, with why."""
    before = getattr(owner, name)
    if before != value:
        setattr(owner, name, value)
        log_once(logger, logging.INFO, "%s is now %s, not %s: %s", name, value, before, why)


class TpuPlatform(Platform):
    """TPU, or JAX's CPU backend standing in for it."""

    # Also on the CPU: out-of-tree would have vLLM ask torch for a device of that name.
    _enum = PlatformEnum.TPU
    device_name = "tpu"
    device_type = "tpu"
    dispatch_key = "CPU"
    ray_device_key = "TPU"
    dist_backend = "gloo"
    simple_compile_backend = "eager"
    device_control_env_var = "TPU_VISIBLE_CHIPS"
    additional_env_vars: list[str] = envs.forwarded()
    supported_quantization: list[str] = list(SERVED)  # noqa: RUF012
    _vocab_size: int | None = None
    _logits_processors: Any = None

    def __init__(self) -> None:
        quiet_torch_accelerator()  # not the worker's process alone: cleanup_dist_env_and_memory() is called in the user's

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        return SERVED_DTYPES

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        """Raises QuantizationError, with what is served instead."""
        if quant not in SERVED:
            raise QuantizationError(f"The quantization {quant!r}")

    # What the device is.

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        """vLLM's name of the chip, by which it picks default batch sizes; "cpu" without one."""
        detection = tpu_info.detect_once()
        return detection.chip.vllm_name if detection.chip else detection.platform

    @classmethod
    def device_count(cls) -> int:
        """Chips of this host; 1 on the CPU backend."""
        return tpu_info.detect_once().num_chips or 1

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        return f"{cls.get_device_name(device_id)}-{device_id}"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """HBM bytes of one device, or the machine's RAM, as far as vLLM's default batch sizes do not grow with it."""
        chip = tpu_info.detect_once().chip
        return chip.hbm_bytes_per_device if chip else min(psutil.virtual_memory().total, CPU_MEMORY_SHOWN)

    # What vLLM would do on a torch device, and need not here.

    @classmethod
    def import_kernels(cls) -> None:
        """vLLM's C extensions are not used."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        """vLLM's compiled IR kernels are not used."""

    @classmethod
    def inference_mode(cls) -> AbstractContextManager:
        return torch.no_grad()

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """JAX holds the devices."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        """Randomness on the device comes from each request's seed."""

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def can_update_inplace(cls) -> bool:
        return False

    @classmethod
    def is_sleep_mode_available(cls) -> bool:
        return True

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    @classmethod
    def use_all_gather(cls) -> bool:
        return True

    @classmethod
    def get_punica_wrapper(cls) -> str:
        raise NotImplementedError("LoRA is refused at config time")

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        """Raises ValueError for a dtype that is not served."""
        if not is_served(dtype):
            raise ValueError(f"{dtype} is not served by tpu_inference: use --dtype bfloat16 or --dtype float32.")

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Only vLLM's PyTorch models ask."""
        if attn_selector_config.use_mla:
            raise NotImplementedError(
                "vLLM's PyTorch classes are served with attention over whole heads, and this one asks for latents (MLA): set VLLM_MLA_DISABLE=1"
            )
        return ATTENTION_BACKEND

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: "VllmConfig") -> None:
        """`check_and_update_config` has chosen it."""

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        envs.register_with_vllm()

    # Configuration and requests.

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Make the configuration one that the worker serves, or raise ConfigError. vLLM calls this more than once."""
        from vllm.config import CompilationMode, CUDAGraphMode

        _log_device()  # not earlier: vLLM has set up its logging only now
        refuse_unserved(vllm_config)
        exit_with_error_when_engine_dies()  # first: what is registered later is left in peace at exit
        metrics.expose()
        grant_engine_shutdown_grace()
        skip_the_last_collection()
        choose_start_method()
        parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
        if parallel.worker_cls == "auto":
            _change(parallel, "worker_cls", WORKER, "the worker of this platform")
        if parallel.distributed_executor_backend is None:
            _change(parallel, "distributed_executor_backend", "uni", "one process drives all devices of a host")
        _change(parallel, "disable_custom_all_reduce", True, "XLA does collectives")
        if vllm_config.profiler_config.profiler:
            why = "a torch profile of the API server would have no bounds"
            _change(vllm_config.profiler_config, "ignore_frontend", True, why)
        _change(compilation, "mode", CompilationMode.NONE, "JAX compiles, not torch")
        _change(compilation, "cudagraph_mode", CUDAGraphMode.NONE, "there is no CUDA graph")
        cache, model = vllm_config.cache_config, vllm_config.model_config
        if model is None:
            return
        cls._vocab_size = model.get_vocab_size()
        cls._logits_processors = tuple(model.logits_processors or ())
        if cache.cache_dtype == "auto" and quantized_cache_dtype(vllm_config):
            _change(cache, "cache_dtype", "fp8", "the checkpoint has scales of such a KV cache")
        if not cache.user_specified_block_size:
            platform = tpu_info.detect_once().platform
            size = default_block_size(model.max_model_len, platform)
            _change(cache, "block_size", size, f"tokens a KV cache block, for {platform} and this context length")

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """Raise a RequestError, which is HTTP 400 and ValueError, for what is not served."""
        from tpu_inference.platforms import requests  # imports vllm.config, which is still loading when this module is

        requests.validate(
            processed_inputs, params, cls._vocab_size, loaded_logits_processors(cls._logits_processors or ())
        )
