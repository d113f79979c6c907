# SPDX-License-Identifier: Apache-2.0
"""From the model's layers to vLLM's KV cache specs, and from vLLM's decision back to arrays on the device."""

import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Mesh
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from tpu_inference.errors import TpuInferenceError
from tpu_inference.kernels.mla import latent_pages_shape
from tpu_inference.kernels.ragged_paged_attention import KV_PAGES_AXES, kv_pages_shape
from tpu_inference.layers.common.attention import KVCache, KVCacheLayout
from tpu_inference.layers.common.attention_metadata import check_chunk
from tpu_inference.layers.common.mla import LATENT_PAGES_AXES
from tpu_inference.layers.common.sharding import named_sharding
from tpu_inference.logger import init_logger, log_once
from tpu_inference.models.common.interface import AttentionLayer, ModelFunctions
from tpu_inference.runner.untouched_zeros import can_leave_untouched, untouched_zeros

logger = init_logger(__name__)


def kv_cache_specs(model: ModelFunctions, block_size: int, dtype: torch.dtype) -> dict[str, KVCacheSpec]:
    """vLLM's spec of every attention layer. Heads and head size are the physical ones (replicas and padding included), over all devices."""

    def spec(layer: AttentionLayer) -> KVCacheSpec:
        _, planes, heads, _, width = pages_shape(layer, 1, block_size, model.platform)
        if layer.latent is not None:
            copies = layer.num_kv_heads
            return MLAAttentionSpec(
                block_size=block_size, num_kv_heads=1, num_head_slots=copies, head_size=width, dtype=dtype
            )
        common = dict(block_size=block_size, num_kv_heads=heads, head_size=planes * width // 2, dtype=dtype)
        if layer.chunk is not None:
            check_chunk(layer.chunk, block_size)
            return ChunkedLocalAttentionSpec(**common, attention_chunk_size=layer.chunk)
        if layer.sliding_window is None:
            return FullAttentionSpec(**common)
        return SlidingWindowSpec(**common, sliding_window=layer.sliding_window)

    return {layer.name: spec(layer) for layer in model.layers}


def pages_shape(layer: AttentionLayer, count: int, block_size: int, platform: str) -> tuple[int, ...]:
    """Of an array of `count` pages of a layer, over all devices; of latents, which each device has all of, on each."""
    if layer.latent is not None:
        return latent_pages_shape(count, block_size, layer.latent, layer.head_dim - layer.latent, platform)
    return kv_pages_shape(count, block_size, layer.num_kv_heads, layer.head_dim, platform)


def uniform_layout(model: ModelFunctions, num_blocks: int) -> KVCacheLayout:
    """A slot and a common block table for every layer: what is compiled to measure memory before vLLM has decided."""
    n = len(model.layers)
    return KVCacheLayout(tuple(range(n)), (0,) * n, num_blocks, model.flat_kv)


def layout_from_config(config: KVCacheConfig, layer_names: Sequence[str], *, flat: bool) -> KVCacheLayout:
    """Where vLLM placed each layer: layers whose pages have the same address share a slot."""
    address = {
        name: tensor.offset + i * tensor.layer_stride
        for tensor in config.kv_cache_tensors
        for i, name in enumerate(tensor.layers)
    }
    group = {name: g for g, spec in enumerate(config.kv_cache_groups) for name in spec.layer_names}
    if missing := [name for name in layer_names if name not in address or name not in group]:
        raise TpuInferenceError(f"vLLM's KV cache config has no place for layers {missing}")
    sizes = {spec.kv_cache_spec.block_size for spec in config.kv_cache_groups}
    if len(sizes) > 1:
        raise TpuInferenceError(
            f"vLLM chose different block sizes for the KV cache groups of this model ({sorted(sizes)}), which is not served. "
            "Start with --disable-hybrid-kv-cache-manager."
        )
    slots = {start: slot for slot, start in enumerate(sorted(set(address.values())))}
    return KVCacheLayout(
        tuple(slots[address[name]] for name in layer_names),
        tuple(group[name] for name in layer_names),
        config.num_blocks,
        flat,
    )


def abstract_kv_cache(model: ModelFunctions, layout: KVCacheLayout, block_size: int, dtype, mesh: Mesh) -> KVCache:
    """Shapes and shardings of the cache arrays."""
    layer_of_slot: dict[int, AttentionLayer] = {}
    for slot, layer in zip(layout.slot_of_layer, model.layers, strict=True):
        first = layer_of_slot.setdefault(0 if layout.flat else slot, layer)
        if (first.num_kv_heads, first.head_dim) != (layer.num_kv_heads, layer.head_dim):
            raise TpuInferenceError(
                "vLLM placed layers of different KV heads in the same memory, which is not served. "
                "Start with --disable-hybrid-kv-cache-manager."
            )
    pages = layout.num_blocks * (layout.num_slots if layout.flat else 1)

    def array(layer: AttentionLayer) -> jax.ShapeDtypeStruct:
        axes = KV_PAGES_AXES if layer.latent is None else LATENT_PAGES_AXES
        shape = pages_shape(layer, pages, block_size, model.platform)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, axes))

    return KVCache(tuple(array(layer_of_slot[slot]) for slot in sorted(layer_of_slot)), layout)


def allocate_kv_cache(abstract: KVCache) -> KVCache:
    """A zeroed cache, each array made where it stays."""

    def zeros(array: jax.ShapeDtypeStruct) -> jax.Array:
        if can_leave_untouched(array):
            try:
                return untouched_zeros(array)
            except (OSError, RuntimeError, ValueError) as error:  # another jaxlib's interface; memory that is locked
                message = "The KV cache takes all of its memory at once: pages could not be left untouched (%s)"
                log_once(logger, logging.WARNING, message, error)
        return jax.jit(lambda: jnp.zeros(array.shape, array.dtype), out_shardings=array.sharding)()

    return KVCache(tuple(zeros(array) for array in abstract.pages), abstract.layout)
