# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel.

Scores are transposed: keys along sublanes, queries along lanes. The maximum over keys is then a tree of plain vector maxima, and both products give
the matrix units their full width. What limits them is the rate at which results leave: a register of scores costs one of its own, and 9/16 of one of
output (rows of ones below the transposed V make the unit sum the weights); scores the other way round would cost two.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.flash_attention.blocks import Blocks, Kind, ranges
from tpu_inference.kernels.flash_attention.config import LANES, TILE, Config

MASKED = -1e30
FLOOR = -1e29
"""Of a running maximum: far above MASKED, so that exp2(MASKED - maximum) is 0 even where all is masked."""
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
SUBLANES = 8


@dataclass(frozen=True)
class Shape:
    """What is static about a call."""

    blocks: Blocks
    head_dim: int
    heads: int
    kv_heads: int
    """Of a block, as are `heads`."""
    scale: float
    soft_cap: float | None
    dtype: Any
    ahead: int

    @property
    def flipped(self) -> bool:
        """Whether arrays are [B, heads, head_dim, T], which is how XLA keeps those whose head_dim would need padding to the lanes."""
        return self.head_dim % LANES > 0

    @property
    def rows(self) -> int:
        """Of V transposed, with at least one of ones."""
        return (self.head_dim // 16 + 1) * 16

    @property
    def precision(self) -> Any:
        """Of the matrix products."""
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None


def _tiles(length: int) -> list[pl.Slice]:
    return [pl.ds(start, min(TILE, length - start)) for start in range(0, length, TILE)]


class _Flash:
    """The kernel's body, in stages; one instance a trace."""

    def __init__(self, shape: Shape, refs: dict[str, Any]) -> None:
        self.shape, self.blocks = shape, shape.blocks
        self.__dict__.update(refs)
        self.batch, self.i, self.j = (pl.program_id(axis) for axis in (0, 2, 3))
        self.first_q = self.i * self.blocks.block_q
        self.first_k = self.blocks.key_block(self.i, self.j) * self.blocks.block_k
        self.dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=shape.precision)

    def _segments(self) -> tuple[Any, Any]:
        """`apart` and `several` of `Blocks.kinds`, as far as the least and the greatest segment tell."""
        if not self.blocks.segmented:
            return False, False
        q_blocks, k_blocks = self.blocks.grid
        q = self.batch * q_blocks + self.i
        k = self.batch * k_blocks + self.blocks.fetched_block(self.i, self.j)
        q_min, q_max, k_min, k_max = self.q_min[q], self.q_max[q], self.k_min[k], self.k_max[k]
        return (q_min > k_max) | (k_min > q_max), (q_min != q_max) | (k_min != k_max)

    def _visible(self, kind: Kind, q: pl.Slice, k: pl.Slice) -> Any:
        """Of a tile of scores, those whose query sees their key; None for all."""
        key = k.start + jax.lax.broadcasted_iota(jnp.int32, (k.size, q.size), 0)
        query = q.start + jax.lax.broadcasted_iota(jnp.int32, (1, q.size), 1)
        if kind is not None:
            return key + kind <= query if k.start + k.size + kind > q.start + 1 else None
        first, stop = self.blocks.seen(self.first_q + query)
        visible = (key >= first - self.first_k) & (key < stop - self.first_k)
        if self.blocks.segmented:
            visible &= self.q_segment[0, :, q] == self.k_segment[0, :, k].T
        return visible

    # Arithmetic.

    def begin(self) -> None:
        # Scores are powers of two: one multiplication fewer for each of them.
        self.q[...] = (self.q_in[0].astype(jnp.float32) * (self.shape.scale * LOG2_E)).astype(self.q.dtype)
        self.top[...] = jnp.full_like(self.top, FLOOR)
        self.acc[...] = jnp.zeros_like(self.acc)

    def _load(self, head: int) -> None:
        """A KV head's keys as rows and values as columns, with ones below."""
        shape, blocks = self.shape, self.blocks
        values = self.v_in[0, head]
        if shape.flipped:
            self.k[head] = self.k_in[0, head].T
        else:
            values = values.T
        if blocks.ragged:  # what no DMA filled may not be finite, and its weight of 0 would not help
            key = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
            values = jnp.where(key < blocks.num_keys - self.first_k, values, jnp.zeros_like(values))
        ones = shape.head_dim // 16 * 16
        self.v[head, ones:] = jnp.ones((shape.rows - ones, blocks.block_k), self.v.dtype)
        self.v[head, : shape.head_dim] = values

    def _scores(self, kind: Kind, head: int, q: pl.Slice, k: pl.Slice) -> tuple[jax.Array, jax.Array]:
        """(scores [keys, queries] of a tile, the maximum of every eighth row)."""
        shape, kv_head = self.shape, head * self.shape.kv_heads // self.shape.heads
        if shape.flipped:
            scores = self.dot(self.k[kv_head, k], self.q[head, :, q], (((1,), (0,)), ((), ())))
        else:
            scores = self.dot(self.k_in[0, kv_head, k], self.q[head, q], (((1,), (1,)), ((), ())))
        if shape.soft_cap is not None:
            scores = (shape.soft_cap * LOG2_E) * jnp.tanh(scores * (LN_2 / shape.soft_cap))
        visible = self._visible(kind, q, k)
        if visible is not None:
            scores = jnp.where(visible, scores, MASKED)
        return scores, _by_rows(scores).max(axis=0)

    def _accumulate(self, head: int, q: pl.Slice, k: pl.Slice, scores: jax.Array, top: jax.Array) -> None:
        """The running softmax of the tile's queries, after its keys; maxima are the same in all eight rows."""
        kv_head = head * self.shape.kv_heads // self.shape.heads
        old = self.top[head, :, q]
        top = jnp.maximum(old, jnp.broadcast_to(top.max(axis=0, keepdims=True), top.shape))
        # A power of bfloat16 costs v6e and tpu7x half of one of float32, and is rounded to it for the product anyway.
        weights = jnp.exp2((_by_rows(scores) - top).reshape(scores.shape).astype(self.v.dtype))
        out = self.dot(self.v[kv_head, :, k], weights, (((1,), (0,)), ((), ())))
        acc = _by_rows(self.acc[head, :, q]) * jnp.exp2(old - top) + _by_rows(out)
        self.top[head, :, q], self.acc[head, :, q] = top, acc.reshape(out.shape)

    def attend(self, kind: Kind) -> None:
        """The block, tile by tile, as one stretch of code: the compiler's scheduler sees no further."""
        for head in range(self.shape.kv_heads):
            self._load(head)
        heads, queries, keys = range(self.shape.heads), _tiles(self.blocks.block_q), _tiles(self.blocks.block_k)
        # Neighbours are of different heads or queries, and so are independent.
        todo = [
            (head, q, k)
            for k in keys
            for head in heads
            for q in queries
            if kind is None or k.start + kind < q.start + q.size
        ]
        scores: list[tuple[jax.Array, jax.Array]] = []
        for step in range(len(todo) + self.shape.ahead):
            if step < len(todo):
                scores.append(self._scores(kind, *todo[step]))
            if step >= self.shape.ahead:
                self._accumulate(*todo[step - self.shape.ahead], *scores.pop(0))

    def finish(self) -> None:
        dim = self.shape.head_dim
        for head in range(self.shape.heads):
            total = self.acc[head, dim : dim + 1]
            out = (self.acc[head, :dim] * jnp.where(total > 0, 1 / total, 0)).astype(self.out.dtype)
            self.out[0, head] = out if self.shape.flipped else out.T

    def run(self) -> None:
        pl.when(self.j == 0)(self.begin)
        for kind, when in self.blocks.kinds(self.first_q, self.first_k, *self._segments()):
            pl.when(when)(partial(self.attend, kind))
        pl.when(self.j == pl.num_programs(3) - 1)(self.finish)


def _by_rows(x: jax.Array) -> jax.Array:
    """[rows, N] as registers of eight rows."""
    return x.reshape(-1, SUBLANES, x.shape[1])


INPUTS, SEGMENTS, RANGES = ("q_in", "k_in", "v_in"), ("q_segment", "k_segment"), ("q_min", "q_max", "k_min", "k_max")
OUTPUT_AND_SCRATCH = ("out", "q", "k", "v", "top", "acc")


def flash_attention_pallas(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    soft_cap: float | None,
    config: Config,
    interpret: Any = False,
) -> jax.Array:
    """As `api.flash_attention`, for shapes that it has checked; `segments` are those of q and of k."""
    batch, num_heads, num_queries, head_dim = q.shape
    group, block_q, block_k = num_heads // k.shape[1], config.block_q, config.block_k
    blocks = Blocks(num_queries, k.shape[2], block_q, block_k, causal, sliding_window, segments is not None)
    heads, kv_heads = config.heads, max(config.heads // group, 1)
    shape = Shape(blocks, head_dim, heads, kv_heads, scale, soft_cap, q.dtype, config.ahead)

    def matrices(num_heads: int, length: int) -> tuple[int, ...]:
        return (num_heads, head_dim, length) if shape.flipped else (num_heads, length, head_dim)

    def spec(num_heads: int, length: int, at: Any) -> pl.BlockSpec:
        """Of heads and tokens at those indices of theirs."""

        def index(b: Any, h: Any, i: Any, j: Any, *_: Any) -> tuple[Any, ...]:
            head, block = at(h, i, j)
            return (b, head, 0, block) if shape.flipped else (b, head, block, 0)

        return pl.BlockSpec((1, *matrices(num_heads, length)), index)

    q_spec = spec(heads, block_q, lambda h, i, j: (h, i))
    k_spec = spec(
        kv_heads, block_k, lambda h, i, j: (jax.lax.div(h * heads, group * kv_heads), blocks.fetched_block(i, j))
    )
    names, args, specs, scalars = INPUTS, [q, k, v], [q_spec, k_spec, k_spec], []
    if shape.flipped:
        args = [x.swapaxes(2, 3) for x in args]
    if segments is not None:
        names = (*RANGES, *names, *SEGMENTS)
        scalars = [x for ids, block in zip(segments, (block_q, block_k), strict=True) for x in ranges(ids, block)]
        args += [ids[:, None] for ids in segments]
        specs += [
            pl.BlockSpec((1, 1, block_q), lambda b, h, i, j, *_: (b, 0, i)),
            pl.BlockSpec((1, 1, block_k), lambda b, h, i, j, *_: (b, 0, blocks.fetched_block(i, j))),
        ]

    def body(*refs: Any) -> None:
        _Flash(shape, dict(zip((*names, *OUTPUT_AND_SCRATCH), refs, strict=True))).run()

    out = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(args[0].shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, num_heads // heads, *blocks.grid),
            in_specs=specs,
            out_specs=q_spec,
            scratch_shapes=[
                pltpu.VMEM(matrices(heads, block_q), q.dtype),
                pltpu.VMEM((kv_heads, block_k if shape.flipped else SUBLANES, head_dim), q.dtype),
                pltpu.VMEM((kv_heads, shape.rows, block_k), q.dtype),
                pltpu.VMEM((heads, SUBLANES, block_q), jnp.float32),
                pltpu.VMEM((heads, shape.rows, block_q), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        name="flash_attention",
        interpret=interpret,
    )(*scalars, *args)
    return out.swapaxes(2, 3) if shape.flipped else out
