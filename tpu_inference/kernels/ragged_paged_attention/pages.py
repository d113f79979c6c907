# SPDX-License-Identifier: Apache-2.0
"""The layout of KV cache pages, and how a step's keys and values are written into them."""

from typing import Any

import jax
import jax.numpy as jnp

KV_PAGES_AXES = ("pages", None, "kv_heads", None, "head_dim")
"""Logical axes of the pages: [pages, K or V, num_kv_heads, page_size, head_dim]."""


def kv_pages_shape(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: Any
) -> tuple[int, int, int, int, int]:
    """Shape of an array of pages. `dtype` is part of the contract, since packed layouts depend on it; this one does not."""
    del dtype
    return (num_pages, 2, num_kv_heads, page_size, head_dim)


def storage_dtype(dtype: Any, platform: str) -> Any:
    """What pages of `dtype` are stored as.

    XLA's CPU backend updates bf16 arrays by converting all of them to float32 and back, so there their bits are kept as integers.
    """
    return jnp.dtype(jnp.uint16) if platform == "cpu" and dtype == jnp.bfloat16 else jnp.dtype(dtype)


def encode(x: jax.Array, storage: Any) -> jax.Array:
    """`x` as pages of `storage` dtype hold it."""
    if storage == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return x.astype(storage)


def decode(stored: jax.Array) -> jax.Array:
    """float32 of what `encode` made."""
    if stored.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
    return stored.astype(jnp.float32)


def token_rows(query_start_loc: jax.Array, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """For each token its row (int32 [T]) and whether it is not padding (bool [T])."""
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    rows = jnp.searchsorted(query_start_loc, tokens, side="right").astype(jnp.int32) - 1
    num_rows = query_start_loc.shape[0] - 1
    return jnp.minimum(rows, num_rows - 1), tokens < query_start_loc[-1]


def write_kv(
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    page_offset: int | jax.Array,
) -> jax.Array:
    """`pages` with `k` and `v` [T, num_kv_heads, head_dim] of the real tokens written. Shapes as in `ragged_paged_attention`."""
    num_tokens, page_size = k.shape[0], pages.shape[3]
    rows, real = token_rows(query_start_loc, num_tokens)
    positions = seq_lens[rows] - query_start_loc[rows + 1] + jnp.arange(num_tokens, dtype=jnp.int32)
    page = block_tables[rows, jnp.where(real, positions, 0) // page_size] + page_offset
    slot = positions % page_size
    kv = encode(jnp.stack([k, v], axis=1), pages.dtype)
    page = jnp.where(real, page, pages.shape[0])  # out of range: dropped
    return pages.at[page, :, :, slot, :].set(kv, mode="drop")
