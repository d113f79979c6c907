# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel of rows with several tokens: attends over pages that hold them.

Tokens go in blocks at multiples of `block_tokens`, whatever rows they belong to: a block visits every row it has tokens of, one KV head at a time,
and a mask keeps each token to its own row. Queries and outputs are [tokens, heads x width], as projections have them.

Scores are transposed: keys along sublanes, queries along lanes. The maximum over keys is then a tree of plain vector maxima, and both products give
the matrix units their full width. Scores of a few tiles are under way before the softmax of the first, in one stretch of code as long as the
chunk, since the compiler's scheduler does not look beyond it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.ragged_paged_attention.config import PrefillConfig
from tpu_inference.kernels.ragged_paged_attention.paged import (
    LANES,
    MASKED,
    PagedShape,
    page_starts,
    pieces_between,
    wait_for_pages,
)

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


def q_factor(scale: float) -> float:
    """What queries are multiplied by: scores are powers of two, which saves a multiplication for each."""
    return scale * LOG2_E


SUBLANES = 8
"""Rows of a register."""


@dataclass
class Item:
    """A chunk of a row's context, for one KV head and the tokens that a block has of the row."""

    block: Any
    head: Any
    row: Any
    chunk: Any
    begin: Any
    """Tokens begin:end are the row's in the block."""
    end: Any
    shift: Any
    """Position of token t: t + shift."""
    last: Any
    valid: Any


def _by_rows(x: jax.Array) -> jax.Array:
    """[rows, N] as registers of eight rows."""
    return x.reshape(-1, SUBLANES, x.shape[1])


class Prefill:
    """The kernel's body, in stages; one instance a trace. Latent attention has its own layout of queries and outputs."""

    def __init__(self, shape: PagedShape, refs: dict[str, Any]) -> None:
        self.shape, self.config = shape, shape.config
        self.chunk_tokens = self.config.pages_per_chunk * shape.page_size
        self.queries = shape.group * self.config.block_tokens
        self.__dict__.update(refs)
        self.num_decodes, self.num_rows, self.page_offset, self.window = (self.scalars[i] for i in range(4))

    # The list of items: blocks, of each the KV heads, of each the rows, of each the chunks.

    def at(self, block: Any, head: Any, row: Any, chunk: Any) -> Item:
        """The item at `chunk`, or at the first one of block, head and row where that is -1."""
        shape, size = self.shape, self.config.block_tokens
        row_in = jnp.minimum(row, shape.num_rows - 1)
        start, stop = self.starts[row_in], self.starts[row_in + 1]
        begin, end = jnp.maximum(start, block * size), jnp.minimum(stop, (block + 1) * size)
        shift = self.seq_lens[row_in] - stop
        first = jax.lax.div(jnp.maximum(begin + shift - self.window + 1, 0), self.chunk_tokens)
        last = jax.lax.div(jnp.maximum(end - 1 + shift, 0), self.chunk_tokens)
        chunk = jnp.where(chunk < 0, first, chunk)
        return Item(block, head, row, chunk, begin, end, shift, last, row < self.num_rows)

    def _next_row(self, item: Item) -> tuple[Any, Any]:
        """(whether the block ends with the item's row, the first row of the block after it)."""
        row_in = jnp.minimum(item.row, self.shape.num_rows - 1)
        stop, limit = self.starts[row_in + 1], (item.block + 1) * self.config.block_tokens
        return (stop >= limit) | (item.row + 1 >= self.num_rows), jnp.where(stop > limit, item.row, item.row + 1)

    def ends_head(self, item: Item) -> Any:
        """Whether the item is the last of its block and head."""
        return (item.chunk >= item.last) & self._next_row(item)[0]

    def after(self, item: Item, first_row: Any) -> tuple[Any, Any, Any, Any, Any]:
        """(block, head, row, chunk) of the next item, and the first row of its block; `first_row` is that of the item's."""
        row_ends = item.chunk >= item.last
        block_ends, next_row = self._next_row(item)
        head_ends = row_ends & block_ends
        last_head = item.head + 1 >= self.shape.num_kv_heads
        next_block = head_ends & last_head
        # A row that ends with the block: the next one starts in the next block, or later.
        block = jnp.where(next_block, item.block + 1, item.block)
        head = jnp.where(head_ends, jnp.where(last_head, 0, item.head + 1), item.head)
        first = jnp.where(next_block, next_row, first_row)
        row = jnp.where(
            next_block, next_row, jnp.where(head_ends, first_row, jnp.where(row_ends, item.row + 1, item.row))
        )
        return block, head, row, jnp.where(row_ends, -1, item.chunk + 1), first

    def _tiles(self, length: int) -> list[pl.Slice]:
        size = self.config.tile
        return [pl.ds(start, min(size, length - start)) for start in range(0, length, size)]

    # DMAs.

    def _pages(self, item: Item, slot: Any) -> tuple[Any, ...]:
        return item.chunk, self.config.pages_per_chunk, jnp.where(item.valid, item.end + item.shift, 0), slot

    def block_of(self, array: Any, block: Any, head: Any) -> Any:
        """The queries of a KV head, [block_tokens, group x width]."""
        size, width = self.config.block_tokens, self.shape.group * self.shape.q_width
        tokens = pl.ds(pl.multiple_of(block * size, size), size)
        return array.at[tokens, pl.ds(pl.multiple_of(head * width, LANES), width)]

    def _lanes(self, g: int) -> pl.Slice:
        """Of a head of the group."""
        return pl.ds(g * self.shape.q_width, self.shape.q_width)

    def queries_of(self, q_slot: Any, q: pl.Slice) -> jax.Array:
        """[queries, q_width] of a tile: of one head of the group, or of all tokens of a few."""
        size = self.config.block_tokens
        parts = []
        for g in range(q.start // size, -(-(q.start + q.size) // size)):
            begin, end = max(q.start - g * size, 0), min(q.start + q.size - g * size, size)
            parts.append(self.q[q_slot, pl.ds(begin, end - begin), self._lanes(g)])
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    def q_copy(self, block: Any, head: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(self.block_of(self.q_in, block, head), self.q.at[slot], self.q_sem.at[slot])

    def out_copy(self, block: Any, head: Any) -> Any:
        return pltpu.make_async_copy(self.out_stage, self.block_of(self.out, block, head), self.out_sem)

    # Arithmetic.

    def _dot(self, x: jax.Array, y: jax.Array, y_axis: int) -> jax.Array:
        contract = (((1,), (y_axis,)), ((), ()))
        return jax.lax.dot_general(x, y, contract, preferred_element_type=jnp.float32, precision=self.shape.precision)

    def begin(self, item: Item, q_slot: Any) -> None:
        """The running softmax of a block's queries of a KV head."""
        shape, size = self.shape, self.config.block_tokens
        for g in range(shape.group):
            sink = self.sinks[pl.ds(item.head * shape.group + g, 1)] * LOG2_E
            lanes = pl.ds(g * size, size)
            self.top[:, lanes] = jnp.broadcast_to(sink[:, :1], (SUBLANES, size))
        # The sum of weights lies below the values: a sink's weight is 1.
        dim = shape.value_dim
        self.acc[:dim] = jnp.zeros((dim, self.queries), jnp.float32)
        self.acc[dim:] = jnp.ones((shape.value_rows - dim, self.queries), jnp.float32)

    def token_of(self, query: jax.Array) -> jax.Array:
        """Of the block, by the number of a query: queries of a head are together."""
        return jax.lax.rem(query, jnp.int32(self.config.block_tokens))

    def find_reach(self, item: Item) -> None:
        """For queries along lanes the last key they see, of the chunk, less the row of the register; nothing for tokens of other rows."""
        tile = (SUBLANES, self.queries)
        token = item.block * self.config.block_tokens + self.token_of(jax.lax.broadcasted_iota(jnp.int32, tile, 1))
        mine = (token >= item.begin) & (token < item.end)
        reach = token + (item.shift - item.chunk * self.chunk_tokens) - jax.lax.broadcasted_iota(jnp.int32, tile, 0)
        self.reach[...] = jnp.where(mine, reach, -(2**30))

    def _transpose_values(self, slot: Any, tokens: int) -> None:
        """V of the chunk's first `tokens`, on its side, over rows of ones: the matrix unit sums the weights."""
        shape = self.shape
        skip = shape.value_lane
        for tile in self._tiles(tokens):
            values = shape.values(self.kv, slot, 0, tile).T
            self.v[: shape.value_dim, tile] = values[skip : skip + shape.value_dim]

    def _score(self, slots: tuple, q: pl.Slice, k: pl.Slice, masked: bool) -> tuple[jax.Array, jax.Array]:
        """(scores [keys, queries] of a tile, the maximum of every eighth row)."""
        shape, (slot, q_slot) = self.shape, slots
        scores = self._dot(shape.keys(self.kv, slot, 0, k), self.queries_of(q_slot, q).astype(shape.compute_dtype), 1)
        if shape.soft_cap is not None:
            scores = (shape.soft_cap * LOG2_E) * jnp.tanh(scores * (LN_2 / shape.soft_cap))
        if masked:
            register = k.start + SUBLANES * jax.lax.broadcasted_iota(jnp.int32, (k.size // SUBLANES, 1, 1), 0)
            reach = self.reach[:, q][None]
            visible = reach >= register
            if self.windowed:
                visible &= reach - self.window < register
            scores = jnp.where(visible, _by_rows(scores), MASKED).reshape(scores.shape)
        return scores, _by_rows(scores).max(axis=0)

    def _accumulate(self, q: pl.Slice, k: pl.Slice, scores: jax.Array, top: jax.Array) -> None:
        """The running softmax of the tile's queries, after its keys; maxima are the same in all eight rows."""
        old = self.top[:, q]
        top = jnp.maximum(old, jnp.broadcast_to(top.max(axis=0, keepdims=True), top.shape))
        # A power of bfloat16 costs v6e and tpu7x half of one of float32, and is rounded to it for the product anyway.
        weights = jnp.exp2((_by_rows(scores) - top).reshape(scores.shape).astype(self.v.dtype))
        out = self._dot(self.v[:, k], weights, 0)
        acc = _by_rows(self.acc[:, q]) * jnp.exp2(old - top) + _by_rows(out)
        self.top[:, q], self.acc[:, q] = top, acc.reshape(out.shape)

    def attend(self, item: Item, slots: tuple, tokens: int, starts: list[Callable[[], None]], *, masked: bool) -> None:
        """The chunk's first `tokens` keys; `starts` are called on the way."""
        self._transpose_values(slots[0], tokens)
        if masked:
            self.find_reach(item)
        # Neighbours are of different queries, and so are independent.
        todo = [(q, k) for k in self._tiles(tokens) for q in self._tiles(self.queries)]
        between = pieces_between(starts, len(todo))
        ahead, scores = self.config.ahead, []
        for step in range(len(todo) + ahead):
            if step < len(todo):
                scores.append(between(partial(self._score, slots, *todo[step], masked)))
            if step >= ahead:
                self._accumulate(*todo[step - ahead], *scores.pop(0))

    def finish(self, item: Item, q_slot: Any) -> None:
        shape, size = self.shape, self.config.block_tokens
        dim = shape.value_dim
        for g in range(shape.group):
            lanes = pl.ds(g * size, size)
            out = self.acc[:dim, lanes] / self.acc[dim : dim + 1, lanes]
            out = (
                jnp.concatenate([out, jnp.zeros((shape.q_width - dim, size), out.dtype)])
                if shape.q_width > dim
                else out
            )
            self.out_stage[:, self._lanes(g)] = out.T.astype(self.out_stage.dtype)
        self.out_copy(item.block, item.head).start()

    # The loop.

    def run(self) -> None:
        shape, size = self.shape, self.config.block_tokens
        self.kv[...] = jnp.zeros_like(self.kv)  # what no DMA fills is read, masked: it must be finite
        ones = shape.value_dim // 16 * 16
        self.v[ones:] = jnp.ones((shape.value_rows - ones, self.chunk_tokens), self.v.dtype)
        row = self.num_decodes
        block = jax.lax.div(self.starts[jnp.minimum(row, shape.num_rows - 1)], size)
        start = (block, jnp.int32(0), row, jnp.int32(-1), row)

        @pl.when(row < self.num_rows)
        def _() -> None:
            self.q_copy(block, 0, 0).start()

        first = self.at(*start[:4])
        for begin in page_starts(self, first.row, *self._pages(first, 0), head=first.head):
            begin()

        def step(carry: tuple) -> tuple:
            place, slot, q_slot, begins, out_busy = carry
            item = self.at(*place[:4])
            following = self.after(item, place[4])
            coming, ends = self.at(*following[:4]), self.ends_head(item)

            @pl.when(begins)
            def _() -> None:
                self.q_copy(item.block, item.head, q_slot).wait()
                self.begin(item, q_slot)

            @pl.when(ends & coming.valid)
            def _() -> None:
                self.q_copy(coming.block, coming.head, 1 - q_slot).start()

            wait_for_pages(self, *self._pages(item, slot))
            self._attend_as_needed(item, (slot, q_slot), coming)

            @pl.when(ends)
            def _() -> None:
                pl.when(out_busy)(self.out_copy(0, 0).wait)
                self.finish(item, q_slot)

            return following, 1 - slot, jnp.where(ends, 1 - q_slot, q_slot), ends, out_busy | ends

        carry = (start, jnp.int32(0), jnp.int32(0), jnp.bool_(True), jnp.bool_(False))
        carry = jax.lax.while_loop(lambda carry: carry[0][2] < self.num_rows, step, carry)
        pl.when(carry[4])(self.out_copy(0, 0).wait)

    def _attend_as_needed(self, item: Item, slots: tuple, coming: Item) -> None:
        """One of a few bodies: as many tiles of keys as are seen, masked where they may not be seen by all."""
        starts = page_starts(self, coming.row, *self._pages(coming, 1 - slots[0]), head=coming.head)
        size, keys = self.config.block_tokens, self.chunk_tokens
        alone = (item.begin == item.block * size) & (item.end == item.begin + size)
        seen = item.end + item.shift - item.chunk * keys  # by the last token
        all_see = alone & (seen - size + 1 >= keys)
        if self.windowed:
            all_see &= seen - 1 - self.window < 0

        def body(when: Any, tokens: int, *, masked: bool) -> None:
            pl.when(when)(lambda: self.attend(item, slots, tokens, list(starts), masked=masked))

        body(all_see, keys, masked=False)
        for tile in self._tiles(keys):
            stop = tile.start + tile.size
            here = (seen > tile.start) & ((seen <= stop) | (stop == keys))
            body(~all_see & here, stop, masked=True)


NAMES = (
    "scalars", "seq_lens", "starts", "tables", "q_in", "sinks", "pages", "out",
    "kv", "q", "out_stage", "v", "reach", "top", "acc", "kv_sem", "q_sem", "out_sem",
)  # fmt: skip


def attend_rows(
    q: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    scalars: jax.Array,
    sinks: jax.Array,
    *,
    num_heads: int,
    head_dim: int,
    soft_cap: float | None,
    windowed: bool,
    config: PrefillConfig,
    latent: int | None = None,
    head_blocks: int = 1,
    interpret: Any = False,
) -> jax.Array:
    """Attention of rows scalars[0]:scalars[1] over pages that hold their tokens.

    Args:
        q: [T, num_heads * q_width], T a multiple of the block, times `q_factor`; lanes of a head from head_dim on are 0.
        scalars: int32 [4]: rows of one token, rows with tokens, page offset, sliding window (NO_WINDOW for none).
        sinks: float32 [num_heads, LANES], the same in every lane; FLOOR for none.
        windowed: whether the window may be one.
        latent: lanes of K that are V, where pages hold one latent a token, which `head_blocks` groups of heads visit one by one; else None.

    Returns:
        [T, num_heads * q_width]; the first head_dim lanes of a head are defined at the tokens of those rows.
    """
    shape = PagedShape.of(num_heads, head_dim, q.dtype, pages, block_tables, soft_cap, config, latent, head_blocks)
    chunk_tokens = config.pages_per_chunk * shape.page_size
    block, queries = (config.block_tokens, shape.group * shape.q_width), shape.group * config.block_tokens

    def body(*refs: Any) -> None:
        Prefill(shape, {**dict(zip(NAMES, refs, strict=True)), "windowed": windowed}).run()

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(),
            in_specs=[hbm, pl.BlockSpec(memory_space=pltpu.VMEM), hbm],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((2, shape.planes, 1, chunk_tokens, shape.width), pages.dtype),
                pltpu.VMEM((2, *block), q.dtype),
                pltpu.VMEM(block, q.dtype),
                pltpu.VMEM((shape.value_rows, chunk_tokens), shape.compute_dtype),
                pltpu.VMEM((SUBLANES, queries), jnp.int32),
                pltpu.VMEM((SUBLANES, queries), jnp.float32),
                pltpu.VMEM((shape.value_rows, queries), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name="paged_prefill",
        interpret=interpret,
    )(scalars, seq_lens, query_start_loc, block_tables.reshape(-1), q, sinks, pages)
