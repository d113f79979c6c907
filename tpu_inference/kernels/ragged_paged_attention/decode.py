# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel of rows with one token: writes the token's K and V into its page and attends over the row's pages.

The context of all rows is one list of items, `pages_per_item` pages each, in order of rows. Items live in a ring of VMEM slots: `items` of them
are computed side by side, so that the matrix unit and the reductions of one hide behind those of the others, while the DMAs of the stages after
them are in flight, across rows. Only the running softmax goes from item to item.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.ragged_paged_attention.paged import FLOOR, LANES, MASKED, PagedShape, page_copies, sublanes


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel is blocked."""

    pages_per_item: int
    items: int
    """Computed side by side."""
    stages: int
    """Of `items` slots each; one is computed while the DMAs of the others are in flight."""

    @property
    def slots(self) -> int:
        return self.items * self.stages


@dataclass
class _Item:
    """Scalars of a place in the list of items."""

    row: Any
    chunk: Any
    seq_len: Any
    first: Any
    last: Any
    valid: Any


class _Decode:
    """The kernel's body, in stages; one instance a trace."""

    def __init__(self, shape: PagedShape, refs: dict[str, Any]) -> None:
        self.shape, self.config = shape, shape.config
        self.item_tokens, self.tile = self.config.pages_per_item * shape.page_size, sublanes(shape.dtype)
        self.__dict__.update(refs)
        self.num_decodes, _, self.page_offset, self.window = (self.scalars[i] for i in range(4))

    # The list of items.

    def at(self, row: Any, chunk: Any) -> _Item:
        shape = self.shape
        seq_len = self.seq_lens[jnp.minimum(row, shape.num_rows - 1)]
        last = jax.lax.div(seq_len - 1, self.item_tokens)
        return _Item(row, chunk, seq_len, self._first_chunk(seq_len), last, row < self.num_decodes)

    def _first_chunk(self, seq_len: Any) -> Any:
        return jax.lax.div(jnp.maximum(seq_len - self.window, 0), self.item_tokens)

    def after(self, item: _Item) -> tuple[Any, Any]:
        """(row, chunk) of the next item."""
        ends = item.chunk >= item.last
        row = jnp.where(ends, item.row + 1, item.row)
        first = self._first_chunk(self.seq_lens[jnp.minimum(item.row + 1, self.shape.num_rows - 1)])
        return row, jnp.where(ends, first, item.chunk + 1)

    # DMAs.

    def _page_copies(self, item: _Item, slot: Any) -> list[tuple[Any, Any]]:
        end = jnp.where(item.valid, item.seq_len, 0)
        return page_copies(self, item.row, item.chunk, self.config.pages_per_item, end, slot)

    def _row_copies(self, item: _Item, slot: Any) -> list[Any]:
        """The row's query, and the token's K and V."""
        pairs = ((self.out, self.q), (self.k_new, self.k), (self.v_new, self.v))
        return [
            pltpu.make_async_copy(source.at[item.row], target.at[slot], self.row_sem.at[slot])
            for source, target in pairs
        ]

    def fetch(self, item: _Item, slot: Any) -> None:
        @pl.when(item.valid)
        def _() -> None:
            for copy in self._row_copies(item, slot):
                copy.start()
            for there, copy in self._page_copies(item, slot):
                pl.when(there)(copy.start)

    def arrive(self, item: _Item, slot: Any) -> None:
        """Wait for what `fetch` started."""

        @pl.when(item.valid)
        def _() -> None:
            for copy in self._row_copies(item, slot):
                copy.wait()

        whole = item.valid & ((item.chunk + 1) * self.item_tokens <= item.seq_len)

        @pl.when(whole)
        def _() -> None:  # all pages together: a wait counts bytes
            pltpu.make_async_copy(self.kv.at[slot], self.kv.at[slot], self.kv_sem.at[slot]).wait()

        @pl.when(item.valid & ~whole)
        def _() -> None:
            for there, copy in self._page_copies(item, slot):
                pl.when(there)(copy.wait)

    def _out_copy(self, row: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(self.out_stage.at[slot], self.out.at[row], self.out_sem.at[slot])

    def _tile_copy(self, item: _Item, slot: Any) -> Any:
        """The tile with the new token, back into its page."""
        shape = self.shape
        position = item.seq_len - 1
        index = jax.lax.div(position, shape.page_size)
        page = self.tables[shape.table_index(item.row, index)] + self.page_offset
        inside = jax.lax.div(position - index * shape.page_size, self.tile) * self.tile
        target = self.pages.at[page, :, :, pl.ds(pl.multiple_of(inside, self.tile), self.tile)]
        return pltpu.make_async_copy(self.tile_stage.at[slot], target, self.tile_sem.at[slot])

    def release(self, slot: Any) -> None:
        """Wait until what an earlier row left in the slot's staging buffers is written."""

        @pl.when(self.busy[slot] == 1)
        def _() -> None:
            self._out_copy(0, slot).wait()
            pltpu.make_async_copy(self.tile_stage.at[slot], self.tile_stage.at[slot], self.tile_sem.at[slot]).wait()
            self.busy[slot] = 0

    # Arithmetic.

    def insert(self, item: _Item, slot: Any) -> None:
        """Put the new token into the item's K and V, and into the tile that goes back to its page."""
        shape = self.shape
        inside = jnp.clip(item.seq_len - 1 - item.chunk * self.item_tokens, 0, self.item_tokens - 1)
        start = pl.multiple_of(jax.lax.div(inside, self.tile) * self.tile, self.tile)
        here = jnp.where(item.valid & (item.chunk == item.last), inside - start, -1)
        mine = jax.lax.broadcasted_iota(jnp.int32, (self.tile, shape.head_dim), 0) == here
        for which, new in enumerate((self.k, self.v)):
            rows = new[slot].astype(jnp.float32)
            for head in range(shape.num_kv_heads):
                old = self.kv[slot, which, head, pl.ds(start, self.tile)]
                tile = jnp.where(mine, rows[head : head + 1], old.astype(jnp.float32)).astype(old.dtype)
                self.kv[slot, which, head, pl.ds(start, self.tile)] = tile
                self.tile_stage[slot, which, head] = tile

    def _per_head(self, product: Any) -> jax.Array:
        """Rows of each KV head's queries, from `product(head)` of all queries with that head's K or V."""
        shape = self.shape
        total = product(0)
        head_of_row = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, total.shape, 0), jnp.int32(shape.group))
        for head in range(1, shape.num_kv_heads):
            total = jnp.where(head_of_row == head, product(head), total)
        return total

    def partial_softmax(self, item: _Item, slot: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(maximum [heads, 1], sum of weights [heads, 1], weighted values [heads, head_dim]) of an item alone."""
        shape = self.shape
        dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=shape.precision)
        q = self.q[slot].astype(shape.dtype)
        scores = self._per_head(lambda head: dot(q, self.kv[slot, 0, head], (((1,), (1,)), ((), ())))) * shape.scale
        if shape.soft_cap is not None:
            scores = shape.soft_cap * jnp.tanh(scores / shape.soft_cap)
        keys = item.chunk * self.item_tokens + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        end = jnp.where(item.valid, item.seq_len, 0)
        scores = jnp.where((keys < end) & (keys >= item.seq_len - self.window), scores, MASKED)
        top = jnp.maximum(scores.max(axis=1, keepdims=True), FLOOR)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        weights = weights.astype(shape.dtype)
        return top, total, self._per_head(lambda head: dot(weights, self.kv[slot, 1, head], (((1,), (0,)), ((), ()))))

    def merge(self, state: tuple, item: _Item, part: tuple) -> tuple:
        """The running softmax after an item."""
        starts = item.chunk == item.first
        top, total, out = (jnp.where(starts, initial, x) for x, initial in zip(state, (FLOOR, 0.0, 0.0), strict=True))
        part_top, part_total, part_out = part
        new_top = jnp.maximum(top, part_top)
        old, new = jnp.exp(top - new_top), jnp.exp(part_top - new_top)
        return new_top, total * old + part_total * new, out * old + part_out * new

    def finish(self, state: tuple, item: _Item, slot: Any) -> None:
        """Send the row's output and its new tile on their way, after its last item."""
        self.out_stage[slot] = (state[2] / jnp.maximum(state[1], 1e-30)).astype(self.out_stage.dtype)

        @pl.when(item.valid & (item.chunk == item.last))
        def _() -> None:
            self._out_copy(item.row, slot).start()
            self._tile_copy(item, slot).start()
            self.busy[slot] = 1

    # The loop.

    def run(self) -> None:
        config, slots = self.config, self.config.slots
        # What no DMA fills is read, masked, as V: it must be finite.
        self.kv[...] = jnp.zeros_like(self.kv)
        for slot in range(slots):
            self.busy[slot] = 0
        start = (jnp.int32(0), self._first_chunk(self.seq_lens[0]))

        def fill(slot: Any, place: tuple) -> tuple:
            item = self.at(*place)
            self.fetch(item, slot)
            return self.after(item)

        ahead = jax.lax.fori_loop(0, slots, fill, start)

        def step(carry: tuple) -> tuple:
            place, ahead, stage = carry
            items = []
            for i in range(config.items):
                slot = stage * config.items + i
                items.append((self.at(*place), slot))
                place = self.after(items[-1][0])
            for item, slot in items:
                self.release(slot)
                self.arrive(item, slot)
            for item, slot in items:
                self.insert(item, slot)
            parts = [self.partial_softmax(item, slot) for item, slot in items]
            state = (self.top[:, :1], self.total[:, :1], self.acc[...])
            for (item, slot), part in zip(items, parts, strict=True):
                state = self.merge(state, item, part)
                self.finish(state, item, slot)
            self.top[...] = jnp.broadcast_to(state[0], self.top.shape)
            self.total[...] = jnp.broadcast_to(state[1], self.total.shape)
            self.acc[...] = state[2]
            for _, slot in items:
                ahead = fill(slot, ahead)
            return place, ahead, jnp.where(stage == config.stages - 1, 0, stage + 1)

        jax.lax.while_loop(lambda carry: carry[0][0] < self.num_decodes, step, (start, ahead, jnp.int32(0)))
        for slot in range(slots):
            self.release(slot)


NAMES = (
    "scalars", "seq_lens", "tables", "q_in", "k_new", "v_new", "pages_in", "out", "pages",
    "kv", "q", "k", "v", "out_stage", "tile_stage", "top", "total", "acc", "busy", "kv_sem", "row_sem", "out_sem", "tile_sem",
)  # fmt: skip


def decode_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    scalars: jax.Array,
    *,
    scale: float,
    soft_cap: float | None,
    config: DecodeConfig,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The first scalars[0] rows, each of one token, which is token r of row r.

    Args:
        scalars: int32 [4]: rows of one token, rows with tokens, page offset, sliding window (NO_WINDOW for none).
        The others are those of `ragged_paged_attention`.

    Returns:
        (`q` with those rows replaced by their outputs, the updated pages).
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, item_tokens = pages.shape[2], config.pages_per_item * pages.shape[3]
    shape = PagedShape.of(num_heads, pages, block_tables, scale, soft_cap, config)

    def body(*refs: Any) -> None:
        _Decode(shape, dict(zip(NAMES, refs, strict=True))).run()

    slots, hbm = config.slots, pl.BlockSpec(memory_space=pl.ANY)
    semaphores = [pltpu.SemaphoreType.DMA((slots,))] * 4
    return pl.pallas_call(
        body,
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(pages.shape, pages.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(),
            in_specs=[hbm] * 4,
            out_specs=(hbm, hbm),
            scratch_shapes=[
                pltpu.VMEM((slots, 2, num_kv_heads, item_tokens, head_dim), pages.dtype),
                pltpu.VMEM((slots, num_heads, head_dim), q.dtype),
                pltpu.VMEM((slots, num_kv_heads, head_dim), k.dtype),
                pltpu.VMEM((slots, num_kv_heads, head_dim), v.dtype),
                pltpu.VMEM((slots, num_heads, head_dim), q.dtype),
                pltpu.VMEM((slots, 2, num_kv_heads, sublanes(pages.dtype), head_dim), pages.dtype),
                pltpu.VMEM((num_heads, LANES), jnp.float32),
                pltpu.VMEM((num_heads, LANES), jnp.float32),
                pltpu.VMEM((num_heads, head_dim), jnp.float32),
                pltpu.SMEM((slots,), jnp.int32),
                *semaphores,
            ],
        ),
        input_output_aliases={3: 0, 6: 1},
        name="paged_decode",
        interpret=interpret,
    )(scalars, seq_lens, block_tables.reshape(-1), q, k, v, pages)
