# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel of rows with one token: writes the token's K and V into its page and attends over the row's pages.

The context of all rows is one list of items, `pages_per_item` pages each, in order of rows. Items live in a ring of VMEM slots. A step of the loop
scores the keys of one item while it weighs the values of the item before, so that the matrix unit never waits for a softmax; the DMAs of
the items after those are in flight, across rows. Starting a DMA is a dozen scalar instructions, which are put between pieces of the arithmetic,
where they cost nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.ragged_paged_attention.config import DecodeConfig
from tpu_inference.kernels.ragged_paged_attention.paged import (
    FLOOR,
    LANES,
    MASKED,
    PagedShape,
    page_starts,
    pieces_between,
    sublanes,
    wait_for_pages,
)


@dataclass
class Item:
    """Scalars of a place in the list of items."""

    row: Any
    chunk: Any
    seq_len: Any
    first: Any
    last: Any
    valid: Any


class Decode:
    """The kernel's body, in stages; one instance a trace. Latent attention has its own copies of a row and its own arithmetic (`advance`)."""

    def __init__(self, shape: PagedShape, refs: dict[str, Any]) -> None:
        self.shape, self.config = shape, shape.config
        self.item_tokens, self.tile = self.config.pages_per_item * shape.page_size, sublanes(shape.dtype)
        self.__dict__.update(refs)
        self.num_decodes, _, self.page_offset, self.window = (self.scalars[i] for i in range(4))

    # The list of items.

    def at(self, row: Any, chunk: Any) -> Item:
        shape = self.shape
        seq_len = self.seq_lens[jnp.clip(row, 0, shape.num_rows - 1)]
        last = jax.lax.div(seq_len - 1, self.item_tokens)
        valid = (row >= 0) & (row < self.num_decodes)
        return Item(row, chunk, seq_len, self._first_chunk(seq_len), last, valid)

    def _first_chunk(self, seq_len: Any) -> Any:
        return jax.lax.div(jnp.maximum(seq_len - self.window, 0), self.item_tokens)

    def after(self, item: Item) -> tuple[Any, Any]:
        """(row, chunk) of the next item."""
        ends = item.chunk >= item.last
        row = jnp.where(ends, item.row + 1, item.row)
        first = self._first_chunk(self.seq_lens[jnp.minimum(item.row + 1, self.shape.num_rows - 1)])
        return row, jnp.where(ends, first, item.chunk + 1)

    # DMAs.

    def _pages(self, item: Item, slot: Any) -> tuple[Any, ...]:
        return item.chunk, self.config.pages_per_item, jnp.where(item.valid, item.seq_len, 0), slot

    def row_copies(self, item: Item, slot: Any) -> list[tuple[Any, Any]]:
        """(whether it is needed, the copy) of the row's query, and of the token's K and V."""
        pairs = [(self.out, self.q.at[slot])]
        pairs += [(new, self.new.at[slot, plane]) for plane, new in enumerate(self.new_in)]
        sem = self.row_sem.at[slot]
        return [(item.valid, pltpu.make_async_copy(source.at[item.row], target, sem)) for source, target in pairs]

    def fetch(self, item: Item, slot: Any) -> list[Callable[[], None]]:
        """What starts the item's DMAs, one by one."""

        def start_row() -> None:
            for needed, copy in self.row_copies(item, slot):
                pl.when(needed)(copy.start)

        return [start_row, *page_starts(self, item.row, *self._pages(item, slot))]

    def arrive(self, item: Item, slot: Any) -> None:
        """Wait for what `fetch` started."""
        for needed, copy in self.row_copies(item, slot):
            pl.when(needed)(copy.wait)
        wait_for_pages(self, *self._pages(item, slot))

    def _out_copy(self, row: Any, slot: Any) -> Any:
        return pltpu.make_async_copy(self.out_stage.at[slot], self.out.at[row], self.out_sem.at[slot])

    def _tile_copy(self, item: Item, slot: Any) -> Any:
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

    def insert(self, item: Item, slot: Any) -> None:
        """Put the new token into the item's K and V, and into the tile that goes back to its page."""
        shape = self.shape
        inside = jnp.clip(item.seq_len - 1 - item.chunk * self.item_tokens, 0, self.item_tokens - 1)
        start = pl.multiple_of(jax.lax.div(inside, self.tile) * self.tile, self.tile)
        # A tile is 8 sublanes of words, each of the tokens of its lane that are neighbours.
        per_word = self.tile // 8
        word = jax.lax.div(inside - start, per_word)
        bits = 32 // per_word
        mask = jnp.int32(-1) if per_word == 1 else (2**bits - 1) << ((inside - start - word * per_word) * bits)
        word = jnp.where(item.valid & (item.chunk == item.last), word, -1)
        mask = jnp.where(jax.lax.broadcasted_iota(jnp.int32, (8, shape.width), 0) == word, mask, 0)
        for plane in range(shape.planes):
            rows = self.new[slot, plane]
            for head in range(shape.num_kv_heads):
                old = pltpu.bitcast(self.kv[slot, plane, head, pl.ds(start, self.tile)], jnp.int32)
                tile = pltpu.bitcast((rows[head : head + 1] & mask) | (old & ~mask), shape.dtype)
                self.kv[slot, plane, head, pl.ds(start, self.tile)] = tile
                self.tile_stage[slot, plane, head] = tile

    def _pieces(self) -> list[Any]:
        """The item's tokens, in slices that a matrix product and a few DMAs are about as long for."""
        size = max(self.shape.page_size, self.config.piece)
        if self.item_tokens % size:
            size = self.item_tokens
        return [pl.ds(start, size) for start in range(0, self.item_tokens, size)]

    def _dot(self, x: jax.Array, y: jax.Array, y_axis: int) -> jax.Array:
        contract = (((1,), (y_axis,)), ((), ()))
        return jax.lax.dot_general(x, y, contract, preferred_element_type=jnp.float32, precision=self.shape.precision)

    def _per_head(self, product: Any) -> jax.Array:
        """Rows of each KV head's queries, from `product(head)` of all queries with that head's K or V."""
        shape = self.shape
        total = product(0)
        head_of_row = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, total.shape, 0), jnp.int32(shape.group))
        for head in range(1, shape.num_kv_heads):
            total = jnp.where(head_of_row == head, product(head), total)
        return total

    def score(self, slot: Any, piece: Callable) -> jax.Array:
        """[heads, item_tokens]: every query with every key; each product is made by `piece`."""
        shape = self.shape
        q = self.q[slot].astype(shape.compute_dtype)

        def one(head: int, tokens: Any) -> jax.Array:
            return piece(lambda: self._dot(q, shape.keys(self.kv, slot, head, tokens), 1))

        return self._per_head(lambda head: jnp.concatenate([one(head, tokens) for tokens in self._pieces()], axis=1))

    def partial_softmax(self, item: Item, slot: Any, scores: jax.Array, piece: Callable) -> tuple[jax.Array, ...]:
        """(maximum [heads, 1], sum of weights [heads, 1], weighted values [heads, v_width]) of an item alone."""
        shape = self.shape
        scores = scores * self.scale
        if shape.soft_cap is not None:
            scores = shape.soft_cap * jnp.tanh(scores / shape.soft_cap)
        keys = item.chunk * self.item_tokens + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        end = jnp.where(item.valid, item.seq_len, 0)
        scores = jnp.where((keys < end) & (keys >= item.seq_len - self.window), scores, MASKED)
        top = jnp.maximum(scores.max(axis=1, keepdims=True), FLOOR)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        weights = weights.astype(shape.compute_dtype)

        def one(head: int, tokens: Any) -> jax.Array:
            mine = weights[:, tokens.start : tokens.start + tokens.size]
            return piece(lambda: self._dot(mine, shape.values(self.kv, slot, head, tokens), 0))

        return top, total, self._per_head(lambda head: sum(one(head, tokens) for tokens in self._pieces()))

    def merge(self, state: tuple, item: Item, part: tuple) -> tuple:
        """The running softmax after an item."""
        starts, initial = item.chunk == item.first, (self.sinks[:, :1], 1.0, 0.0)
        top, total, out = (jnp.where(starts, begin, x) for x, begin in zip(state, initial, strict=True))
        part_top, part_total, part_out = part
        new_top = jnp.maximum(top, part_top)
        old, new = jnp.exp(top - new_top), jnp.exp(part_top - new_top)
        return new_top, total * old + part_total * new, out * old + part_out * new

    def finish(self, state: tuple, item: Item, slot: Any) -> None:
        """Send the row's output and its new tile on their way, after its last item."""
        self.out_stage[slot] = self.shape.output(state[2] / state[1]).astype(self.out_stage.dtype)

        pl.when(item.valid & (item.chunk == item.last))(lambda: self.send(item, slot))

    def send(self, item: Item, slot: Any) -> None:
        """What is staged in the slot, to where it belongs."""
        self._out_copy(item.row, slot).start()
        self._tile_copy(item, slot).start()
        self.busy[slot] = 1

    def advance(self, done: Item, item: Item, slot_before: Any, slot: Any, starts: list[Callable[[], None]]) -> None:
        """Score `item`, after its new token, and weigh the values of the item before; `starts` are called on the way."""
        self.insert(item, slot)
        scores = self.scores[...]
        piece = pieces_between(starts, 2 * self.shape.num_kv_heads * len(self._pieces()))
        next_scores = self.score(slot, piece)
        part = self.partial_softmax(done, slot_before, scores, piece)
        self.scores[...] = next_scores
        state = self.merge((self.top[:, :1], self.total[:, :1], self.acc[...]), done, part)
        self.finish(state, done, slot_before)
        self.top[...] = jnp.broadcast_to(state[0], self.top.shape)
        self.total[...] = jnp.broadcast_to(state[1], self.total.shape)
        self.acc[...] = state[2]

    # The loop.

    def fill(self, slot: Any, place: tuple) -> tuple:
        """Starts the DMAs of the item at `place`, and goes on to the next."""
        item = self.at(*place)
        for begin in self.fetch(item, slot):
            begin()
        return self.after(item)

    def more(self, carry: tuple) -> Any:
        """Whether the item before is one, or is still to come."""
        return (carry[0][0] < self.num_decodes) & (self.num_decodes > 0)

    def run(self) -> None:
        slots = self.config.slots
        # What no DMA fills is read, masked, as V: it must be finite.
        self.kv[...] = jnp.zeros_like(self.kv)
        for slot in range(slots):
            self.busy[slot] = 0
        start = (jnp.int32(0), self._first_chunk(self.seq_lens[0]))

        ahead = jax.lax.fori_loop(0, slots - 2, self.fill, start)

        def step(carry: tuple) -> tuple:
            before, place, ahead, slot = carry
            done, item, coming = self.at(*before), self.at(*place), self.at(*ahead)
            slot_before, free = (jnp.where(slot < n, slot + slots - n, slot - n) for n in (1, 2))
            self.release(slot)
            self.arrive(item, slot)
            self.advance(done, item, slot_before, slot, self.fetch(coming, free))
            return place, self.after(item), self.after(coming), jnp.where(slot == slots - 1, 0, slot + 1)

        nothing = (jnp.int32(-1), jnp.int32(0))
        jax.lax.while_loop(self.more, step, (nothing, start, ahead, jnp.int32(0)))
        for slot in range(slots):
            self.release(slot)


def words(x: jax.Array, dtype: Any) -> jax.Array:
    """int32 of `x` as pages of `dtype` hold it: its bits, as often as they fit."""
    size = jnp.dtype(dtype).itemsize
    bits = jax.lax.bitcast_convert_type(x.astype(dtype), jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits * {4: 1, 2: 0x10001, 1: 0x1010101}[size], jnp.int32)


NAMES = (
    "scalars", "seq_lens", "tables", "q_in", "sinks", "pages_in", "out", "pages",
    "kv", "q", "new", "out_stage", "tile_stage", "scores", "top", "total", "acc", "busy", "kv_sem", "row_sem", "out_sem", "tile_sem",
)  # fmt: skip


def decode_rows(
    q: jax.Array,
    new: tuple[jax.Array, ...],
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    scalars: jax.Array,
    sinks: jax.Array,
    *,
    head_dim: int,
    scale: float,
    soft_cap: float | None,
    config: DecodeConfig,
    latent: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The first scalars[0] rows, each of one token, which is token r of row r.

    Args:
        q: [T, num_heads, q_width]; lanes from head_dim on are 0.
        new: what each plane gets, int32 [T, num_kv_heads, width]; see `to_planes` and `words`.
        scalars: int32 [4]: rows of one token, rows with tokens, page offset, sliding window (NO_WINDOW for none).
        sinks: float32 [num_heads, LANES], the same in every lane; FLOOR for none.
        latent: lanes of K that are V, where pages hold one latent a token; None where they hold K and V.
        The others are those of `ragged_paged_attention`.

    Returns:
        (`q` with those rows replaced by their outputs, the updated pages).
    """
    num_heads, planes = q.shape[1], len(new)
    num_kv_heads, item_tokens, width = pages.shape[2], config.pages_per_item * pages.shape[3], pages.shape[4]
    shape = PagedShape.of(num_heads, head_dim, q.dtype, pages, block_tables, soft_cap, config, latent)

    def body(scalars: Any, seq_lens: Any, tables: Any, q_in: Any, *refs: Any) -> None:
        named = dict(zip(NAMES, (scalars, seq_lens, tables, q_in, *refs[planes:]), strict=True))
        Decode(shape, {**named, "new_in": refs[:planes], "scale": scale}).run()

    slots, hbm = config.slots, pl.BlockSpec(memory_space=pl.ANY)
    semaphores = [pltpu.SemaphoreType.DMA((slots,))] * 4
    return pl.pallas_call(
        body,
        out_shape=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(pages.shape, pages.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(),
            in_specs=[hbm] * (1 + planes) + [pl.BlockSpec(memory_space=pltpu.VMEM), hbm],
            out_specs=(hbm, hbm),
            scratch_shapes=[
                pltpu.VMEM((slots, planes, num_kv_heads, item_tokens, width), pages.dtype),
                pltpu.VMEM((slots, *q.shape[1:]), q.dtype),
                pltpu.VMEM((slots, planes, num_kv_heads, width), new[0].dtype),
                pltpu.VMEM((slots, *q.shape[1:]), q.dtype),
                pltpu.VMEM((slots, planes, num_kv_heads, sublanes(pages.dtype), width), pages.dtype),
                pltpu.VMEM((num_heads, item_tokens), jnp.float32),
                pltpu.VMEM((num_heads, LANES), jnp.float32),
                pltpu.VMEM((num_heads, LANES), jnp.float32),
                pltpu.VMEM((num_heads, shape.v_width), jnp.float32),
                pltpu.SMEM((slots,), jnp.int32),
                *semaphores,
            ],
        ),
        input_output_aliases={3: 0, 5 + planes: 1},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name="paged_decode",
        interpret=interpret,
    )(scalars, seq_lens, block_tables.reshape(-1), q, *new, sinks, pages)
