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
    FEW_ROWS,
    LEAST_VMEM_LIMIT,
    SPARE_VMEM_BYTES,
    GatherConfig,
    ShapeKey,
    tile_rows,
)
from tpu_inference.kernels.collectives.ring import Ring
from tpu_inference.kernels.collectives.scatter import WAYS, dot

NAME = "all_gather_matmul"
COLLECTIVE_ID = 10


@dataclass(frozen=True)
class _Blocked:
    """What is static about the kernel."""

    ring: Ring
    rows: int
    """Of a share."""
    tile: int
    config: GatherConfig
    blocks: int
    """Of outputs."""

    @property
    def shards(self) -> int:
        return self.config.shards

    @property
    def block(self) -> int:
        return self.config.block_out

    @property
    def passes(self) -> int:
        return self.ring.size // self.shards + self.config.alone

    @property
    def fetches(self) -> int:
        """Of blocks of weights: once each where all have a slot."""
        return self.blocks * (1 if self.config.slots >= self.blocks else self.passes)

    def first(self, turn: Any) -> Any:
        """Which of the shares, in order of arrival, is a pass's first."""
        if not self.config.alone:
            return turn * self.shards
        if isinstance(turn, int):
            return min(turn, 1) if turn < 2 else (turn - 1) * self.shards
        return jnp.where(turn < 2, turn, (turn - 1) * self.shards)

    def count(self, turn: Any) -> Any:
        """Shares of a pass."""
        return self.first(turn + 1) - self.first(turn) if self.config.alone else self.shards

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
        return min(self.hops, self.first(turn + 1) // 2)

    def hops_within(self, turn: int) -> list[tuple[int, int]]:
        """(hop, block before which it is waited for and the next is sent) of a pass: those that the next pass needs, spread."""
        first, last = self.hops_for(turn), self.hops_for(turn + 1)
        count = last - first
        return [(first + i, max((i * self.blocks) // count - 1, 0)) for i in range(1, count + 1)]

    def pieces(self) -> tuple[int, int]:
        """(shares, rows of each) that are multiplied at a time."""
        if self.rows > FEW_ROWS // 2 or self.config.alone or self.shards == 1:
            sizes = [d for d in range(self.tile, self.rows + 1, self.tile) if self.rows % d == 0]
            return 1, max(d for d in sizes if d == self.tile or d <= FEW_ROWS)
        counts = [d for d in range(1, self.shards + 1) if self.shards % d == 0]
        return max(d for d in counts if d * self.rows <= FEW_ROWS), self.rows


class _Kernel:
    """The stages. x [rows, in] is the own share; gathered [n, rows, in] in HBM; weights [slots, block, in] in VMEM, xs [2, shards,
    rows, in] of a pass and outs [2, shards, rows, block] of a block."""

    def __init__(self, blocked: _Blocked, *refs: Any) -> None:
        self.b = blocked
        self.x, self.weight, self.out, self.gathered, self.xs, self.weights, self.outs = refs[:7]
        self.sent, self.received, self.loaded, self.fetched, self.stored = refs[7:]

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

    def fetch(self, unit: Any, do: str) -> None:
        """Start or wait for a unit's block of weights, where it is not there from an earlier pass."""
        block, slot = jax.lax.rem(unit, self.b.blocks), self.slot(unit)

        @pl.when(unit < self.b.fetches)
        def _() -> None:
            source = self.weight.at[pl.ds(pl.multiple_of(block * self.b.block, self.b.block), self.b.block)]
            getattr(pltpu.make_async_copy(source, self.weights.at[slot], self.fetched.at[slot]), do)()

    def slot(self, unit: Any) -> jax.Array:
        return jax.lax.rem(unit, min(self.b.config.slots, self.b.blocks))

    def load(self, turn: Any, do: str) -> None:
        """Start or wait for the copies of a pass's shares into VMEM."""
        slot = jax.lax.rem(turn, 2)
        for i in range(self.b.shards):
            place = self.b.first(turn) + i
            target, done = self.xs.at[slot, i], self.loaded.at[slot, i]

            def move(source: Any, target: Any = target, done: Any = done) -> None:
                getattr(pltpu.make_async_copy(source, target, done), do)()

            if i == 0:
                pl.when(place == 0)(lambda move=move: move(self.x))
            here = (i < self.b.count(turn)) & (place > 0)
            pl.when(here)(lambda move=move, place=place: move(self.gathered.at[self.share(place)]))

    def store(self, unit: Any, do: str) -> None:
        """Start or wait for the copies of a block's outputs to where their shares are."""
        turn, block, slot = jax.lax.div(unit, self.b.blocks), jax.lax.rem(unit, self.b.blocks), jax.lax.rem(unit, 2)
        columns = pl.ds(pl.multiple_of(block * self.b.block, self.b.block), self.b.block)
        for i in range(self.b.shards):

            @pl.when(i < self.b.count(turn))
            def _(i: int = i) -> None:
                target = self.out.at[self.share(self.b.first(turn) + i), :, columns]
                getattr(pltpu.make_async_copy(self.outs.at[slot, i], target, self.stored.at[slot, i]), do)()

    def multiply(self, turn: Any, unit: Any) -> None:
        """All rows of the pass by the block of weights."""
        b, weights = self.b, self.weights.at[self.slot(unit)]
        slot, out_slot = jax.lax.rem(turn, 2), jax.lax.rem(unit, 2)
        together, rows = b.pieces()
        pieces = b.rows // rows

        def some(i: Any, _: None) -> None:
            shares = pl.ds(jax.lax.div(i, pieces) * together, together)
            at = pl.ds(pl.multiple_of(jax.lax.rem(i, pieces) * rows, b.tile), rows)
            x = self.xs[slot, shares, at].reshape(together * rows, self.xs.shape[3])
            product = dot(x, weights[...]).astype(self.outs.dtype)
            self.outs[out_slot, shares, at] = product.reshape(together, rows, b.block)

        jax.lax.fori_loop(jnp.int32(0), jnp.int32(b.count(turn) // together * pieces), some, None)

    def run(self) -> None:
        b, turn, block = self.b, pl.program_id(0), pl.program_id(1)
        unit, units = turn * b.blocks + block, b.passes * b.blocks

        @pl.when(unit == 0)
        def _() -> None:
            for ahead in range(b.config.slots - 1):
                self.fetch(jnp.int32(ahead), "start")
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
        self.fetch(unit + b.config.slots - 1, "start")  # to where the block before this one was
        self.fetch(unit, "wait")
        self.multiply(turn, unit)
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
    shards, block, slots = config.shards, config.block_out, config.slots
    blocked = _Blocked(Ring(axis_name, size), rows, tile_rows(x.dtype), config, out // block)
    limit = ShapeKey.of(x, weight, size, gathers=True).gather_bytes(config) + SPARE_VMEM_BYTES
    anywhere = pl.BlockSpec(memory_space=pltpu.HBM)
    product, _ = pl.pallas_call(
        lambda *refs: _Kernel(blocked, *refs).run(),
        out_shape=[
            jax.ShapeDtypeStruct((size, rows, out), x.dtype),
            jax.ShapeDtypeStruct((size, rows, columns), x.dtype),
        ],
        grid=(blocked.passes, blocked.blocks),
        in_specs=[anywhere, anywhere],
        out_specs=[anywhere, anywhere],
        scratch_shapes=[
            pltpu.VMEM((2, shards, rows, columns), x.dtype),
            pltpu.VMEM((slots, block, columns), x.dtype),
            pltpu.VMEM((2, shards, rows, block), x.dtype),
            pltpu.SemaphoreType.DMA((2, blocked.hops)),
            pltpu.SemaphoreType.DMA((2, blocked.hops)),
            pltpu.SemaphoreType.DMA((2, shards)),
            pltpu.SemaphoreType.DMA((slots,)),
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
