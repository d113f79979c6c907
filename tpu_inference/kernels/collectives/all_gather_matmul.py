# SPDX-License-Identifier: Apache-2.0
"""The product of rows that come round the ring while those that have come are multiplied.

A device multiplies its own share first, then those of its neighbours on both sides, and so on outwards. Shares arrive in HBM, each at its place, so
that nothing that comes can overwrite what is in use; of the last one, opposite, half comes from each side.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.collectives.config import (
    FEW_ROWS, LEAST_VMEM_LIMIT, SPARE_VMEM_BYTES, GatherConfig, ShapeKey, _tile_rows,
)  # fmt: skip
from tpu_inference.kernels.collectives.matmul_reduce_scatter import WAYS, dot
from tpu_inference.kernels.collectives.ring import Ring

NAME = "all_gather_matmul"
COLLECTIVE_ID = 10


@dataclass(frozen=True)
class _Blocked:
    """What is static about the kernel."""

    ring: Ring
    rows: int
    """Of a share."""
    tile: int
    shards: int
    """Of a pass over the weights."""
    block: int
    blocks: int
    """Of outputs."""

    @property
    def passes(self) -> int:
        return self.ring.size // self.shards

    @property
    def hops(self) -> int:
        return self.ring.size // 2

    def part(self, hop: int, index: int) -> tuple[int, int]:
        """(first row, rows) of what goes one of the ways in a hop, the first of which is 1; no rows where nothing does."""
        if self.ring.size % 2 or hop < self.hops:
            return 0, self.rows
        half = -(-self.rows // 2 // self.tile) * self.tile
        return (0, half) if index == 0 else (half, self.rows - half)

    def hops_for(self, turn: int) -> int:
        """How many hops bring all shares of a pass: the i-th share, own one first, comes with hop ceil(i / 2)."""
        return min(self.hops, ((turn + 1) * self.shards) // 2)

    def hops_within(self, turn: int) -> list[tuple[int, int]]:
        """(hop, block before which it is waited for and the next is sent) of a pass: those that the next pass needs, spread."""
        first, last = self.hops_for(turn), self.hops_for(turn + 1)
        count = last - first
        return [(first + i, max((i * self.blocks) // count - 1, 0)) for i in range(1, count + 1)]


class _Kernel:
    """The stages. x [rows, in] is the own share; gathered [n, rows, in] in HBM; xs [2, shards, rows, in] of a pass and outs [2, shards, rows,
    block] of a block, in VMEM."""

    def __init__(self, blocked: _Blocked, *refs: Any) -> None:
        self.b = blocked
        (self.x, self.weight, self.out, self.gathered, self.xs, self.outs) = refs[:6]
        (self.sent, self.received, self.loaded, self.stored) = refs[6:]

    def hop(self, hop: int, index: int) -> Any | None:
        """What this device sends in a hop; waiting for its arrival is waiting for the other neighbour's."""
        start, size = self.b.part(hop, index)
        if not size:
            return None
        share, rows = self.b.ring.place(-WAYS[index] * (hop - 1)), pl.ds(start, size)
        source = self.x.at[rows] if hop == 1 else self.gathered.at[share, rows]
        sent, received = self.sent.at[index, hop - 1], self.received.at[index, hop - 1]
        return self.b.ring.copy(source, self.gathered.at[share, rows], sent, received, WAYS[index])

    def start(self, hop: int) -> None:
        for index in range(2):
            if copy := self.hop(hop, index):
                copy.start()

    def arrive(self, hop: int) -> None:
        """Wait for a hop and send on what it brought."""
        for index in range(2):
            if copy := self.hop(hop, index):
                copy.wait_recv()
        if hop < self.b.hops:
            self.start(hop + 1)

    def share(self, i: Any) -> jax.Array:
        """Which one comes i-th."""
        distance = jax.lax.div(i + 1, 2)
        return self.b.ring.place(jnp.where(jax.lax.rem(i, 2) == 1, -distance, distance))

    def load(self, turn: Any, do: str) -> None:
        """Start or wait for the copies of a pass's shares into VMEM."""
        slot = jax.lax.rem(turn, 2)
        for i in range(self.b.shards):
            place = turn * self.b.shards + i
            target, done = self.xs.at[slot, i], self.loaded.at[slot, i]

            def move(source: Any, target: Any = target, done: Any = done) -> None:
                getattr(pltpu.make_async_copy(source, target, done), do)()

            if i:
                move(self.gathered.at[self.share(place)])
                continue
            pl.when(place == 0)(lambda move=move: move(self.x))
            pl.when(place > 0)(lambda move=move, place=place: move(self.gathered.at[self.share(place)]))

    def store(self, unit: Any, do: str) -> None:
        """Start or wait for the copies of a block's outputs to where their shares are."""
        turn, block, slot = jax.lax.div(unit, self.b.blocks), jax.lax.rem(unit, self.b.blocks), jax.lax.rem(unit, 2)
        columns = pl.ds(pl.multiple_of(block * self.b.block, self.b.block), self.b.block)
        for i in range(self.b.shards):
            target = self.out.at[self.share(turn * self.b.shards + i), :, columns]
            getattr(pltpu.make_async_copy(self.outs.at[slot, i], target, self.stored.at[slot, i]), do)()

    def multiply(self, slot: Any, out_slot: Any) -> None:
        """All rows of the pass by the block of weights."""
        b = self.b
        together = max(d for d in range(1, b.shards + 1) if b.shards % d == 0 and (d == 1 or d * b.rows <= FEW_ROWS))
        rows = b.rows if together > 1 else max(d for d in range(b.tile, b.rows + 1, b.tile) if b.rows % d == 0 and (d == b.tile or d <= FEW_ROWS))
        pieces = b.rows // rows

        def some(i: Any, _: None) -> None:
            shares = pl.ds(jax.lax.div(i, pieces) * together, together)
            at = pl.ds(pl.multiple_of(jax.lax.rem(i, pieces) * rows, b.tile), rows)
            x = self.xs[slot, shares, at].reshape(together * rows, self.xs.shape[3])
            product = dot(x, self.weight[...]).astype(self.outs.dtype)
            self.outs[out_slot, shares, at] = product.reshape(together, rows, b.block)

        jax.lax.fori_loop(jnp.int32(0), jnp.int32(b.shards // together * pieces), some, None)

    def run(self) -> None:
        b, turn, block = self.b, pl.program_id(0), pl.program_id(1)
        unit, units = turn * b.blocks + block, b.passes * b.blocks

        @pl.when(unit == 0)
        def _() -> None:
            b.ring.meet_neighbours()
            self.start(1)
            for hop in range(1, b.hops_for(0) + 1):
                self.arrive(hop)
            self.load(turn, "start")

        for other in range(b.passes - 1):
            for hop, before in b.hops_within(other):
                pl.when((turn == other) & (block == before))(lambda hop=hop: self.arrive(hop))

        pl.when((block == b.blocks - 1) & (turn + 1 < b.passes))(lambda: self.load(turn + 1, "start"))
        pl.when(block == 0)(lambda: self.load(turn, "wait"))
        pl.when(unit >= 2)(lambda: self.store(unit - 2, "wait"))
        self.multiply(jax.lax.rem(turn, 2), jax.lax.rem(unit, 2))
        self.store(unit, "start")

        @pl.when(unit == units - 1)
        def _() -> None:
            if units > 1:
                self.store(unit - 1, "wait")
            self.store(unit, "wait")
            for hop in range(1, b.hops + 1):
                for index in range(2):
                    if copy := self.hop(hop, index):
                        copy.wait_send()


def all_gather_matmul_pallas(
    x: jax.Array, weight: jax.Array, axis_name: str, *, config: GatherConfig, interpret: Any
) -> jax.Array:
    """As the op, for two devices or more, and shapes that `misfit` finds nothing against."""
    size, (rows, columns), out = jax.lax.axis_size(axis_name), x.shape, weight.shape[0]
    shards, block = config.shards, config.block_out
    blocked = _Blocked(Ring(axis_name, size), rows, _tile_rows(x.dtype), shards, block, out // block)
    limit = ShapeKey.of(x, weight, size, gathers=True).gather_bytes(config) + SPARE_VMEM_BYTES
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    product, _ = pl.pallas_call(
        lambda *refs: _Kernel(blocked, *refs).run(),
        out_shape=[
            jax.ShapeDtypeStruct((size, rows, out), x.dtype),
            jax.ShapeDtypeStruct((size, rows, columns), x.dtype),
        ],
        grid=(blocked.passes, blocked.blocks),
        in_specs=[anywhere, pl.BlockSpec((block, columns), lambda turn, block: (block, 0))],
        out_specs=[anywhere, anywhere],
        scratch_shapes=[
            pltpu.VMEM((2, shards, rows, columns), x.dtype),
            pltpu.VMEM((2, shards, rows, block), x.dtype),
            pltpu.SemaphoreType.DMA((2, blocked.hops)),
            pltpu.SemaphoreType.DMA((2, blocked.hops)),
            pltpu.SemaphoreType.DMA((2, shards)),
            pltpu.SemaphoreType.DMA((2, shards)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), collective_id=COLLECTIVE_ID,
            vmem_limit_bytes=max(limit, LEAST_VMEM_LIMIT),
        ),
        name=NAME,
        interpret=interpret,
    )(x, weight)  # fmt: skip
    return product.reshape(size * rows, out)
