# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel of rows with one token: writes the token's latent into its page and attends over the row's pages.

Items, their ring and their DMAs are those of paged attention. The arithmetic is its own, since all heads share a key and its value: a step of the
loop weighs the values of one item and scores the keys of the next, in tiles as wide as a matrix unit. Products go to the matrix units in the order of
the program, scores first: they wait for nothing, and hide the softmax of the item before. Latents are the weights of both products, so short
floats go there as they are, where the chip has that.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.mla.config import DecodeConfig
from tpu_inference.kernels.ragged_paged_attention.decode import Decode, Item
from tpu_inference.kernels.ragged_paged_attention.paged import (
    FLOOR,
    LANES,
    MASKED,
    PagedShape,
    sublanes,
)


class _LatentDecode(Decode):
    """The kernel's body, in stages; one instance a trace."""

    # A row's query is read with its first item, and scaled once; its token's latent is read with its last.

    def row_copies(self, item: Item, slot: Any) -> list[tuple[Any, Any]]:
        first, last = (item.valid & (item.chunk == end) for end in (item.first, item.last))
        pairs = [(first, self.out, self.q.at[slot]), (first, self.rope_in, self.rope.at[slot])]
        pairs += [(last, new, self.new.at[slot, plane]) for plane, new in enumerate(self.new_in)]
        sem = self.row_sem.at[slot]
        return [(needed, pltpu.make_async_copy(source.at[item.row], target, sem)) for needed, source, target in pairs]

    def _scale_queries(self, slot: Any) -> None:
        rank, rope = self.q.shape[-1], self.rope.shape[-1]
        for lanes, part in ((pl.ds(0, rank), self.q), (pl.ds(rank, rope), self.rope)):
            scaled = part[slot].astype(jnp.float32) * self.factors[0]
            self.scaled[:, lanes] = scaled.astype(self.scaled.dtype)

    # Arithmetic. Running numbers of a head are the same in all lanes of a register, the sum of weights excepted, of which each lane has its share.

    def _tiles(self) -> list[pl.Slice]:
        size = self.config.piece if self.item_tokens % self.config.piece == 0 else self.item_tokens
        return [pl.ds(start, size) for start in range(0, self.item_tokens, size)]

    def _latents(self, slot: Any, tokens: pl.Slice, width: int) -> jax.Array:
        """[tokens, width] as an operand."""
        latents = self.kv[slot, 0, 0, tokens, :width]
        return latents if self.config.mixed else latents.astype(self.shape.compute_dtype)

    def _score_tile(self, item: Item, slot: Any, tokens: pl.Slice, peak: jax.Array | None) -> jax.Array:
        """Scores of a tile, into `scores`; the running maximum of each lane."""
        scores = self._dot(self.scaled[...], self._latents(slot, tokens, self.shape.width), 1)
        seen = jnp.where(item.valid, item.seq_len - item.chunk * self.item_tokens, 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (scores.shape[0], LANES), 1)
        for start in range(0, tokens.size, LANES):
            part = jnp.where(lane < seen - (tokens.start + start), scores[:, start : start + LANES], MASKED)
            self.scores[:, pl.ds(tokens.start + start, LANES)] = part
            peak = part if peak is None else jnp.maximum(peak, part)
        return peak

    def _weigh_tile(self, tokens: pl.Slice, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(weights of a tile, the sum with them)"""
        weights = jnp.exp2(self.scores[:, tokens] - _repeat(top, tokens.size))
        for start in range(0, tokens.size, LANES):
            total = total + weights[:, start : start + LANES]
        return weights.astype(self.shape.compute_dtype), total

    def advance(self, done: Item, item: Item, slot_before: Any, slot: Any, starts: list[Callable[[], None]]) -> None:
        self.insert(item, slot)
        tiles, rank = self._tiles(), self.acc.shape[1]
        old = jnp.where(done.chunk == done.first, FLOOR, self.top[...])
        top = jnp.maximum(old, self.peak[...])
        fade = jnp.exp2(old - top)
        total, weights, peak = self.total[...] * fade, [], None
        for tokens in tiles:
            tile, total = self._weigh_tile(tokens, top, total)
            weights.append(tile)
        self.top[...], self.total[...] = top, total
        for tokens in tiles:
            peak = self._score_tile(item, slot, tokens, peak)
        self.peak[...] = jnp.broadcast_to(peak.max(axis=1, keepdims=True), peak.shape)
        acc = self.acc[...] * _repeat(fade, rank)
        for tokens, tile in zip(tiles, weights, strict=True):
            self.acc[...] = acc + self._dot(tile, self._latents(slot_before, tokens, rank), 0)
            acc = self.acc[...]
        # Reads of latents do not pass the start of a DMA of latents, and the last products leave the scalar unit idle.
        for start in starts:
            start()

    def finish_row(self, done: Item, slot: Any) -> None:
        @pl.when(done.valid & (done.chunk == done.last))
        def _() -> None:
            share = self.factors[1] / self.total[...].sum(axis=1, keepdims=True)
            self.out_stage[slot] = (self.acc[...] * share).astype(self.out_stage.dtype)
            self.send(done, slot)

    def enter(self, item: Item, slot: Any) -> None:
        """Have all that `advance` needs of an item to score."""
        self.release(slot)
        self.arrive(item, slot)
        pl.when(item.valid & (item.chunk == item.first))(lambda: self._scale_queries(slot))

    # The loop. What branches is at the end of a step, since the scheduler does not look beyond a branch.

    def run(self) -> None:
        # What no query fills is multiplied by what no latent fills, and the first item comes after none: all of it must be finite.
        for ref in (self.kv, self.scaled, self.top, self.total, self.acc):
            ref[...] = jnp.zeros_like(ref)
        for ref in (self.scores, self.peak):
            ref[...] = jnp.full_like(ref, MASKED)
        slots, start = self.config.slots, (jnp.int32(0), jnp.int32(0))
        for slot in range(slots):
            self.busy[slot] = 0
        ahead = jax.lax.fori_loop(0, slots - 2, self.fill, start)
        self.enter(self.at(*start), 0)

        def step(carry: tuple) -> tuple:
            before, place, ahead, slot = carry
            done, item, coming = self.at(*before), self.at(*place), self.at(*ahead)
            slot_before, free = (jnp.where(slot < n, slot + slots - n, slot - n) for n in (1, 2))
            slot_after, following = jnp.where(slot == slots - 1, 0, slot + 1), self.after(item)
            start_row, *starts = self.fetch(coming, free)
            self.advance(done, item, slot_before, slot, starts)
            self.finish_row(done, slot_before)
            start_row()
            self.enter(self.at(*following), slot_after)
            return place, following, self.after(coming), slot_after

        jax.lax.while_loop(self.more, step, ((jnp.int32(-1), jnp.int32(0)), start, ahead, jnp.int32(0)))
        for slot in range(slots):
            self.release(slot)


def _repeat(x: jax.Array, width: int) -> jax.Array:
    """[N, width] of [N, LANES], the same in every lane."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


NAMES = (
    "scalars", "seq_lens", "tables", "factors", "q_in", "rope_in", "pages_in", "out", "pages",
    "kv", "q", "rope", "new", "out_stage", "tile_stage", "scaled", "scores", "peak", "top", "total", "acc", "busy",
    "kv_sem", "row_sem", "out_sem", "tile_sem",
)  # fmt: skip


def decode_rows(
    q_latent: jax.Array,
    q_rope: jax.Array,
    new: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    scalars: jax.Array,
    factors: jax.Array,
    *,
    config: DecodeConfig,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The first scalars[0] rows, each of one token, which is token r of row r.

    Args:
        q_latent, q_rope: [T, num_heads, rank], [T, num_heads, rope_dim]; num_heads a multiple of a tile of memory's rows.
        new: what pages get, int32 [T, 1, width]; see `ragged_paged_attention.decode.words`.
        scalars: int32 [4]: rows of one token, rows with tokens, page offset, NO_WINDOW.
        factors: float32 [2]: of queries, after which scores are powers of two, and of outputs.
        The others are those of `mla_attention`.

    Returns:
        (`q_latent` with those rows replaced by their outputs, the updated pages).
    """
    (_, num_heads, rank), rope_dim = q_latent.shape, q_rope.shape[-1]
    item_tokens, width = config.pages_per_item * pages.shape[3], pages.shape[4]
    shape = PagedShape.of(num_heads, rank + rope_dim, q_latent.dtype, pages, block_tables, None, config, rank)

    def body(*refs: Any) -> None:
        named = dict(zip((*NAMES[:6], "new_in", *NAMES[6:]), refs, strict=True))
        _LatentDecode(shape, {**named, "new_in": (named["new_in"],)}).run()

    slots, hbm = config.slots, pl.BlockSpec(memory_space=pl.ANY)
    running = pltpu.VMEM((num_heads, LANES), jnp.float32)
    return pl.pallas_call(
        body,
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_latent, pages)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), hbm, hbm, hbm, hbm],
            out_specs=(hbm, hbm),
            scratch_shapes=[
                pltpu.VMEM((slots, 1, 1, item_tokens, width), pages.dtype),
                pltpu.VMEM((slots, num_heads, rank), q_latent.dtype),
                pltpu.VMEM((slots, num_heads, rope_dim), q_rope.dtype),
                pltpu.VMEM((slots, 1, 1, width), new.dtype),
                pltpu.VMEM((slots, num_heads, rank), q_latent.dtype),
                pltpu.VMEM((slots, 1, 1, sublanes(pages.dtype), width), pages.dtype),
                pltpu.VMEM((num_heads, width), shape.compute_dtype),
                pltpu.VMEM((num_heads, item_tokens), jnp.float32),
                running, running, running,
                pltpu.VMEM((num_heads, rank), jnp.float32),
                pltpu.SMEM((slots,), jnp.int32),
                *[pltpu.SemaphoreType.DMA((slots,))] * 4,
            ],
        ),
        input_output_aliases={4: 0, 7: 1},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name="paged_decode",
        interpret=interpret,
    )(scalars, seq_lens, block_tables.reshape(-1), factors, q_latent, q_rope, new, pages)  # fmt: skip
