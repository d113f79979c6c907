# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel of rows with several tokens: paged attention's, whose blocks of queries are of HEADS heads.

Queries and outputs keep the layout that the decode kernel has, [tokens, heads, rank], so that no step copies one into the other: in a block
the heads of a token are neighbours, and outputs replace queries.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.mla.config import HEADS
from tpu_inference.kernels.ragged_paged_attention.config import PrefillConfig
from tpu_inference.kernels.ragged_paged_attention.paged import FLOOR, PagedShape
from tpu_inference.kernels.ragged_paged_attention.prefill import SUBLANES, Item, Prefill


@dataclass
class _Copies:
    """That start and end together."""

    copies: tuple[Any, ...]

    def start(self) -> None:
        for copy in self.copies:
            copy.start()

    def wait(self) -> None:
        for copy in self.copies:
            copy.wait()


class _LatentPrefill(Prefill):
    """The kernel's body, in stages; one instance a trace."""

    windowed = False

    def block_of(self, array: Any, block: Any, head: Any) -> Any:
        """[block_tokens, HEADS, width]; `head` counts groups of heads."""
        size = self.config.block_tokens
        return array.at[pl.ds(block * size, size), pl.ds(pl.multiple_of(head * HEADS, HEADS), HEADS)]

    def q_copy(self, block: Any, head: Any, slot: Any) -> _Copies:
        pairs = ((self.out, self.q), (self.rope_in, self.rope))
        sem = self.q_sem.at[slot]
        return _Copies(tuple(pltpu.make_async_copy(self.block_of(x, block, head), to.at[slot], sem) for x, to in pairs))

    def queries_of(self, q_slot: Any, q: pl.Slice) -> jax.Array:
        return self.scaled[q]

    def token_of(self, query: jax.Array) -> jax.Array:
        return jax.lax.div(query, jnp.int32(HEADS))

    def begin(self, item: Item, q_slot: Any) -> None:
        rank, rope = self.q.shape[-1], self.rope.shape[-1]
        self.top[...] = jnp.full_like(self.top, FLOOR)
        self.acc[...] = jnp.zeros_like(self.acc)
        for lanes, part in ((pl.ds(0, rank), self.q), (pl.ds(rank, rope), self.rope)):
            scaled = part[q_slot].reshape(self.queries, -1).astype(jnp.float32) * self.factors[0]
            self.scaled[:, lanes] = scaled.astype(self.scaled.dtype)

    def finish(self, item: Item, q_slot: Any) -> None:
        """What is of no row with several tokens stays as it is: outputs of rows with one, and padding."""
        dim = self.shape.value_dim
        out = self.acc[:dim] * (self.factors[1] / self.acc[dim : dim + 1])
        out = out.T.reshape(self.out_stage.shape).astype(self.out_stage.dtype)
        token = item.block * self.config.block_tokens + jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
        mine = (token >= self.starts[self.num_decodes]) & (token < self.starts[self.num_rows])
        self.out_stage[...] = jnp.where(mine, out, self.q[q_slot])
        self.out_copy(item.block, item.head).start()

    def run(self) -> None:
        self.scaled[...] = jnp.zeros_like(self.scaled)  # what no query fills is multiplied by what no latent fills
        super().run()


NAMES = (
    "scalars", "seq_lens", "starts", "tables", "factors", "q_in", "rope_in", "pages", "out",
    "kv", "q", "rope", "scaled", "out_stage", "v", "reach", "top", "acc", "kv_sem", "q_sem", "out_sem",
)  # fmt: skip


def attend_rows(
    q_latent: jax.Array,
    q_rope: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    scalars: jax.Array,
    factors: jax.Array,
    *,
    config: PrefillConfig,
    interpret: Any = False,
) -> jax.Array:
    """Attention of rows scalars[0]:scalars[1] over pages that hold their tokens.

    Args:
        q_latent, q_rope: [T, num_heads, rank], [T, num_heads, rope_dim]; T a multiple of the block, num_heads of HEADS.
        scalars, factors: as `decode.decode_rows` takes them.

    Returns:
        `q_latent` with the tokens of those rows replaced by their outputs.
    """
    (_, num_heads, rank), rope_dim = q_latent.shape, q_rope.shape[-1]
    shape = PagedShape.of(
        num_heads, rank + rope_dim, q_latent.dtype, pages, block_tables, None, config, rank, num_heads // HEADS
    )
    chunk_tokens, queries = config.pages_per_chunk * shape.page_size, HEADS * config.block_tokens

    def body(*refs: Any) -> None:
        _LatentPrefill(shape, dict(zip(NAMES, refs, strict=True))).run()

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(q_latent.shape, q_latent.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), hbm, hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((2, 1, 1, chunk_tokens, shape.width), pages.dtype),
                pltpu.VMEM((2, config.block_tokens, HEADS, rank), q_latent.dtype),
                pltpu.VMEM((2, config.block_tokens, HEADS, rope_dim), q_rope.dtype),
                pltpu.VMEM((queries, shape.q_width), shape.compute_dtype),
                pltpu.VMEM((config.block_tokens, HEADS, rank), q_latent.dtype),
                pltpu.VMEM((shape.value_rows, chunk_tokens), shape.compute_dtype),
                pltpu.VMEM((SUBLANES, queries), jnp.int32),
                pltpu.VMEM((SUBLANES, queries), jnp.float32),
                pltpu.VMEM((shape.value_rows, queries), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        input_output_aliases={5: 0},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        name="paged_prefill",
        interpret=interpret,
    )(scalars, seq_lens, query_start_loc, block_tables.reshape(-1), factors, q_latent, q_rope, pages)
