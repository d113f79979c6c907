# SPDX-License-Identifier: Apache-2.0
"""The op on TPU: rows of one token by one Pallas kernel, rows of more by two; all update queries to outputs in place."""

from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.mla.config import HEADS, Config
from tpu_inference.kernels.mla.decode import decode_rows
from tpu_inference.kernels.mla.prefill import attend_rows
from tpu_inference.kernels.ragged_paged_attention import pallas as paged
from tpu_inference.kernels.ragged_paged_attention.decode import words
from tpu_inference.kernels.ragged_paged_attention.paged import NO_WINDOW, sublanes
from tpu_inference.kernels.ragged_paged_attention.pages import LANES
from tpu_inference.kernels.ragged_paged_attention.prefill import q_factor
from tpu_inference.kernels.ragged_paged_attention.write import write_rows


def misfit(pages: Any, block_tables: Any, kv_lora_rank: int) -> str | None:
    """Why the kernels do not serve these shapes; None where they do."""
    if kv_lora_rank % LANES:
        return f"kv_lora_rank {kv_lora_rank} is not a multiple of {LANES}, the lanes of a register"
    return paged.misfit(pages, block_tables)


def attend_pallas(
    q_latent: jax.Array,
    q_rope: jax.Array,
    new: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    page_offset: int | jax.Array,
    *,
    scale: float,
    kv_scale: jax.Array | float,
    config: Config,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Writes `new` [T, width] and attends, for rows of one token before rows of more.

    Pages hold latents / kv_scale. The others are those of `mla_attention`.

    Returns:
        ([T, H, kv_lora_rank] in the dtype of `q_latent`, the updated pages)
    """
    num_tokens, num_heads, _ = q_latent.shape
    table_width, lengths = block_tables.shape[1], query_start_loc[1:] - query_start_loc[:-1]
    # Those at the front: rows may be cut, and what is left of one may be one token too.
    num_decodes = (jnp.cumsum(lengths != 1) == 0).sum(dtype=jnp.int32)
    scalars = jnp.stack([
        num_decodes, (lengths > 0).sum(dtype=jnp.int32), jnp.asarray(page_offset, jnp.int32), jnp.int32(NO_WINDOW)
    ])  # fmt: skip
    kv_scale = jnp.asarray(kv_scale, jnp.float32)
    factors = jnp.stack([q_factor(scale) * kv_scale, kv_scale])
    prefill = config.prefill.within(table_width, num_tokens)
    block = max(prefill.block_tokens, sublanes(pages.dtype))
    out, q_rope = (jnp.pad(x, ((0, -num_tokens % block), (0, -num_heads % HEADS), (0, 0))) for x in (q_latent, q_rope))
    # Rows of one token come first: of each the token is the row's number.
    out, pages = decode_rows(
        out, q_rope, words(new[:, None], pages.dtype), pages, block_tables, seq_lens, scalars, factors,
        config=config.decode.within(table_width, pages.shape[3]), interpret=interpret,
    )  # fmt: skip
    tables = (block_tables, seq_lens, query_start_loc, scalars)
    flat = jnp.pad(new.astype(pages.dtype), ((0, -num_tokens % block), (0, 0)))
    pages = write_rows((flat,), pages, *tables, interpret=interpret)
    out = attend_rows(out, q_rope, pages, *tables, factors, config=prefill, interpret=interpret)
    return out[:num_tokens, :num_heads], pages
