# SPDX-License-Identifier: Apache-2.0
"""Whether it fits: the engine's budget, with what the compiler says that its largest programs need."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpu_inference.layers.common.sharding import shard_bytes
from tpu_inference.plan.engine import Engine
from tpu_inference.runner.kv_cache_manager import abstract_kv_cache, layout_from_config
from tpu_inference.runner.programs import StepPrograms
from tpu_inference.runner.startup_report import format_bytes
from tpu_inference.worker.memory import DeviceMemory

GUESSED_SHARE = 0.95
"""Of what the weights leave: the KV cache that programs are compiled with, before it is known what they need beside it."""


@dataclass(frozen=True)
class Compiled:
    """A program that was compiled to answer."""

    name: str
    seconds: float
    needs: int
    """Bytes of a device beside its arguments."""


@dataclass(frozen=True, eq=False)
class Pool:
    """The KV cache as vLLM divides a budget, and the programs over it."""

    config: Any
    layout: Any
    programs: StepPrograms
    bytes_per_device: int

    @property
    def num_blocks(self) -> int:
        return self.config.num_blocks


@dataclass(frozen=True)
class MemoryPlan:
    """What one device holds. Bytes are of one device."""

    device: DeviceMemory
    why_not: str = ""
    """Why it does not fit; empty where it does."""
    margin: int = 0
    """Left beyond one request of the greatest length; negative: missing for it."""
    block_size: int = 0
    num_blocks: int = 0
    kv_cache: int = 0
    requests: dict[int, int] = field(default_factory=dict)
    """Length -> requests of that many tokens that the cache holds at once."""
    num_programs: int = 0
    logits: int = 0
    """Of the largest batch of requests."""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.why_not

    @property
    def tokens(self) -> int:
        """Of requests of the greatest length, all together."""
        longest = max(self.requests, default=0)
        return longest * self.requests.get(longest, 0)

    @property
    def free(self) -> int:
        """Left of the limit when all is allocated: what `gpu_memory_utilization` keeps back, and a part of a block."""
        return self.device.limit - self.device.used - self.device.temporaries - self.kv_cache


def device_memory(engine: Engine, temporaries: int) -> DeviceMemory:
    """The engine's budget on a device of the slice where nothing but the weights is loaded."""
    share, weights = engine.config.cache_config.gpu_memory_utilization, engine.weights_per_device
    return DeviceMemory(engine.slice.program_hbm, share, weights, weights, temporaries)


def make_pool(engine: Engine, kv_bytes_per_device: int) -> Pool | None:
    """The KV cache that vLLM makes of so many bytes; None where it does not hold one request of the greatest length."""
    from vllm.v1.core.kv_cache_utils import check_enough_kv_cache_memory, get_kv_cache_configs

    runner, budget = engine.runner, kv_bytes_per_device * engine.tensor_parallel
    specs = runner.get_kv_cache_spec()
    try:
        check_enough_kv_cache_memory(engine.config, specs, budget)
    except ValueError:
        return None
    config = get_kv_cache_configs(engine.config, [specs], [budget])[0]
    functions = runner.functions
    layout = layout_from_config(config, [layer.name for layer in functions.layers], flat=functions.flat_kv)
    cache = abstract_kv_cache(functions, layout, runner.block_size, functions.kv_dtype, runner.mesh)
    programs = runner.make_programs(layout, len(config.kv_cache_groups))
    return Pool(config, layout, programs, sum(map(shard_bytes, cache.pages)))


def guessed_pool(engine: Engine, share: float = GUESSED_SHARE) -> Pool | None:
    """A pool of about the size that it will have: in a small one pages would lie in VMEM, where no server has them."""
    left = device_memory(engine, 0).kv_cache
    if left <= 0:
        return None
    return make_pool(engine, math.floor(share * left)) or make_pool(engine, left)


def _devices_that_hold(engine: Engine, device: DeviceMemory) -> str:
    """Advice from arithmetic alone: what is sharded shrinks with the devices."""
    total = device.weights * engine.tensor_parallel
    heads = engine.config.model_config.model_arch_config.total_num_attention_heads
    for n in range(engine.tensor_parallel + 1, heads + 1):
        if heads % n == 0 and total / n + device.temporaries < 0.9 * device.allowed:
            return f"\nAbout {n} devices of this kind would hold it."
    return ""


def _requests(engine: Engine, config: Any, lengths: Iterable[int]) -> dict[int, int]:
    """vLLM's own count, for several lengths; block 0 is never a request's."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    model, out = engine.config.model_config, {}
    longest = model.max_model_len
    try:
        for length in lengths:
            model.max_model_len = length
            blocks_of_one = config.num_blocks / get_max_concurrency_for_kv_cache_config(engine.config, config)
            out[length] = int((config.num_blocks - 1) / blocks_of_one)
    finally:
        model.max_model_len = longest
    return out


def _notes(engine: Engine, layout: Any) -> list[str]:
    notes, where = [], engine.slice
    if reason := engine.runner.why_attention_is_slow(layout):
        notes.append(f"Attention runs in its XLA form, much slower than the TPU kernels: {reason}.")
    if where.num_hosts > 1:
        notes.append(
            f"{where} has {where.num_hosts} hosts, and this version serves one host: the figures are of the programs alone."
        )
    if idle := where.num_devices - engine.tensor_parallel:
        notes.append(f"{idle} of {where.num_devices} devices stay idle; another server could use them.")
    return notes


def _margin(engine: Engine, device: DeviceMemory) -> int:
    from vllm.v1.core.kv_cache_utils import max_memory_usage_bytes

    needed = max_memory_usage_bytes(engine.config, engine.runner.get_kv_cache_spec().values())
    return device.kv_cache - needed // engine.tensor_parallel


def _too_long(engine: Engine, device: DeviceMemory, margin: int) -> str:
    from vllm.v1.core.kv_cache_utils import estimate_max_model_len

    specs, budget = engine.runner.get_kv_cache_spec(), device.kv_cache * engine.tensor_parallel
    longest = estimate_max_model_len(engine.config, specs, budget)
    missing = f"{format_bytes(-margin)} more" if margin < 0 else "a block more"
    return (
        f"One request of max_model_len={engine.config.model_config.max_model_len} needs {missing} on each device: lower "
        f"--max-model-len to {longest}, or raise --tensor-parallel-size.\n{device.table()}"
    )


def plan_memory(engine: Engine, temporaries: int, lengths: Sequence[int]) -> MemoryPlan:
    """Budget, KV cache and what it holds, given what the largest program needs."""
    device = device_memory(engine, temporaries + engine.runner.programs_for_budget().tables_bytes)
    if device.kv_cache <= 0:
        unknown = (
            ""
            if temporaries
            else "\nThe programs' temporaries are not counted: without room for a cache, none was compiled."
        )
        return MemoryPlan(device, device.does_not_fit() + unknown + _devices_that_hold(engine, device), device.kv_cache)
    margin, pool = _margin(engine, device), make_pool(engine, device.kv_cache)
    if pool is None:
        return MemoryPlan(device, _too_long(engine, device, margin), margin)
    longest = engine.config.model_config.max_model_len
    return MemoryPlan(
        device,
        margin=margin,
        block_size=engine.runner.block_size,
        num_blocks=pool.num_blocks,
        kv_cache=pool.bytes_per_device,
        requests=_requests(engine, pool.config, sorted({*(n for n in lengths if n < longest), longest})),
        num_programs=len(pool.programs.cases()),
        logits=pool.programs.logits_bytes(engine.runner.plan.max_rows),
        notes=tuple(_notes(engine, pool.layout)),
    )
