# SPDX-License-Identifier: Apache-2.0
"""The op on TPU: rows of one token by one Pallas kernel, rows of more by two."""

from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.ragged_paged_attention.config import MIN_SLOTS, VMEM_BYTES, Config
from tpu_inference.kernels.ragged_paged_attention.decode import decode_rows, words
from tpu_inference.kernels.ragged_paged_attention.paged import FLOOR, NO_WINDOW, sublanes
from tpu_inference.kernels.ragged_paged_attention.pages import LANES, to_planes
from tpu_inference.kernels.ragged_paged_attention.prefill import attend_rows, q_factor
from tpu_inference.kernels.ragged_paged_attention.write import write_rows

SMEM_BYTES = 3 * 2**18
"""Of the 1 MiB where block tables lie while a kernel runs."""


def misfit(pages: Any, block_tables: Any) -> str | None:
    """Why the kernels do not serve these shapes; None where they do."""
    _, planes, heads, page_size, width = pages.shape
    if width % LANES:
        return f"K and V of {width} dimensions are planes of their own, as no TPU keeps them"
    if page_size % sublanes(pages.dtype):
        return (
            f"page_size {page_size} is not a multiple of {sublanes(pages.dtype)}, the rows of a tile of {pages.dtype}"
        )
    if MIN_SLOTS * planes * heads * page_size * width * pages.dtype.itemsize > VMEM_BYTES:
        return f"{MIN_SLOTS} pages of {heads} KV heads, {page_size} tokens and {width * planes} numbers of each do not fit into VMEM"
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
    sinks: jax.Array | None,
    config: Config,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `ragged_paged_attention`, for rows of one token before rows of more."""
    num_heads = q.shape[1]
    window = jnp.asarray(NO_WINDOW if sliding_window is None else sliding_window, jnp.int32)
    start = jnp.full(num_heads, FLOOR) if sinks is None else jnp.maximum(sinks.astype(jnp.float32), FLOOR)
    out, pages = write_and_attend(
        q, to_planes(k, v, pages), pages, block_tables, seq_lens, query_start_loc, page_offset,
        jnp.where(window > 0, window, NO_WINDOW), jnp.broadcast_to(start[:, None], (num_heads, LANES)),
        scale=scale, soft_cap=soft_cap, windowed=sliding_window is not None, config=config, interpret=interpret,
    )  # fmt: skip
    return out[..., : q.shape[2]], pages


def write_and_attend(
    q: jax.Array,
    new: tuple[jax.Array, ...],
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    page_offset: int | jax.Array,
    window: int | jax.Array,
    start: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    windowed: bool,
    config: Any,
    latent: int | None = None,
    head_blocks: int = 1,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The three kernels.

    Args:
        q: [T, num_heads, head_dim].
        new: [T, num_kv_heads, width], what each plane of `pages` gets.
        window: sliding window, NO_WINDOW for none; `windowed`: whether it may be one.
        start: float32 [num_heads, LANES], what the softmax of a head starts from.
        config: has `decode`, a DecodeConfig, and `prefill`, a PrefillConfig.
        latent, head_blocks: as `attend_rows` takes them.

    Returns:
        ([T, num_heads, head_dim in whole lanes], the updated pages).
    """
    table_width, (num_tokens, num_heads, head_dim) = block_tables.shape[1], q.shape
    lengths = query_start_loc[1:] - query_start_loc[:-1]
    # Those at the front: what is left of a prompt in a chunk of local attention may be one token too.
    num_decodes = (jnp.cumsum(lengths != 1) == 0).sum(dtype=jnp.int32)
    scalars = jnp.stack([
        num_decodes, (lengths > 0).sum(dtype=jnp.int32), jnp.asarray(page_offset, jnp.int32), jnp.asarray(window, jnp.int32)
    ])  # fmt: skip
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -head_dim % LANES)))
    options = dict(head_dim=head_dim, soft_cap=soft_cap, latent=latent, interpret=interpret)
    # Rows of one token come first: of each the token is the row's number.
    first = min(num_tokens, block_tables.shape[0])
    decoded, pages = decode_rows(
        q[:first], tuple(words(x[:first], pages.dtype) for x in new), pages, block_tables, seq_lens, scalars, start,
        scale=scale, config=config.decode.within(table_width), **options,
    )  # fmt: skip
    blocks = config.prefill.within(table_width, num_tokens)
    padding = -num_tokens % max(blocks.block_tokens, sublanes(pages.dtype))

    def flat(x: jax.Array) -> jax.Array:
        return jnp.pad(x.reshape(num_tokens, -1), ((0, padding), (0, 0)))

    tables = (block_tables, seq_lens, query_start_loc, scalars)
    pages = write_rows(tuple(flat(x.astype(pages.dtype)) for x in new), pages, *tables, interpret=interpret)
    scaled = (q.astype(jnp.float32) * q_factor(scale)).astype(q.dtype)
    attended = attend_rows(
        flat(scaled), pages, *tables, start,
        num_heads=num_heads, windowed=windowed, config=blocks, head_blocks=head_blocks, **options,
    )[:num_tokens]  # fmt: skip
    token = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    attended = jnp.where(token < query_start_loc[-1], attended, 0)  # nobody wrote what no row owns
    decoded = jnp.where(token[:first] < num_decodes, decoded.reshape(first, -1), attended[:first])
    return jax.lax.dynamic_update_slice_in_dim(attended, decoded, 0, 0).reshape(num_tokens, num_heads, -1), pages
