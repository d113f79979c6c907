# SPDX-License-Identifier: Apache-2.0
"""Bare platform until the real one lands."""
import contextlib
import torch
from vllm.platforms.interface import Platform, PlatformEnum


class TpuPlatform(Platform):
    _enum = PlatformEnum.TPU
    device_name = "tpu"
    device_type = "tpu"
    dispatch_key = "CPU"
    ray_device_key = "TPU"
    dist_backend = "gloo"
    simple_compile_backend = "eager"
    device_control_env_var = "TPU_VISIBLE_CHIPS"
    supported_dtypes = [torch.bfloat16, torch.float32]

    @classmethod
    def get_device_name(cls, device_id=0):
        return "cpu"

    @classmethod
    def get_device_total_memory(cls, device_id=0):
        return 16 * 2**30

    @classmethod
    def check_and_update_config(cls, c):
        c.parallel_config.worker_cls = "tpu_inference.worker.tpu_worker.TPUWorker"
        c.parallel_config.distributed_executor_backend = "uni"
        from vllm.config import CompilationMode, CUDAGraphMode
        c.compilation_config.mode = CompilationMode.NONE
        c.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        if c.cache_config.block_size is None:
            c.cache_config.block_size = 16

    @classmethod
    def update_block_size_for_backend(cls, c):
        pass

    @classmethod
    def get_attn_backend_cls(cls, *a, **k):
        return "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"

    @classmethod
    def import_kernels(cls): pass
    @classmethod
    def import_ir_kernels(cls): pass
    @classmethod
    def inference_mode(cls): return torch.no_grad()
    @classmethod
    def set_device(cls, d): pass
    @classmethod
    def manual_seed_all(cls, s): pass
    @classmethod
    def is_pin_memory_available(cls): return False
    @classmethod
    def can_update_inplace(cls): return False
    @classmethod
    def support_hybrid_kv_cache(cls): return True
