# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel: a walk over the (group, block of rows) pairs, for one block of outputs after the other.

Neighbouring pairs share a weight or a block of rows, and only what changes is fetched: each weight of a group with rows goes through HBM once,
those of empty groups never. Weights are fetched by the kernel itself, a few groups ahead: a group of many blocks keeps none waiting.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.grouped_matmul.config import LANES, MIB, Config, ShapeKey
from tpu_inference.kernels.grouped_matmul.units import Units, num_units, units

NAME = "grouped_matmul"
SPARE_VMEM_BYTES = 4 * MIB
"""For what the compiler keeps beside the blocks."""


def _body(*refs: Any, num_scales: int, blocked: "_Blocked", per_group: int) -> None:
    """One pair of one block of outputs."""
    scalars = Units(*refs[: len(Units._fields)])
    x, weights, *scales = refs[len(Units._fields) : len(Units._fields) + 2 + num_scales]
    out, buffers, arrived = refs[-3:]
    part, unit = pl.program_id(0), pl.program_id(1)
    num_pairs, num_items = scalars.totals[0], scalars.totals[1]
    item = scalars.items[unit]
    place = part * num_items + item  # in the list of what is fetched

    def fetch(place: Any, do: str) -> None:
        """Start or wait for the `place`th weight."""
        part = jax.lax.div(place, jnp.maximum(num_items, 1))
        group = scalars.item_groups[jnp.clip(place - part * num_items, 0, blocked.num_groups - 1)]
        slot = jax.lax.rem(place, blocked.slots)
        for here, size in blocked.sizes(part):

            @pl.when(here & (part < blocked.num_parts) & (num_items > 0))
            def _(size: int = size) -> None:
                outputs = pl.ds(pl.multiple_of(part * blocked.out, blocked.alignment), size), pl.ds(0, size)
                source, target = ((slice(None), at) if blocked.transposed else (at,) for at in outputs)
                copy = pltpu.make_async_copy(
                    weights.at[scalars.totals[2] + group, *source], buffers.at[slot, *target], arrived.at[slot]
                )
                getattr(copy, do)()

    @pl.when((part == 0) & (unit == 0))
    def _() -> None:
        for ahead in range(blocked.slots - 1):
            fetch(jnp.int32(ahead), "start")

    @pl.when(unit < num_pairs)
    def _() -> None:
        group = scalars.groups[unit]

        @pl.when((unit == 0) | (scalars.items[jnp.maximum(unit - 1, 0)] != item))
        def _() -> None:
            fetch(place + blocked.slots - 1, "start")  # into the slot of the weight before this one
            fetch(place, "wait")

        weight = buffers[jax.lax.rem(place, blocked.slots)]
        product = _product(x[...], weight, scales[0][0] if scales else None, per_group, blocked.transposed)
        row = scalars.blocks[unit] * blocked.rows + jax.lax.broadcasted_iota(jnp.int32, product.shape, 0)
        mine = (row >= scalars.starts[group]) & (row < scalars.starts[group + 1])
        # Rows of other groups were put there by earlier pairs, or will be by later ones.
        out[...] = jnp.where(mine, product.astype(out.dtype), out[...])


@dataclass(frozen=True)
class _Blocked:
    """What is static about the kernel."""

    num_groups: int
    total_out: int
    rows: int
    """Of a block."""
    out: int
    """Of a block."""
    slots: int
    alignment: int
    """Of first outputs: rows of a tile of weights, or lanes."""
    transposed: bool

    @property
    def num_parts(self) -> int:
        return -(-self.total_out // self.out)

    def sizes(self, part: Any) -> list[tuple[Any, int]]:
        """(whether it is so, outputs of the block): the last one may be shorter."""
        last = self.total_out - (self.num_parts - 1) * self.out
        if last == self.out:
            return [(True, last)]
        return [(part < self.num_parts - 1, self.out), (part == self.num_parts - 1, last)]


def _product(x: Any, weight: Any, scales: Any | None, per_group: int, transposed: bool) -> Any:
    """[rows, in] x [out, in] (transposed: [in, out]) -> float32 [rows, out]; scales [in / per_group, out]."""

    def dot(x: Any, weight: Any) -> Any:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jax.lax.dot_general(
            x, weight.astype(x.dtype), (((1,), (0 if transposed else 1,)), ((), ())), precision=precision,
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    if scales is None:
        return dot(x, weight)
    parts = [slice(i, i + per_group) for i in range(0, x.shape[1], per_group)]
    return sum(
        dot(x[:, part], weight[part] if transposed else weight[:, part]) * scales[i : i + 1]
        for i, part in enumerate(parts)
    )


@partial(jax.jit, static_argnames=("transposed", "config", "interpret"))
def grouped_matmul_pallas(
    x: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    scales: jax.Array | None,
    first_group: jax.Array | int = 0,
    *,
    transposed: bool = False,
    config: Config,
    interpret: Any,
) -> jax.Array:
    """As the op; `scales` [E, groups of columns, out]."""
    (rows, columns), out, num_groups = x.shape, weights.shape[2 if transposed else 1], len(group_sizes)
    tile = LANES if transposed else 32 // weights.dtype.itemsize
    config = config.within(rows, out, x.dtype)
    blocked = _Blocked(num_groups, out, config.block_rows, config.block_out, config.slots, tile, transposed)
    num_blocks = -(-rows // blocked.rows)
    padded = num_blocks * blocked.rows
    if padded > rows:
        x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    in_specs = [
        pl.BlockSpec((blocked.rows, columns), lambda j, u, groups, blocks, *_: (blocks[u], 0)),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    if scales is not None:
        in_specs.append(
            pl.BlockSpec((1, scales.shape[1], blocked.out), lambda j, u, groups, *_: (groups[u], 0, j)),
        )
    per_group = columns if scales is None else columns // scales.shape[1]
    limit = ShapeKey.of(x, weights, num_groups, transposed=transposed).vmem_bytes(config) + SPARE_VMEM_BYTES
    result = pl.pallas_call(
        partial(_body, num_scales=len(in_specs) - 2, blocked=blocked, per_group=per_group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Units._fields),
            grid=(blocked.num_parts, num_units(num_groups, num_blocks)),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((blocked.rows, blocked.out), lambda j, u, groups, blocks, *_: (blocks[u], j)),
            scratch_shapes=[
                pltpu.VMEM(
                    (blocked.slots, *((columns, blocked.out) if transposed else (blocked.out, columns))), weights.dtype
                ),
                pltpu.SemaphoreType.DMA((blocked.slots,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((padded, out), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=max(limit, 16 * MIB)
        ),
        name=NAME,
        interpret=interpret,
    )(
        *units(group_sizes, num_blocks, blocked.rows, first_group=first_group),
        x,
        weights,
        *(() if scales is None else (scales,)),
    )
    return result[:rows]
