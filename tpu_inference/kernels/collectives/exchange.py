# SPDX-License-Identifier: Apache-2.0
"""Rows to the devices that they are for: every device writes into every other one, without a stop between.

How many rows a copy moves is static, so that a count is put together from powers of two.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.collectives.ring import Ring

NAME = "ragged_all_to_all"
COLLECTIVE_ID = 12
MOST_ROWS = 32
"""Of a copy; a power of two."""
SLAB = 8 * 128
"""Numbers that a row is padded to a multiple of: then it is tiles of its own, which a copy may begin and end at."""


def _pieces(count: Any, most: int, do: Any) -> None:
    """Call `do(first, rows)` for what makes up `count` rows: `rows` is static."""
    whole = jax.lax.div(count, most)
    jax.lax.fori_loop(jnp.int32(0), whole, lambda i, _: do(i * most, most), None)
    done, size = whole * most, most // 2
    while size:
        here = (count & size) != 0
        pl.when(here)(lambda done=done, size=size: do(done, size))
        done, size = done + jnp.where(here, size, 0), size // 2


def _body(
    first: Any,
    target: Any,
    sizes: Any,
    coming: Any,
    x: Any,
    out: Any,
    sent: Any,
    received: Any,
    *,
    ring: Ring,
    most: int,
) -> None:
    """Scalars int32: of each device the first row for it here, the first row that these take there, and how many they are; [2]: how many rows
    come in all, and go."""
    ring.meet_all()

    def send(distance: Any, _: None) -> None:
        device = ring.place(distance)

        def move(start: Any, rows: int) -> None:
            source, there = pl.ds(first[device] + start, rows), pl.ds(target[device] + start, rows)
            ring.copy_to(x.at[source], out.at[there], sent, received, device).start()

        _pieces(sizes[device], most, move)

    # The farthest first; one's own rows last.
    jax.lax.fori_loop(jnp.int32(0), jnp.int32(ring.size), lambda i, _: send(ring.size - 1 - i, _), None)

    def wait(semaphore: Any) -> Any:
        # A semaphore counts bytes, whichever rows they are of.
        return lambda _, rows: pltpu.make_async_copy(x.at[pl.ds(0, rows)], x.at[pl.ds(0, rows)], semaphore).wait()

    _pieces(coming[0], most, wait(received))
    _pieces(coming[1], most, wait(sent))


def ragged_all_to_all_pallas(
    x: jax.Array, sizes: jax.Array, sent: jax.Array, capacity: int, axis_name: str, *, interpret: Any
) -> jax.Array:
    """As the op; `sizes` and `sent` int32 [n, n] as the reference has them."""
    ring, (rows, columns) = Ring(axis_name, len(sizes)), x.shape
    me = jax.lax.axis_index(axis_name)
    mine, first = sent[me], jnp.cumsum(sizes[me]) - sizes[me]
    target = (jnp.cumsum(sent, axis=0) - sent)[me]
    totals = jnp.stack([sent[:, me].sum(), mine.sum()])
    width = -(-columns // SLAB) * SLAB
    slabs = jnp.pad(x, ((0, 0), (0, width - columns))).reshape(rows, 8, width // 8)
    most = min(MOST_ROWS, 1 << (min(rows, capacity).bit_length() - 1))
    out = pl.pallas_call(
        lambda *refs: _body(*refs, ring=ring, most=most),
        out_shape=jax.ShapeDtypeStruct((capacity, *slabs.shape[1:]), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA],
        ),
        compiler_params=pltpu.CompilerParams(collective_id=COLLECTIVE_ID, has_side_effects=True),
        name=NAME,
        interpret=interpret,
    )(*(s.astype(jnp.int32) for s in (first, target, mine, totals)), slabs)
    return out.reshape(capacity, width)[:, :columns]
