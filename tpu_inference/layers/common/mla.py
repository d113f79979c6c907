# SPDX-License-Identifier: Apache-2.0
"""Latent attention over the paged cache: queries are divided by heads among devices, each of which has all latents."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tpu_inference.kernels.forms import Implementation
from tpu_inference.kernels.mla import mla_attention
from tpu_inference.kernels.ragged_paged_attention import implementation_for
from tpu_inference.layers.common.attention import KVCache
from tpu_inference.layers.common.attention_metadata import AttentionMetadata
from tpu_inference.layers.common.sharding import spec

LATENT_PAGES_AXES = ("pages", None, None, None, None)
"""Every head reads every latent, so each device has all of them."""


def times_heads(x: jax.Array, weight: jax.Array, contracted: int, accumulate_dtype: Any) -> jax.Array:
    """Each head's product with its own matrix: `x` [T, H, a] and `weight` [H, a, b] (contracted=1) or [H, b, a] (2) make [T, H, b] in x's dtype."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((2,), (contracted,)), ((1,), (0,)))
    out = jax.lax.dot_general(x, weight, dims, precision=precision, preferred_element_type=accumulate_dtype)
    return out.swapaxes(0, 1).astype(x.dtype)


def latent_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_latent: jax.Array,
    k_rope: jax.Array,
    kv_cache: KVCache,
    layer: int | jax.Array,
    meta: AttentionMetadata,
    *,
    mesh: Mesh,
    scale: float,
    kv_scale: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Write this step's latents into the pages of `layer`, then attend over them in absorbed form; see `kernels.mla.mla_attention`.

    Args:
        q_latent: [T, num_heads, kv_lora_rank].
        q_rope: [T, num_heads, rope_dim].
        kv_latent: [T, kv_lora_rank].
        k_rope: [T, rope_dim].
        kv_cache: donated by the step; the result replaces it.
        layer: as `attention` takes it.
        kv_scale: float32 scalar, what pages of a byte a number hold latents and rotated keys divided by; None for 1.

    Returns:
        (outputs as latents [T, num_heads, kv_lora_rank], the updated cache).
    """
    index, page_offset, group = kv_cache.locate(layer)
    op = _op(mesh, scale, implementation_for(mesh.devices.flat[0]))
    tables = (meta.block_tables[group], meta.seq_lens, meta.query_start_loc, page_offset)
    out, pages = op(q_latent, q_rope, kv_latent, k_rope, kv_cache.pages[index], *tables, kv_scale)
    return out, KVCache((*kv_cache.pages[:index], pages, *kv_cache.pages[index + 1 :]), kv_cache.layout)


@lru_cache
def _op(mesh: Mesh, scale: float, implementation: Implementation) -> Callable[..., Any]:
    """The op over `mesh` by heads, traced once for all layers that loop."""

    def op(*args):
        *args, kv_scale = args
        return mla_attention(*args, scale=scale, kv_scale=kv_scale, implementation=implementation)

    if mesh.size > 1:
        heads, pages, whole = spec((None, "heads", None)), spec(LATENT_PAGES_AXES), PartitionSpec()
        op = jax.shard_map(
            op,
            mesh=mesh,
            in_specs=(heads, heads, whole, whole, pages, whole, whole, whole, whole, whole),
            out_specs=(heads, pages),
            check_vma=False,
        )
    return jax.jit(op)
