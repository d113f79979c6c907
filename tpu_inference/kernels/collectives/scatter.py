# SPDX-License-Identifier: Apache-2.0
"""The product whose partial sums go round the ring while the next ones are made.

Outputs are cut into blocks. Each is a reduce-scatter of its own, half of its columns each way round, and they follow each other: in a unit of
the grid the devices multiply block u, and block u - s makes hop s, so that a hop has a whole unit to arrive and weights are read once.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.collectives.config import LEAST_VMEM_LIMIT, SPARE_VMEM_BYTES, ReduceScatterConfig, ShapeKey
from tpu_inference.kernels.collectives.ring import Ring, Way

NAME = "matmul_reduce_scatter"
COLLECTIVE_ID = 11
WAYS: tuple[Way, Way] = (1, -1)
MOST_ROWS = 512
"""Of a product at a time."""


@dataclass(frozen=True)
class _Blocked:
    """What is static about the kernel."""

    ring: Ring
    rows: int
    """Of one device's share, in a block."""
    half: int
    """Columns of a block that go one way."""
    blocks: int
    """Of all outputs."""
    chunks: int
    """Blocks of all groups of rows."""

    @property
    def hops(self) -> int:
        return self.ring.size - 1


def dot(x: Any, weight: Any) -> jax.Array:
    """[T, in] x [out, in] -> float32 [T, out]; float32 exactly."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, precision=precision, preferred_element_type=jnp.float32)


def _body(
    x: Any, weight: Any, out: Any, partial: Any, outgoing: Any, incoming: Any, sent: Any, received: Any, free: Any,
    *, blocked: _Blocked,
) -> None:  # fmt: skip
    """One unit. x [n, rows, in], weight [2 half, in], out [rows, 2 half]; partial [n, n, rows, 2 half] float32 of the last n blocks; outgoing and
    incoming [way, parity of the unit, hop, rows, half]."""
    ring, hops, unit = blocked.ring, blocked.hops, pl.program_id(0)
    last = blocked.chunks + hops - 1
    parity, before = jax.lax.rem(unit, 2), jax.lax.rem(unit + 1, 2)

    def hop(index: int, parity: Any, hop: Any) -> Any:
        return ring.copy(
            outgoing.at[index, parity, hop], incoming.at[index, parity, hop],
            sent.at[index, parity, hop], received.at[index, parity, hop], WAYS[index],
        )  # fmt: skip

    def moves(unit: Any, hop: Any) -> Any:
        """Whether there is a block that makes this hop in this unit."""
        return (unit >= hop) & (unit - hop < blocked.chunks)

    def mine(index: int, chunk: Any, distance: Any) -> jax.Array:
        """This device's part of a sum that has come `distance` devices far, in its direction."""
        columns = pl.ds(index * blocked.half, blocked.half)
        return partial[jax.lax.rem(chunk, ring.size), ring.place(-WAYS[index] * distance), :, columns]

    @pl.when(unit == 0)
    def _() -> None:
        ring.meet_neighbours()

    @pl.when(unit < blocked.chunks)
    def _() -> None:
        _multiply(x, weight, partial, jax.lax.rem(unit, ring.size), blocked)

    # The neighbours are done with what was sent them two units ago.
    @pl.when((unit >= 2) & (unit < last))
    def _() -> None:
        for index in range(2):
            pl.semaphore_wait(free.at[index], 1)

    def advance(step: Any, _: None) -> None:
        """Hop `step` of block unit - step."""
        for index in range(2):

            @pl.when((unit >= 2) & moves(unit - 2, step))
            def _(index: int = index) -> None:
                hop(index, parity, step).wait_send()

            @pl.when(moves(unit, step))
            def _(index: int = index) -> None:
                total = mine(index, unit - step, step + 1)

                @pl.when(step == 0)
                def _() -> None:
                    outgoing[index, parity, step] = total.astype(outgoing.dtype)

                @pl.when(step > 0)
                def _() -> None:
                    hop(index, before, step - 1).wait_recv()
                    arrived = incoming[index, before, step - 1].astype(jnp.float32)
                    outgoing[index, parity, step] = (total + arrived).astype(outgoing.dtype)

                hop(index, parity, step).start()

    jax.lax.fori_loop(jnp.int32(0), jnp.int32(hops), advance, None)

    @pl.when(unit >= hops)
    def _() -> None:
        for index in range(2):
            hop(index, before, hops - 1).wait_recv()
            total = mine(index, unit - hops, 0) + incoming[index, before, hops - 1].astype(jnp.float32)
            out[:, pl.ds(index * blocked.half, blocked.half)] = total.astype(out.dtype)

    # What came in the unit before has been read. Not said of the last two: nobody waits for that.
    @pl.when((unit >= 1) & (unit < last - 1))
    def _() -> None:
        for index in range(2):
            ring.signal(free.at[index], ring.place(-WAYS[index]))

    @pl.when(unit == last)
    def _() -> None:
        for index in range(2):
            hop(index, before, hops - 1).wait_send()


def _multiply(x: Any, weight: Any, partial: Any, slot: Any, blocked: _Blocked) -> None:
    """All devices' shares of a block."""
    size = blocked.ring.size
    together = max(d for d in range(1, size + 1) if size % d == 0 and (d == 1 or d * blocked.rows <= MOST_ROWS))

    def some(i: Any, _: None) -> None:
        shares = pl.ds(i * together, together)
        rows = x[shares].reshape(together * blocked.rows, x.shape[2])
        partial[slot, shares] = dot(rows, weight[...]).reshape(together, blocked.rows, 2 * blocked.half)

    jax.lax.fori_loop(jnp.int32(0), jnp.int32(size // together), some, None)


def matmul_reduce_scatter_pallas(
    x: jax.Array, weight: jax.Array, axis_name: str, sum_dtype: Any, *, config: ReduceScatterConfig, interpret: Any
) -> jax.Array:
    """As the op, for two devices or more, and shapes that `misfit` finds nothing against."""
    size = jax.lax.axis_size(axis_name)
    (total_rows, columns), out = x.shape, weight.shape[0]
    share = total_rows // size
    rows, block = config.block_rows, config.block_out
    blocked = _Blocked(Ring(axis_name, size), rows, block // 2, out // block, out // block * (share // rows))
    hops = size - 1

    def chunk(unit: Any) -> Any:
        return jnp.minimum(unit, blocked.chunks - 1)

    def made(unit: Any) -> Any:
        return jnp.maximum(unit - hops, 0)

    buffers = pltpu.VMEM((2, 2, hops, rows, block // 2), sum_dtype)
    key = ShapeKey.of(x, weight, size)
    limit = key.reduce_scatter_bytes(config, jnp.dtype(sum_dtype).itemsize) + SPARE_VMEM_BYTES
    return pl.pallas_call(
        lambda *refs: _body(*refs, blocked=blocked),
        out_shape=jax.ShapeDtypeStruct((share, out), x.dtype),
        grid=(blocked.chunks + hops,),
        in_specs=[
            pl.BlockSpec((size, rows, columns), lambda unit: (0, chunk(unit) // blocked.blocks, 0)),
            pl.BlockSpec((block, columns), lambda unit: (jax.lax.rem(chunk(unit), blocked.blocks), 0)),
        ],
        out_specs=pl.BlockSpec(
            (rows, block), lambda unit: (made(unit) // blocked.blocks, jax.lax.rem(made(unit), blocked.blocks))
        ),
        scratch_shapes=[
            pltpu.VMEM((size, size, rows, block), jnp.float32),
            buffers,
            buffers,
            pltpu.SemaphoreType.DMA((2, 2, hops)),
            pltpu.SemaphoreType.DMA((2, 2, hops)),
            pltpu.SemaphoreType.REGULAR((2,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), collective_id=COLLECTIVE_ID, vmem_limit_bytes=max(limit, LEAST_VMEM_LIMIT)
        ),
        name=NAME,
        interpret=interpret,
    )(x.reshape(size, share, columns), weight)  # fmt: skip
