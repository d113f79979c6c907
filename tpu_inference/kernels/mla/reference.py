# SPDX-License-Identifier: Apache-2.0
"""The truth: every token against every latent its row could have, masked. Memory grows with T x B x page_size."""

import jax
import jax.numpy as jnp

from tpu_inference.kernels.ragged_paged_attention.pages import decode, token_rows

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
    kv_lora_rank: int,
) -> jax.Array:
    """Attention over pages already written; `q` is [T, H, kv_lora_rank + rope_dim], the others are as in `api.mla_attention`.

    Returns:
        float32 [T, H, kv_lora_rank].
    """
    num_tokens, _, dim = q.shape
    rows, real = token_rows(query_start_loc, num_tokens)
    positions = seq_lens[rows] - query_start_loc[rows + 1] + jnp.arange(num_tokens)
    context = decode(pages[block_tables + page_offset, 0, 0])  # [R, B, page_size, width]
    keys = context.reshape(block_tables.shape[0], -1, pages.shape[-1])[rows, :, :dim]
    scores = jnp.einsum("thd,tsd->ths", q.astype(jnp.float32), keys, precision=HIGHEST) * scale
    visible = (jnp.arange(keys.shape[1])[None] <= positions[:, None]) & real[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1)
    out = jnp.einsum("ths,tsd->thd", weights, keys[..., :kv_lora_rank], precision=HIGHEST)
    return jnp.where(real[:, None, None], out, 0)
