# SPDX-License-Identifier: Apache-2.0
"""The attention layer: the KV cache as a pytree, and the paged op over it, sharded by heads."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from tpu_inference.kernels.forms import Implementation
from tpu_inference.kernels.ragged_paged_attention import (
    KV_PAGES_AXES,
    implementation_for,
    ragged_paged_attention,
)
from tpu_inference.layers.common.attention_metadata import AttentionMetadata
from tpu_inference.layers.common.sharding import spec


@dataclass(frozen=True)
class KVCacheLayout:
    """Where each layer's pages are. Static: part of the compiled program.

    Layers of different KV cache groups may share a slot: vLLM gives a block id to one group at a time, so their pages never collide.
    """

    slot_of_layer: tuple[int, ...]
    group_of_layer: tuple[int, ...]
    num_blocks: int
    flat: bool
    """One pool of `num_slots * num_blocks` pages (scanned layers) instead of one array per slot (a loop over layers)."""

    @property
    def num_slots(self) -> int:
        return max(self.slot_of_layer, default=-1) + 1


@partial(jax.tree_util.register_dataclass, data_fields=["pages"], meta_fields=["layout"])
@dataclass(frozen=True)
class KVCache:
    """The paged KV cache of all layers."""

    pages: tuple[jax.Array, ...]
    """Arrays of `kv_pages_shape(...)`: one in all where `layout.flat`, else one per slot."""
    layout: KVCacheLayout

    def locate(self, layer: int | jax.Array) -> tuple[int, int | jax.Array, int | jax.Array]:
        """(index into `pages`, page offset, KV cache group) of `layer`, which may be traced only in a flat cache."""
        layout = self.layout
        if not layout.flat:
            return layout.slot_of_layer[layer], 0, layout.group_of_layer[layer]
        slots, groups = (jax.numpy.asarray(table, "int32") for table in (layout.slot_of_layer, layout.group_of_layer))
        return 0, slots[layer] * layout.num_blocks, groups[layer]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_cache: KVCache,
    layer: int | jax.Array,
    meta: AttentionMetadata,
    *,
    mesh: Mesh,
    scale: float,
    soft_cap: float | None = None,
    sliding_window: int | jax.Array | None = None,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Write this step's K and V into the pages of `layer`, then attend over them.

    Args:
        q: [T, num_heads, head_dim].
        k, v: [T, num_kv_heads, head_dim].
        kv_cache: donated by the step; the result replaces it.
        layer: attention layer index; traced under `lax.scan` (flat cache), a Python int otherwise.
        sliding_window: tokens a query sees, itself included; None or <= 0 for all. May be traced.
        sinks: [num_heads], each head's score of one more key without a value.
        kv_scales: float32 [2], what pages of a byte a number hold K and V divided by; None for 1.

    Returns:
        ([T, num_heads, head_dim], the updated cache).
    """
    index, page_offset, group = kv_cache.locate(layer)
    # A window known while tracing stays a Python number, so that the op can leave its masks out.
    known = sliding_window if isinstance(sliding_window, int | None) else _TRACED
    op = _op(mesh, scale, soft_cap, known, sinks is not None, implementation_for(mesh.devices.flat[0]))
    more = (*(() if known is not _TRACED else (sliding_window,)), *(() if sinks is None else (sinks,)))
    scales = () if kv_scales is None else (kv_scales[0], kv_scales[1])
    tables = (meta.block_tables[group], meta.seq_lens, meta.query_start_loc, page_offset)
    out, pages = op(q, k, v, kv_cache.pages[index], *tables, scales, *more)
    updated = (*kv_cache.pages[:index], pages, *kv_cache.pages[index + 1 :])
    return out, KVCache(updated, kv_cache.layout)


_TRACED = "traced"


@lru_cache
def _op(
    mesh: Mesh,
    scale: float,
    soft_cap: float | None,
    window: int | str | None,
    has_sinks: bool,
    implementation: Implementation,
) -> Callable[..., Any]:
    """The op over `mesh` by heads. Layers that loop call the same function, so it is traced once for all of them."""

    def op(q, k, v, pages, block_tables, seq_lens, query_start_loc, page_offset, scales, *more):
        k_scale, v_scale = scales or (None, None)
        return ragged_paged_attention(
            q, k, v, pages, block_tables, seq_lens, query_start_loc, page_offset,
            scale=scale, soft_cap=soft_cap,
            sliding_window=more[0] if window is _TRACED else -1 if window is None else window,
            sinks=more[-1] if has_sinks else None,
            k_scale=k_scale, v_scale=v_scale,
            implementation=implementation,
        )  # fmt: skip

    if mesh.size > 1:
        heads, pages, whole = spec((None, "heads", None)), spec(KV_PAGES_AXES), PartitionSpec()
        more = (whole,) * (window is _TRACED) + (spec(("heads",)),) * has_sinks
        op = jax.shard_map(
            op,
            mesh=mesh,
            in_specs=(heads, heads, heads, pages, whole, whole, whole, whole, whole, *more),
            out_specs=(heads, pages),
            check_vma=False,
        )
    return jax.jit(op)
