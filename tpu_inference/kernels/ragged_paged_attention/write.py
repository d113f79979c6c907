# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel that writes K and V of rows with several tokens into their pages.

It goes from touched page to touched page. One that is new from end to end, and whose tokens begin with a tile, is copied as it is. Any other comes
to VMEM together with its tokens, which are turned into place; the next page's reads are under way meanwhile, and the last one's write.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.ragged_paged_attention.paged import sublanes


@dataclass(frozen=True)
class _Shape:
    num_rows: int
    table_width: int
    planes: int
    num_kv_heads: int
    page_size: int
    width: int
    num_tokens: int
    dtype: Any

    @property
    def tile(self) -> int:
        return sublanes(self.dtype)

    @property
    def window(self) -> int:
        """Tokens read for a page: those of the page, from the tile that its first one is in."""
        return self.page_size + self.tile

    @property
    def read(self) -> int:
        return min(self.window, self.num_tokens)

    def lanes(self, head: int) -> pl.Slice:
        return pl.ds(head * self.width, self.width)


@dataclass
class _Page:
    """A page that a row touches; scalars."""

    row: Any
    index: Any
    before: Any
    """Tokens of the row before this step."""
    seq_len: Any
    token: Any
    """Of the page's first position; perhaps another row's, or below 0."""
    last: Any
    valid: Any
    whole: Any
    """All of its tokens are new."""
    direct: Any
    """It is copied as it is."""


class _Write:
    """The kernel's body, in stages; one instance a trace."""

    def __init__(self, shape: _Shape, refs: dict[str, Any]) -> None:
        self.shape = shape
        self.__dict__.update(refs)
        self.num_decodes, self.num_rows, self.page_offset, _ = (self.scalars[i] for i in range(4))

    def at(self, row: Any, index: Any) -> _Page:
        """The page at `index`, or the first one the row touches where that is -1."""
        shape, size = self.shape, self.shape.page_size
        row_in = jnp.minimum(row, shape.num_rows - 1)
        start, stop, seq_len = self.starts[row_in], self.starts[row_in + 1], self.seq_lens[row_in]
        before = seq_len - (stop - start)
        index = jnp.where(index < 0, jax.lax.div(before, size), index)
        token, valid = start + index * size - before, row < self.num_rows
        whole = (index * size >= before) & ((index + 1) * size <= seq_len)
        direct = whole & (jax.lax.rem(token, shape.tile) == 0)
        return _Page(row, index, before, seq_len, token, jax.lax.div(seq_len - 1, size), valid, whole, direct)

    def after(self, page: _Page) -> tuple[Any, Any]:
        ends = page.index >= page.last
        return jnp.where(ends, page.row + 1, page.row), jnp.where(ends, -1, page.index + 1)

    def _where(self, page: _Page) -> Any:
        index = jnp.minimum(
            page.row * self.shape.table_width + page.index, self.shape.num_rows * self.shape.table_width - 1
        )
        return self.pages.at[self.tables[index] + self.page_offset]

    # Pages that are copied as they are.

    def copy_directly(self, page: _Page) -> None:
        shape = self.shape
        tokens, where = pl.ds(pl.multiple_of(page.token, shape.tile), shape.page_size), self._where(page)
        for plane, new in enumerate(self.new_in):
            for head in range(shape.num_kv_heads):
                source = new.at[tokens, shape.lanes(head)]
                pltpu.make_async_copy(source, where.at[plane, head], self.direct_sem).start()

    # Pages that are put together.

    def _base(self, page: _Page) -> Any:
        """The first token that is read for a page."""
        base = jnp.clip(page.token, 0, self.shape.num_tokens - self.shape.read)
        return pl.multiple_of(jax.lax.div(base, self.shape.tile) * self.shape.tile, self.shape.tile)

    def _reads(self, page: _Page, slot: Any) -> list[tuple[Any, Any]]:
        """(whether it is needed, the copy)"""
        shape, base = self.shape, self._base(page)
        old = pltpu.make_async_copy(self._where(page), self.page.at[slot], self.read_sem.at[slot])
        out = [(~page.whole, old)]
        for plane, new in enumerate(self.new_in):
            target = self.new.at[slot, plane, pl.ds(0, shape.read)]
            out.append((True, pltpu.make_async_copy(new.at[pl.ds(base, shape.read)], target, self.read_sem.at[slot])))
        return out

    def fetch(self, page: _Page, slot: Any) -> None:
        @pl.when(page.valid & ~page.direct)
        def _() -> None:
            self.release(slot)
            for needed, copy in self._reads(page, slot):
                pl.when(needed)(copy.start)

    def _back(self, page: _Page, slot: Any) -> Any:
        return pltpu.make_async_copy(self.page.at[slot], self._where(page), self.write_sem.at[slot])

    def release(self, slot: Any) -> None:
        """Wait until what was put together in the slot is written."""

        @pl.when(self.busy[slot] == 1)
        def _() -> None:
            self._back(self.at(0, 0), slot).wait()
            self.busy[slot] = 0

    def put_together(self, page: _Page, slot: Any) -> None:
        shape = self.shape
        for needed, copy in self._reads(page, slot):
            pl.when(needed)(copy.wait)
        # The page's first token to the front; the amount may not be negative.
        behind = page.token - self._base(page)
        turn = jnp.where(behind > 0, shape.window, 0) - behind
        position = page.index * shape.page_size + jax.lax.broadcasted_iota(jnp.int32, (shape.page_size, shape.width), 0)
        mine = (position >= page.before) & (position < page.seq_len)
        for plane in range(shape.planes):
            for head in range(shape.num_kv_heads):
                new = self.new[slot, plane, :, shape.lanes(head)].astype(jnp.float32)
                old = self.page[slot, plane, head].astype(jnp.float32)
                merged = jnp.where(mine, pltpu.roll(new, turn, 0)[: shape.page_size], old)
                self.page[slot, plane, head] = merged.astype(shape.dtype)
        self._back(page, slot).start()
        self.busy[slot] = 1

    def run(self) -> None:
        for slot in range(2):
            self.busy[slot] = 0
        start = (self.num_decodes, jnp.int32(-1))
        self.fetch(self.at(*start), 0)

        def step(carry: tuple) -> tuple:
            place, slot, copied = carry
            page = self.at(*place)
            following = self.after(page)
            self.fetch(self.at(*following), 1 - slot)
            pl.when(page.direct)(lambda: self.copy_directly(page))
            pl.when(~page.direct)(lambda: self.put_together(page, slot))
            return following, 1 - slot, copied + page.direct.astype(jnp.int32)

        _, _, copied = jax.lax.while_loop(
            lambda carry: carry[0][0] < self.num_rows, step, (start, jnp.int32(0), jnp.int32(0))
        )
        for slot in range(2):
            self.release(slot)
        whole = self.pages.at[0]  # a wait counts bytes
        wait = pltpu.make_async_copy(whole, whole, self.direct_sem).wait
        jax.lax.fori_loop(0, copied, lambda _, carry: wait(), None)


NAMES = (
    "scalars", "seq_lens", "starts", "tables", "pages_in", "pages",
    "new", "page", "busy", "read_sem", "write_sem", "direct_sem",
)  # fmt: skip


def write_rows(
    new: tuple[jax.Array, ...],
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    scalars: jax.Array,
    *,
    interpret: Any = False,
) -> jax.Array:
    """`pages` with the tokens of rows scalars[0]:scalars[1] written.

    `new` is what each plane gets, [T, num_kv_heads * width] of the pages' dtype, T a multiple of a tile.
    """
    _, planes, num_kv_heads, page_size, width = pages.shape
    shape = _Shape(*block_tables.shape, *pages.shape[1:], new[0].shape[0], pages.dtype)

    def body(scalars: Any, seq_lens: Any, starts: Any, tables: Any, *refs: Any) -> None:
        named = dict(zip(NAMES, (scalars, seq_lens, starts, tables, *refs[planes:]), strict=True))
        _Write(shape, {**named, "new_in": refs[:planes]}).run()

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(),
            in_specs=[hbm] * (planes + 1),
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((2, planes, shape.window, num_kv_heads * width), pages.dtype),
                pltpu.VMEM((2, planes, num_kv_heads, page_size, width), pages.dtype),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        input_output_aliases={4 + planes: 0},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name="paged_write",
        interpret=interpret,
    )(scalars, seq_lens, query_start_loc, block_tables.reshape(-1), *new, pages)
