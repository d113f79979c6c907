# SPDX-License-Identifier: Apache-2.0
"""The op on TPU: rows of one token by one Pallas kernel, rows of more by two, and how all of them are blocked."""

from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.ragged_paged_attention.decode import DecodeConfig, decode_rows
from tpu_inference.kernels.ragged_paged_attention.paged import LANES, NO_WINDOW, sublanes
from tpu_inference.kernels.ragged_paged_attention.prefill import PrefillConfig, attend_rows, write_rows

# Bytes in flight hide the latency of HBM: an item is large enough that its DMAs take longer than its scalar work, and small enough for a ring.
ITEM_BYTES, ITEM_TOKENS, STAGES = 2**20, 1024, 4
CHUNK_TOKENS, BLOCK_TOKENS = 512, 128
VMEM_BYTES = 12 * 2**20
"""Of the 16 MiB that a kernel gets by default on the smallest chip; the rest is for what the compiler keeps."""
SMEM_BYTES = 3 * 2**18
"""Of the 1 MiB where block tables lie while a kernel runs."""


def _pages_within(tokens: int, page_size: int) -> int:
    return max(tokens // page_size, 1)


def decode_config(pages: Any, table_width: int) -> DecodeConfig:
    """Blocks for `pages` [P, 2, num_kv_heads, page_size, head_dim] and rows of up to `table_width` pages."""
    _, _, heads, page_size, head_dim = pages.shape
    token = 2 * heads * head_dim * jnp.dtype(pages.dtype).itemsize
    per_item = min(_pages_within(min(ITEM_BYTES // token, ITEM_TOKENS), page_size), table_width)
    return DecodeConfig(pages_per_item=per_item, items=1, stages=STAGES)


def prefill_config(pages: Any, table_width: int, num_heads: int) -> PrefillConfig:
    """Blocks for pages and rows as above; fewer tokens where many heads' running softmax would not fit."""
    _, _, heads, page_size, head_dim = pages.shape
    itemsize = jnp.dtype(pages.dtype).itemsize
    page = 2 * 2 * heads * page_size * head_dim * itemsize  # two slots of K and V
    per_chunk = min(_pages_within(CHUNK_TOKENS, page_size), table_width, max(VMEM_BYTES // 2 // page, 1))
    state = num_heads * ((2 * LANES + head_dim) * 4 + 2 * head_dim * itemsize)
    block = BLOCK_TOKENS
    while block > 16 and block * state > VMEM_BYTES // 2:
        block //= 2
    return PrefillConfig(block, per_chunk)


def misfit(pages: Any, block_tables: Any) -> str | None:
    """Why the kernels do not serve these shapes; None where they do."""
    _, _, heads, page_size, head_dim = pages.shape
    itemsize = jnp.dtype(pages.dtype).itemsize
    if head_dim % LANES:
        return f"head_dim {head_dim} is not a multiple of {LANES}"
    if page_size % sublanes(pages.dtype):
        return (
            f"page_size {page_size} is not a multiple of {sublanes(pages.dtype)}, the rows of a tile of {pages.dtype}"
        )
    if STAGES * 2 * heads * page_size * head_dim * itemsize > VMEM_BYTES:
        return f"{STAGES} pages of {heads} KV heads, {page_size} tokens and {head_dim} dimensions do not fit into VMEM"
    if block_tables.size * 4 > SMEM_BYTES:
        rows, width = block_tables.shape
        return f"block tables of {rows} rows and {width} pages do not fit into SMEM"
    return None


def attention_pallas(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    page_offset: int | jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    sliding_window: int | jax.Array | None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `ragged_paged_attention`, for rows of one token before rows of more."""
    table_width, num_tokens = block_tables.shape[1], q.shape[0]
    lengths = query_start_loc[1:] - query_start_loc[:-1]
    num_decodes = (lengths == 1).sum(dtype=jnp.int32)
    window = jnp.asarray(NO_WINDOW if sliding_window is None else sliding_window, jnp.int32)
    window = jnp.where(window > 0, window, NO_WINDOW)
    scalars = jnp.stack([num_decodes, (lengths > 0).sum(dtype=jnp.int32), jnp.asarray(page_offset, jnp.int32), window])
    decoded, pages = decode_rows(
        q, k, v, pages, block_tables, seq_lens, scalars,
        scale=scale, soft_cap=soft_cap, config=decode_config(pages, table_width), interpret=interpret,
    )  # fmt: skip

    def head_major(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, -num_tokens % sublanes(x.dtype)), (0, 0), (0, 0))).transpose(1, 0, 2)

    pages = write_rows(
        head_major(k), head_major(v), pages, block_tables, seq_lens, query_start_loc, scalars, interpret=interpret
    )
    attended = attend_rows(
        head_major(q), pages, block_tables, seq_lens, query_start_loc, scalars,
        scale=scale, soft_cap=soft_cap, config=prefill_config(pages, table_width, q.shape[1]), interpret=interpret,
    )  # fmt: skip
    token = jnp.arange(num_tokens, dtype=jnp.int32)[:, None, None]
    prefilled = (token >= num_decodes) & (token < query_start_loc[-1])
    return jnp.where(prefilled, attended.transpose(1, 0, 2)[:num_tokens], decoded), pages
