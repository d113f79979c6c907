# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernels of rows with several tokens: one writes their K and V into pages, one attends over the pages.

Arrays are head-major, so that a head's tokens are a matrix of their own. Tokens go in blocks at multiples of `block_tokens`, whatever rows they
belong to: a block visits every row it has tokens of, and a mask keeps each token to its own row.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.ragged_paged_attention.paged import (
    LANES,
    MASKED,
    PagedShape,
    page_starts,
    sublanes,
    wait_for_pages,
)

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


@dataclass(frozen=True)
class PrefillConfig:
    """How the kernel is blocked."""

    block_tokens: int
    """Tokens of a block of queries."""
    pages_per_chunk: int


def _lanes(x: jax.Array, width: int) -> jax.Array:
    """`x` [N, LANES], the same in every lane, as [N, width]."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


# ----------------------------------------------------------------------------------------------------- writing K and V


@dataclass(frozen=True)
class _WriteShape:
    num_rows: int
    table_width: int
    page_size: int
    num_tokens: int
    dtype: Any

    @property
    def window(self) -> int:
        """Tokens read for a page: those of the page, from the tile that its first one is in."""
        return self.page_size + sublanes(self.dtype)

    @property
    def read(self) -> int:
        return min(self.window, self.num_tokens)


def _write_kernel(
    shape: _WriteShape, new_in, scalars, seq_lens, starts, tables, pages_in, pages, new, page, sems
) -> None:
    """One touched page after the other: old content, new tokens over it, back. `new_in`: a plane's tokens each, [num_kv_heads, T, width]."""
    num_decodes, num_rows, page_offset, _ = (scalars[i] for i in range(4))
    size, tile = shape.page_size, sublanes(shape.dtype)
    position = jax.lax.broadcasted_iota(jnp.int32, (size, page.shape[-1]), 0)

    def row(r: Any, carry: None) -> None:
        start, stop, seq_len = starts[r], starts[r + 1], seq_lens[r]
        before = seq_len - (stop - start)

        def write(index: Any, carry: None) -> None:
            where = pages.at[tables[r * shape.table_width + index] + page_offset]
            token = start + index * size - before  # of the page's first position; perhaps another row's, or below 0
            base = jnp.clip(token, 0, shape.num_tokens - shape.read)
            base = pl.multiple_of(jax.lax.div(base, tile) * tile, tile)
            copies = [pltpu.make_async_copy(where, page, sems.at[0])]
            copies += [
                pltpu.make_async_copy(x.at[:, pl.ds(base, shape.read)], new.at[i, :, pl.ds(0, shape.read)], sems.at[1])
                for i, x in enumerate(new_in)
            ]
            for copy in copies:
                copy.start()
            for copy in copies:
                copy.wait()
            # The page's first token to the front; the amount may not be negative.
            turn = jnp.where(token > base, shape.window, 0) - (token - base)
            mine = (position + index * size >= before) & (position + index * size < seq_len)
            for i in range(len(new_in)):
                for head in range(page.shape[1]):
                    rows = pltpu.roll(new[i, head].astype(jnp.float32), turn, 0)[:size]
                    page[i, head] = jnp.where(mine, rows, page[i, head].astype(jnp.float32)).astype(page.dtype)
            back = pltpu.make_async_copy(page, where, sems.at[0])
            back.start()
            back.wait()

        jax.lax.fori_loop(jax.lax.div(before, size), jax.lax.div(seq_len - 1, size) + 1, write, None)

    jax.lax.fori_loop(num_decodes, num_rows, row, None)


# ----------------------------------------------------------------------------------------------------------- attention


@dataclass
class _Item:
    """A chunk of a row's context, for the tokens that a block has of the row."""

    block: Any
    row: Any
    chunk: Any
    begin: Any
    """Tokens begin:end are the row's in the block."""
    end: Any
    shift: Any
    """Position of token t: t + shift."""
    last: Any
    valid: Any


class _Prefill:
    """The kernel's body, in stages; one instance a trace."""

    def __init__(self, shape: PagedShape, refs: dict[str, Any]) -> None:
        self.shape, self.config = shape, shape.config
        self.chunk_tokens = self.config.pages_per_chunk * shape.page_size
        self.__dict__.update(refs)
        self.num_decodes, self.num_rows, self.page_offset, self.window = (self.scalars[i] for i in range(4))

    def at(self, block: Any, row: Any, chunk: Any) -> _Item:
        """The item at `chunk`, or at the pair's first one where that is -1."""
        shape, size = self.shape, self.config.block_tokens
        row_in = jnp.minimum(row, shape.num_rows - 1)
        start, stop = self.starts[row_in], self.starts[row_in + 1]
        begin, end = jnp.maximum(start, block * size), jnp.minimum(stop, (block + 1) * size)
        shift = self.seq_lens[row_in] - stop
        first = jax.lax.div(jnp.maximum(begin + shift - self.window + 1, 0), self.chunk_tokens)
        last = jax.lax.div(jnp.maximum(end - 1 + shift, 0), self.chunk_tokens)
        chunk = jnp.where(chunk < 0, first, chunk)
        return _Item(block, row, chunk, begin, end, shift, last, row < self.num_rows)

    def ends_pair(self, item: _Item) -> Any:
        return item.chunk >= item.last

    def ends_block(self, item: _Item) -> Any:
        """Whether no later row has tokens in the block."""
        row_in = jnp.minimum(item.row, self.shape.num_rows - 1)
        limit = (item.block + 1) * self.config.block_tokens
        return self.ends_pair(item) & ((self.starts[row_in + 1] >= limit) | (item.row + 1 >= self.num_rows))

    def after(self, item: _Item) -> tuple[Any, Any, Any]:
        """(block, row, chunk) of the next item."""
        row_in = jnp.minimum(item.row, self.shape.num_rows - 1)
        stop, limit = self.starts[row_in + 1], (item.block + 1) * self.config.block_tokens
        pair = self.ends_pair(item)
        row = jnp.where(pair & (stop <= limit), item.row + 1, item.row)
        # A row that ends with the block: the next one starts in the next block.
        block = jnp.where(pair & (stop >= limit), item.block + 1, item.block)
        return block, row, jnp.where(pair, -1, item.chunk + 1)

    # DMAs.

    def _pages(self, item: _Item, slot: Any) -> tuple[Any, ...]:
        return item.chunk, self.config.pages_per_chunk, jnp.where(item.valid, item.end + item.shift, 0), slot

    def _block(self, block: Any) -> Any:
        size = self.config.block_tokens
        return pl.ds(pl.multiple_of(block * size, size), size)

    def _q_copy(self, block: Any) -> Any:
        return pltpu.make_async_copy(self.q_in.at[:, self._block(block)], self.q, self.q_sem)

    def _out_copy(self, block: Any) -> Any:
        return pltpu.make_async_copy(self.out_stage, self.out.at[:, self._block(block)], self.out_sem)

    def fetch(self, item: _Item, slot: Any) -> None:
        for start in page_starts(self, item.row, *self._pages(item, slot)):
            start()

    def arrive(self, item: _Item, slot: Any) -> None:
        wait_for_pages(self, *self._pages(item, slot))

    # Arithmetic.

    def attend(self, item: _Item, slot: Any, *, masked: bool) -> None:
        """Every head's running softmax, after an item; unmasked where each token sees every key of it."""
        shape, size = self.shape, self.config.block_tokens
        keys = self.chunk_tokens
        dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=shape.precision)
        if masked:
            # The same for every head and every query head of a group.
            token = item.block * size + jax.lax.broadcasted_iota(jnp.int32, (size, keys), 0)
            key = item.chunk * keys + jax.lax.broadcasted_iota(jnp.int32, (size, keys), 1)
            position = token + item.shift
            visible = (key <= position) & (key > position - self.window) & (token >= item.begin) & (token < item.end)
            bias = jnp.where(visible, 0.0, MASKED)

        ones = jnp.ones((keys, LANES), shape.compute_dtype)

        def head(h: Any, carry: None) -> None:
            kv_head = jax.lax.div(h, shape.group)
            scores = dot(self.q[h], shape.keys(self.kv, slot, kv_head), (((1,), (1,)), ((), ())))
            if shape.soft_cap is not None:
                scores = (shape.soft_cap * LOG2_E) * jnp.tanh(scores * (LN_2 / shape.soft_cap))
            if masked:
                scores = scores + bias
            # Maxima and sums are kept in every lane, where repeating them costs nothing.
            old_top = self.top[h]
            top = jnp.maximum(old_top, jnp.broadcast_to(scores.max(axis=1, keepdims=True), (size, LANES)))
            weights = jnp.exp2(scores - _lanes(top, keys)).astype(shape.compute_dtype)
            shrink = jnp.exp2(old_top - top)
            # Columns of ones make the matrix unit sum the weights, of which it has the room.
            values = jnp.concatenate([shape.values(self.kv, slot, kv_head), ones], axis=1)
            out = dot(weights, values, (((1,), (0,)), ((), ())))
            self.total[h] = self.total[h] * shrink + out[:, shape.v_width :]
            self.acc[h] = self.acc[h] * _lanes(shrink, shape.v_width) + out[:, : shape.v_width]
            self.top[h] = top

        self._heads(head)

    def _heads(self, body: Any) -> None:
        # Two heads side by side hide each other's latencies.
        jax.lax.fori_loop(0, self.shape.num_heads, body, None, unroll=2 - self.shape.num_heads % 2)

    def _begin_block(self, block: Any) -> None:
        copy = self._q_copy(block)
        copy.start()
        copy.wait()

        def head(h: Any, carry: None) -> None:
            # Scores are powers of two: one multiplication fewer for each of them.
            self.q[h] = (self.q[h].astype(jnp.float32) * (self.shape.scale * LOG2_E)).astype(self.q.dtype)
            self.top[h] = jnp.broadcast_to(self.sinks[pl.ds(h, 1)] * LOG2_E, self.top.shape[1:])
            self.total[h] = jnp.ones_like(self.total[h])
            self.acc[h] = jnp.zeros_like(self.acc[h])

        self._heads(head)

    def _finish_block(self, block: Any) -> None:
        def head(h: Any, carry: None) -> None:
            self.out_stage[h] = self.shape.output(self.acc[h] / self.total[h][:, :1]).astype(self.out_stage.dtype)

        self._heads(head)
        copy = self._out_copy(block)
        copy.start()
        copy.wait()

    def _sees_all(self, item: _Item) -> Any:
        """Whether the block is the row's alone, and each of its tokens sees every key of the chunk."""
        size, keys = self.config.block_tokens, self.chunk_tokens
        own = (item.begin == item.block * size) & (item.end == item.begin + size)
        causal = (item.chunk + 1) * keys - 1 <= item.begin + item.shift
        return own & causal & (item.chunk * keys > item.end - 1 + item.shift - self.window)

    def run(self) -> None:
        def clear(h: Any, carry: None) -> None:  # what no DMA fills is read, masked: it must be finite
            for slot in range(2):
                for plane in range(self.shape.planes):
                    self.kv[slot, plane, h] = jnp.zeros_like(self.kv[slot, plane, h])

        jax.lax.fori_loop(0, self.shape.num_kv_heads, clear, None)
        row = self.num_decodes
        start = (
            jax.lax.div(self.starts[jnp.minimum(row, self.shape.num_rows - 1)], self.config.block_tokens),
            row,
            jnp.int32(-1),
        )
        self.fetch(self.at(*start), 0)

        def step(carry: tuple) -> tuple:
            place, slot, new_block = carry
            item = self.at(*place)
            following = self.after(item)
            pl.when(new_block)(lambda: self._begin_block(item.block))
            self.fetch(self.at(*following), 1 - slot)
            self.arrive(item, slot)
            sees_all = self._sees_all(item)
            pl.when(sees_all)(lambda: self.attend(item, slot, masked=False))
            pl.when(~sees_all)(lambda: self.attend(item, slot, masked=True))
            ends = self.ends_block(item)
            pl.when(ends)(lambda: self._finish_block(item.block))
            return following, 1 - slot, ends

        jax.lax.while_loop(lambda carry: carry[0][1] < self.num_rows, step, (start, jnp.int32(0), jnp.bool_(True)))


NAMES = (
    "scalars", "seq_lens", "starts", "tables", "q_in", "sinks", "pages", "out",
    "kv", "q", "out_stage", "top", "total", "acc", "kv_sem", "q_sem", "out_sem",
)  # fmt: skip


def write_rows(new, pages, block_tables, seq_lens, query_start_loc, scalars, *, interpret: Any = False) -> jax.Array:
    """`pages` with the tokens of rows scalars[0]:scalars[1] written.

    `new` is what each plane gets, [num_kv_heads, T, width], T a multiple of a tile.
    """
    _, planes, num_kv_heads, page_size, width = pages.shape
    shape = _WriteShape(*block_tables.shape, page_size, new[0].shape[1], new[0].dtype)
    hbm = pl.BlockSpec(memory_space=pl.ANY)

    def body(scalars: Any, seq_lens: Any, starts: Any, tables: Any, *refs: Any) -> None:
        _write_kernel(shape, refs[:planes], scalars, seq_lens, starts, tables, *refs[planes:])

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(),
            in_specs=[hbm] * (planes + 1),
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((planes, num_kv_heads, shape.window, width), new[0].dtype),
                pltpu.VMEM((planes, num_kv_heads, page_size, width), pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        input_output_aliases={4 + planes: 0},
        name="paged_write",
        interpret=interpret,
    )(scalars, seq_lens, query_start_loc, block_tables.reshape(-1), *new, pages)


def attend_rows(
    q: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    scalars: jax.Array,
    sinks: jax.Array,
    *,
    head_dim: int,
    scale: float,
    soft_cap: float | None,
    config: PrefillConfig,
    interpret: Any = False,
) -> jax.Array:
    """Attention of rows scalars[0]:scalars[1] over pages that hold their tokens.

    Args:
        q: [num_heads, T, q_width], T a multiple of a tile of its dtype; lanes from head_dim on are 0.
        scalars: int32 [4]: rows of one token, rows with tokens, page offset, sliding window (NO_WINDOW for none).
        sinks: float32 [num_heads, LANES], the same in every lane; FLOOR for none.

    Returns:
        [num_heads, T, q_width]; its first head_dim lanes are defined at the tokens of those rows.
    """
    num_heads, num_tokens, q_width = q.shape
    num_kv_heads = pages.shape[2]
    config = PrefillConfig(math.gcd(num_tokens, config.block_tokens), config.pages_per_chunk)
    chunk_tokens = config.pages_per_chunk * pages.shape[3]
    shape = PagedShape.of(num_heads, head_dim, q.dtype, pages, block_tables, scale, soft_cap, config)

    def body(*refs: Any) -> None:
        _Prefill(shape, dict(zip(NAMES, refs, strict=True))).run()

    hbm, state = pl.BlockSpec(memory_space=pl.ANY), (num_heads, config.block_tokens)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(),
            in_specs=[hbm, pl.BlockSpec(memory_space=pltpu.VMEM), hbm],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((2, shape.planes, num_kv_heads, chunk_tokens, shape.width), pages.dtype),
                pltpu.VMEM((*state, q_width), q.dtype),
                pltpu.VMEM((*state, q_width), q.dtype),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, LANES), jnp.float32),
                pltpu.VMEM((*state, shape.v_width), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA(()),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        name="paged_prefill",
        interpret=interpret,
    )(scalars, seq_lens, query_start_loc, block_tables.reshape(-1), q, sinks, pages)
