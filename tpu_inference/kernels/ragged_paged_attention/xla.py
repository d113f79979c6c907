# SPDX-License-Identifier: Apache-2.0
"""The op in plain XLA, whose cost follows the true lengths: loops with run-time trip counts over pieces of work.

Rows of one token (decodes) share a work list of (row, chunk of context): DECODE_ITEMS of them an iteration, however lengths differ.
Rows of more tokens (prefills) go by tiles of QUERY_TILE tokens, each over the chunks it can see.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tpu_inference.kernels.ragged_paged_attention.pages import decode, from_planes

MIN_CHUNK = 128
"""Keys handled at once, at least: whole pages."""
QUERY_TILE = 64
DECODE_ITEMS = 32
MASKED = -1e30


@dataclass(frozen=True)
class _Context:
    """The paged context of all rows, and how scores are made of it."""

    pages: jax.Array
    block_tables: jax.Array
    page_offset: int | jax.Array
    scale: float
    soft_cap: float | None
    sliding_window: int | jax.Array | None
    head_dim: int
    sinks: jax.Array
    """float32 [K, G]: what the softmax of a head starts from; MASKED for nothing."""
    shared: bool
    """V is K."""

    @property
    def page_size(self) -> int:
        return self.pages.shape[3]

    @property
    def pages_per_chunk(self) -> int:
        return min(-(-MIN_CHUNK // self.page_size), self.block_tables.shape[1])

    @property
    def chunk(self) -> int:
        return self.pages_per_chunk * self.page_size

    def first_key(self, positions: jax.Array) -> jax.Array:
        """The earliest key that a query at `positions` sees."""
        if self.sliding_window is None:
            return jnp.zeros_like(positions)
        window = jnp.asarray(self.sliding_window, jnp.int32)
        return jnp.where(window > 0, jnp.maximum(positions - window + 1, 0), 0)

    def read(self, rows: jax.Array, chunks: jax.Array) -> tuple[jax.Array, jax.Array]:
        """K and V, float32 [N, num_kv_heads, chunk, head_dim], of chunk `chunks` [N] of `rows` [N]."""
        n, per = rows.shape[0], self.pages_per_chunk
        index = chunks[:, None] * per + jnp.arange(per)
        # Past the table's end only masked keys are read.
        ids = self.block_tables[rows[:, None], jnp.minimum(index, self.block_tables.shape[1] - 1)]
        kv = self.pages[ids + self.page_offset]
        kv = kv.transpose(2, 0, 3, 1, 4, 5).reshape(kv.shape[2], n, kv.shape[3], self.chunk, kv.shape[5])
        k, v = (kv[0, ..., : self.head_dim],) * 2 if self.shared else from_planes(kv, self.head_dim)
        return decode(k), decode(v)

    def partial_softmax(self, q, k, v, positions, chunks):
        """One chunk's part of the softmax.

        Args:
            q: float32 [N, K, M, D], M = query heads of a KV head x tokens; `positions` [N, M] their positions.
            k, v: float32 [N, K, C, D], chunk `chunks` [N] of each.

        Returns:
            (maximum [N, K, M], sum of weights [N, K, M], weighted values [N, K, M, D]).
        """
        precision = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("nkmd,nkcd->nkmc", q, k, precision=precision) * self.scale
        if self.soft_cap is not None:
            scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
        keys = (chunks[:, None] * self.chunk + jnp.arange(self.chunk))[:, None, :]
        last, first = positions[..., None], self.first_key(positions)[..., None]
        visible = ((keys <= last) & (keys >= first))[:, None]
        scores = jnp.where(visible, scores, MASKED)
        top = scores.max(-1)
        weights = jnp.where(visible, jnp.exp(scores - top[..., None]), 0)
        return top, weights.sum(-1), jnp.einsum("nkmc,nkcd->nkmd", weights, v, precision=precision)


def _decode(ctx: _Context, q: jax.Array, positions: jax.Array, active: jax.Array) -> jax.Array:
    """q: float32 [R, K, G, D], one token a row, of the rows that are `active` [R]. Returns the same shape."""
    num_rows, heads = q.shape[0], q.shape[1:3]
    first = ctx.first_key(positions) // ctx.chunk
    counts = jnp.where(active, positions // ctx.chunk + 1 - first, 0)
    ends = jnp.cumsum(counts)
    items = min(DECODE_ITEMS, max(num_rows, 4))

    def step(i, carry):
        top, total, out = carry
        item = i * items + jnp.arange(items, dtype=jnp.int32)
        rows = jnp.minimum(jnp.searchsorted(ends, item, side="right"), num_rows - 1).astype(jnp.int32)
        real = item < ends[-1]
        chunks = jnp.where(real, first[rows] + item - (ends[rows] - counts[rows]), 0)
        k, v = ctx.read(rows, chunks)
        at = jnp.where(real, positions[rows], -1)  # -1 sees nothing
        part_top, part_total, part_out = ctx.partial_softmax(
            q[rows], k, v, jnp.broadcast_to(at[:, None], (items, heads[1])), chunks
        )
        belongs = (rows[None] == jnp.arange(num_rows)[:, None]) & real[None]  # [R, N]
        new_top = jnp.maximum(top, jnp.where(belongs[..., None, None], part_top[None], MASKED).max(1))
        shrink = jnp.exp(top - new_top)
        # Items of one row meet here as a small matrix product; a scatter would be a loop.
        share = jnp.exp(part_top - new_top[rows])
        gather = belongs.astype(jnp.float32)
        total = total * shrink + jnp.einsum("rn,nkg->rkg", gather, part_total * share)
        out = out * shrink[..., None] + jnp.einsum("rn,nkgd->rkgd", gather, part_out * share[..., None])
        return new_top, total, out

    top = jnp.broadcast_to(ctx.sinks, (num_rows, *heads))
    carry = (top, jnp.ones((num_rows, *heads)), jnp.zeros(q.shape, jnp.float32))
    _, total, out = jax.lax.fori_loop(0, -(-ends[-1] // items), step, carry)
    return out / jnp.maximum(total, 1e-30)[..., None]


def _prefill(ctx: _Context, q: jax.Array, out: jax.Array, seq_lens: jax.Array, query_start_loc: jax.Array) -> jax.Array:
    """Rows of more than one token. q, out: float32 [T, K, G, D]; returns `out` with their tokens filled in."""
    num_tokens, num_kv_heads, group, head_dim = q.shape
    tile = min(QUERY_TILE, num_tokens)
    lens = query_start_loc[1:] - query_start_loc[:-1]
    tiles = jnp.where(lens > 1, -(-lens // tile), 0)
    ends = jnp.cumsum(tiles)

    def one_tile(i, out):
        row = jnp.minimum(jnp.searchsorted(ends, i, side="right"), lens.shape[0] - 1).astype(jnp.int32)
        begin = query_start_loc[row] + (i - (ends[row] - tiles[row])) * tile
        stop = query_start_loc[row + 1]
        # A tile that would pass the end of the array starts earlier; tokens outside begin:stop are left alone.
        start = jnp.minimum(begin, num_tokens - tile)
        tokens = start + jnp.arange(tile, dtype=jnp.int32)
        mine = (tokens >= begin) & (tokens < stop)
        positions = jnp.where(mine, seq_lens[row] - stop + tokens, -1)
        part = jax.lax.dynamic_slice_in_dim(q, start, tile)
        part = part.transpose(1, 2, 0, 3).reshape(1, num_kv_heads, group * tile, head_dim)
        flat_positions = jnp.tile(positions, group)[None]
        rows = row[None]

        def one_chunk(c, carry):
            top, total, acc = carry
            chunks = jnp.full((1,), c, jnp.int32)
            k, v = ctx.read(rows, chunks)
            part_top, part_total, part_acc = ctx.partial_softmax(part, k, v, flat_positions, chunks)
            new_top = jnp.maximum(top, part_top)
            old, new = jnp.exp(top - new_top), jnp.exp(part_top - new_top)
            return new_top, total * old + part_total * new, acc * old[..., None] + part_acc * new[..., None]

        low = ctx.first_key(seq_lens[row] - stop + begin) // ctx.chunk
        high = positions.max() // ctx.chunk + 1
        shape = part.shape[:-1]
        sinks = jnp.repeat(ctx.sinks, tile, axis=1)[None]
        carry = (sinks, jnp.ones(shape), jnp.zeros(part.shape, jnp.float32))
        _, total, acc = jax.lax.fori_loop(low, high, one_chunk, carry)
        acc = (acc / jnp.maximum(total, 1e-30)[..., None]).reshape(num_kv_heads, group, tile, head_dim)
        before = jax.lax.dynamic_slice_in_dim(out, start, tile)
        after = jnp.where(mine[:, None, None, None], acc.transpose(2, 0, 1, 3), before)
        return jax.lax.dynamic_update_slice_in_dim(out, after, start, 0)

    return jax.lax.fori_loop(0, ends[-1], one_tile, out)


def attend_xla(
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
    shared: bool = False,
) -> jax.Array:
    """Attention over pages already written; arguments as in `api.ragged_paged_attention`. float32 [T, num_heads, head_dim].

    `shared`: pages of one plane hold K, which is V too.
    """
    num_tokens, num_heads, head_dim = q.shape
    grouped = q.astype(jnp.float32).reshape(num_tokens, pages.shape[2], -1, head_dim)
    start = (
        jnp.full(grouped.shape[1:3], MASKED) if sinks is None else sinks.astype(jnp.float32).reshape(grouped.shape[1:3])
    )
    ctx = _Context(pages, block_tables, page_offset, scale, soft_cap, sliding_window, head_dim, start, shared)
    single = (query_start_loc[1:] - query_start_loc[:-1]) == 1
    token = jnp.minimum(query_start_loc[:-1], num_tokens - 1)
    decoded = _decode(ctx, grouped[token], seq_lens - 1, single)
    # Rows of other lengths write nothing: their token is out of range.
    target = jnp.where(single, token, num_tokens)
    out = jnp.zeros(grouped.shape, jnp.float32).at[target].set(decoded, mode="drop")
    if num_tokens > 1:
        out = _prefill(ctx, grouped, out, seq_lens, query_start_loc)
    return out.reshape(num_tokens, num_heads, head_dim)
