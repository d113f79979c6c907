# SPDX-License-Identifier: Apache-2.0
"""The truth: every token against every key its row could have, masked. Memory grows with T x B x page_size."""

import jax
import jax.numpy as jnp

from tpu_inference.kernels.ragged_paged_attention.pages import decode, from_planes, token_rows

HIGHEST = jax.lax.Precision.HIGHEST


def attend_reference(
    q: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    page_offset: int | jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    sliding_window: int | jax.Array | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Attention over pages already written; arguments as in `api.ragged_paged_attention`. float32 [T, num_heads, head_dim]."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = pages.shape[2]
    rows, real = token_rows(query_start_loc, num_tokens)
    positions = seq_lens[rows] - query_start_loc[rows + 1] + jnp.arange(num_tokens)
    # [R, B, planes, K, page, width] -> [planes, R, K, context, width]
    kv = decode(pages[block_tables + page_offset].transpose(2, 0, 3, 1, 4, 5))
    kv = kv.reshape(pages.shape[1], block_tables.shape[0], num_kv_heads, -1, pages.shape[-1])
    k, v = from_planes(kv, head_dim)
    grouped = q.reshape(num_tokens, num_kv_heads, -1, head_dim).astype(jnp.float32)
    scores = jnp.einsum("tkgd,tksd->tkgs", grouped, k[rows], precision=HIGHEST) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    keys = jnp.arange(k.shape[2])
    visible = keys[None] <= positions[:, None]
    if sliding_window is not None:
        visible &= (keys[None] > positions[:, None] - sliding_window) | (jnp.asarray(sliding_window) <= 0)
    visible &= real[:, None]
    scores = jnp.where(visible[:, None, None], scores, -1e30)
    if sinks is not None:  # one more key a head, without a value
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[2]]
    out = jnp.einsum("tkgs,tksd->tkgd", weights, v[rows], precision=HIGHEST)
    return jnp.where(real[:, None, None], out.reshape(num_tokens, num_heads, head_dim), 0)
