# SPDX-License-Identifier: Apache-2.0
"""The op on TPU: the kernels of paged attention, told that values are the first lanes of keys."""

from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.mla.config import Config
from tpu_inference.kernels.ragged_paged_attention import pallas as paged
from tpu_inference.kernels.ragged_paged_attention.decode import decode_rows, words
from tpu_inference.kernels.ragged_paged_attention.paged import FLOOR, NO_WINDOW, sublanes
from tpu_inference.kernels.ragged_paged_attention.pages import LANES
from tpu_inference.kernels.ragged_paged_attention.prefill import attend_rows, q_factor
from tpu_inference.kernels.ragged_paged_attention.write import write_rows


def misfit(pages: Any, block_tables: Any, kv_lora_rank: int) -> str | None:
    """Why the kernels do not serve these shapes; None where they do."""
    if kv_lora_rank % LANES:
        return f"kv_lora_rank {kv_lora_rank} is not a multiple of {LANES}, the lanes of a register"
    return paged.misfit(pages, block_tables)


def attend_pallas(
    q: jax.Array,
    new: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    page_offset: int | jax.Array,
    *,
    scale: float,
    kv_lora_rank: int,
    config: Config,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Writes `new` [T, width] and attends, for rows of one token before rows of more.

    Returns:
        ([T, H, kv_lora_rank] in the dtype of `q` [T, H, kv_lora_rank + rope_dim], the updated pages)
    """
    table_width, (num_tokens, num_heads, head_dim) = block_tables.shape[1], q.shape
    lengths = query_start_loc[1:] - query_start_loc[:-1]
    num_decodes = (lengths == 1).sum(dtype=jnp.int32)
    scalars = jnp.stack([
        num_decodes, (lengths > 0).sum(dtype=jnp.int32), jnp.asarray(page_offset, jnp.int32), jnp.int32(NO_WINDOW)
    ])  # fmt: skip
    no_sinks = jnp.full((num_heads, LANES), FLOOR, jnp.float32)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -head_dim % LANES)))
    options = dict(head_dim=head_dim, soft_cap=None, latent=kv_lora_rank, interpret=interpret)
    # Rows of one token come first: of each the token is the row's number.
    first = min(num_tokens, block_tables.shape[0])
    decoded, pages = decode_rows(
        q[:first], (words(new[:first, None], pages.dtype),), pages, block_tables, seq_lens, scalars, no_sinks,
        scale=scale, config=config.decode.within(table_width), **options,
    )  # fmt: skip
    blocks = config.prefill.within(table_width, num_tokens)
    padding = -num_tokens % max(blocks.block_tokens, sublanes(pages.dtype))

    def flat(x: jax.Array) -> jax.Array:
        return jnp.pad(x.reshape(num_tokens, -1), ((0, padding), (0, 0)))

    tables = (block_tables, seq_lens, query_start_loc, scalars)
    pages = write_rows((flat(new.astype(pages.dtype)),), pages, *tables, interpret=interpret)
    scaled = (q.astype(jnp.float32) * q_factor(scale)).astype(q.dtype)
    attended = attend_rows(
        flat(scaled), pages, *tables, no_sinks,
        num_heads=num_heads, windowed=False, config=blocks, head_blocks=num_heads // config.heads, **options,
    )[:num_tokens].reshape(q.shape)  # fmt: skip
    token = jnp.arange(num_tokens, dtype=jnp.int32)[:, None, None]
    attended = jnp.where(token < query_start_loc[-1], attended, 0)  # nobody wrote what no row owns
    decoded = jnp.where(token[:first] < num_decodes, decoded, attended[:first])
    out = jax.lax.dynamic_update_slice_in_dim(attended, decoded, 0, 0)
    return out[..., :kv_lora_rank], pages
