# SPDX-License-Identifier: Apache-2.0
"""How many bytes the KV cache may take."""

import os
from dataclasses import dataclass

import jax
import psutil
from vllm.config import CacheConfig

from tpu_inference import envs
from tpu_inference.errors import TpuInferenceError
from tpu_inference.logger import init_logger
from tpu_inference.runner.startup_report import format_bytes

logger = init_logger(__name__)

CPU_MEMORY_SHARE = 0.125
"""Of the free RAM, where VLLM_CPU_KVCACHE_SPACE does not say: the machine is somebody's laptop."""


@dataclass(frozen=True)
class DeviceMemory:
    """How the memory of one device is divided, in bytes: of one at hand, or of one that `tpu_inference.plan` asks about."""

    limit: int
    """What the runtime lets programs have."""
    share: float
    """`gpu_memory_utilization`."""
    weights: int
    used: int
    """Allocated before the KV cache: the weights, and what else there is."""
    temporaries: int
    """What the largest program needs beside its arguments."""

    @property
    def allowed(self) -> int:
        """What the engine may use of the limit."""
        return int(self.limit * self.share)

    @property
    def kv_cache(self) -> int:
        """What is left for the KV cache; negative: how much is missing."""
        return self.allowed - self.used - self.temporaries

    def table(self) -> str:
        """The division, a line each."""
        rows = (
            ("HBM of a device", self.limit),
            (f"x gpu_memory_utilization={self.share}", self.allowed),
            ("- weights", self.weights),
            ("- in use besides", max(self.used - self.weights, 0)),
            ("- temporaries of the programs", self.temporaries),
            ("= left for the KV cache", self.kv_cache),
        )
        return "\n".join(f"  {name:<37} {size / 2**30:>8.2f} GiB" for name, size in rows)

    def does_not_fit(self) -> str:
        """Why there is no KV cache, and what would help."""
        return (
            f"No memory is left for the KV cache on a device of {format_bytes(self.limit)} HBM: raise --gpu-memory-utilization, "
            "raise --tensor-parallel-size, or lower --max-num-batched-tokens (temporaries grow with it).\n"
            + self.table()
        )


def kv_cache_budget(cache: CacheConfig, devices: list[jax.Device], weights: int, temporaries: int) -> int:
    """Bytes for the KV cache over all `devices`.

    `weights` is the bytes of parameters over all devices, `temporaries` the bytes per device that the largest program needs beside them.

    Raises:
        TpuInferenceError: nothing is left, with the numbers and what would help.
    """
    if cache.kv_cache_memory_bytes:
        logger.info("KV cache: %s, as kv_cache_memory_bytes says", format_bytes(cache.kv_cache_memory_bytes))
        return cache.kv_cache_memory_bytes
    if devices[0].platform == "cpu":
        return _cpu_budget()
    return _device_budget(cache, devices, weights, temporaries)


def _cpu_budget() -> int:
    free = psutil.virtual_memory().available
    if space := envs.VLLM_CPU_KVCACHE_SPACE:
        budget = int(space * 2**30)
        if budget > free:
            raise TpuInferenceError(
                f"VLLM_CPU_KVCACHE_SPACE={space} asks for {format_bytes(budget)} of KV cache and {format_bytes(free)} of RAM "
                "are free. Lower it, or free memory."
            )
        logger.info("KV cache: %s, as VLLM_CPU_KVCACHE_SPACE says", format_bytes(budget))
        return budget
    # The number of blocks is part of every compiled program: a budget that moved with the free RAM would find none in the cache.
    budget = 1 << (int(free * CPU_MEMORY_SHARE).bit_length() - 1)
    logger.info(
        "KV cache: %s, up to %.1f %% of the free RAM (a power of two); set VLLM_CPU_KVCACHE_SPACE (GiB) to change it",
        format_bytes(budget),
        100 * CPU_MEMORY_SHARE,
    )
    return budget


def _device_budget(cache: CacheConfig, devices: list[jax.Device], weights: int, temporaries: int) -> int:
    """The smallest device decides: shards are equal."""
    stats = [device.memory_stats() for device in devices]
    memory = DeviceMemory(
        limit=min(s["bytes_limit"] for s in stats),
        share=cache.gpu_memory_utilization,
        weights=weights // len(devices),
        used=max(s["bytes_in_use"] for s in stats),
        temporaries=temporaries,
    )
    if memory.kv_cache <= 0:
        raise TpuInferenceError(memory.does_not_fit())
    logger.info("KV cache: %s on each device:\n%s", format_bytes(memory.kv_cache), memory.table())
    return memory.kv_cache * len(devices)


def peak_host_bytes() -> int:
    """Highest resident size of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if os.name == "posix" else 0
