# SPDX-License-Identifier: Apache-2.0
"""One step's ragged batch as attention sees it."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from tpu_inference.errors import TpuInferenceError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMetadata:
    """T tokens of R request rows, flattened row by row; G groups of layers that share a block table.

    Rows without tokens come last, with `seq_lens` 0 and a flat `query_start_loc`. Tokens from `query_start_loc[R]` on are padding.
    """

    positions: jax.Array
    """int32 [T]: position of each token in its request (0 for padding)."""
    query_start_loc: jax.Array
    """int32 [R + 1]: row r owns tokens query_start_loc[r]:query_start_loc[r + 1]."""
    seq_lens: jax.Array
    """int32 [R]: tokens of the request up to and including this step's."""
    block_tables: jax.Array
    """int32 [G, R, B]: ids of the KV cache blocks of each row, per KV cache group."""


def check_chunk(chunk: int, page_size: int) -> None:
    """Raises TpuInferenceError where chunks of local attention are not whole pages."""
    if chunk % page_size:
        raise TpuInferenceError(
            f"The model attends in chunks of {chunk} tokens, which are not whole blocks of {page_size}: use a --block-size that divides {chunk}."
        )


def in_chunks(meta: AttentionMetadata, chunk: int, page_size: int) -> tuple[AttentionMetadata, AttentionMetadata]:
    """(`meta`, the same for attention within chunks), with as many rows each.

    A row of the second is what one row of `meta` has of one chunk of `chunk` tokens, and begins where the chunk does: a token sees its chunk up to
    itself, and writes to the page that it always would.

    Raises:
        TpuInferenceError: `chunk` is not a multiple of `page_size`.
    """
    check_chunk(chunk, page_size)
    num_tokens, num_rows = len(meta.positions), len(meta.seq_lens)
    first_token, last_token = meta.query_start_loc[:-1], meta.query_start_loc[1:]
    begins = meta.seq_lens - (last_token - first_token)
    first = begins // chunk
    counts = jnp.where(last_token > first_token, (meta.seq_lens - 1) // chunk - first + 1, 0)
    ends = jnp.cumsum(counts)
    # A row of n tokens has at most two parts, and one more for every `chunk` of them.
    parts = jnp.arange(min(num_tokens, 2 * num_rows + num_tokens // chunk), dtype=jnp.int32)
    row = jnp.minimum((ends[None] <= parts[:, None]).sum(1), num_rows - 1)
    start = (first[row] + parts - (ends - counts)[row]) * chunk
    stop = jnp.minimum(start + chunk, meta.seq_lens[row])
    real = parts < ends[-1]
    last = jnp.where(real, first_token[row] + stop - begins[row], last_token[-1])
    pages = jnp.arange(meta.block_tables.shape[2], dtype=jnp.int32) + start[:, None] // page_size
    tables = jnp.take_along_axis(meta.block_tables[:, row], jnp.minimum(pages, pages.shape[1] - 1)[None], axis=2)
    local = replace(
        meta,
        query_start_loc=jnp.concatenate([meta.query_start_loc[:1], last]),
        seq_lens=jnp.where(real, stop - start, 0),
        block_tables=tables,
    )
    return _with_rows(meta, len(parts)), local


def _with_rows(meta: AttentionMetadata, count: int) -> AttentionMetadata:
    """`count` rows, of which those that are new, or left out, are without tokens."""
    num_rows = len(meta.seq_lens)
    more = max(count - num_rows, 0)
    last = jnp.broadcast_to(meta.query_start_loc[-1:], (more,))
    return replace(
        meta,
        query_start_loc=jnp.concatenate([meta.query_start_loc, last])[: count + 1],
        seq_lens=jnp.pad(meta.seq_lens, (0, more))[:count],
        block_tables=jnp.pad(meta.block_tables, ((0, 0), (0, more), (0, 0)))[:, :count],
    )
