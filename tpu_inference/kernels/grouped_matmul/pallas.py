# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel: a walk over the (group, block of rows) pairs, for one block of outputs after the other.

Neighbouring pairs share a weight or a block of rows, and only what changes is fetched: each weight of a group with rows goes through HBM once,
those of empty groups never. Weights are fetched by the kernel itself, a few groups ahead: a group of many blocks keeps none waiting.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.grouped_matmul.config import LANES, MIB, Config, ShapeKey
from tpu_inference.kernels.grouped_matmul.units import Units, num_units, units

NAME = "grouped_matmul"
ScalesIn = Literal["outputs", "blocks"] | None
CHUNK = 1024
"""Columns of weights that are multiplied out at a time; whole groups."""
BIAS_FACTOR = 16
"""What numbers of float8_e4m3fn are of those that float8_e4m3b11fnuz has by the same bits."""
SPARE_VMEM_BYTES = 4 * MIB
"""For what the compiler keeps beside the blocks."""


def _body(*refs: Any, scales_in: ScalesIn, rebias: bool, direct: bool, blocked: "_Blocked", per_group: int) -> None:
    """One pair of one block of outputs."""
    scalars = Units(*refs[: len(Units._fields)])
    x, weights, *scales = refs[len(Units._fields) : -3]
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

        weight = buffers.at[jax.lax.rem(place, blocked.slots)]
        if scales_in == "blocks":
            scale = partial(_scale, scales[0], part * (blocked.out // LANES))
            product = _product_of_blocks(x, weight, scale, per_group, blocked.transposed, rebias)
        else:
            values, factors = weight[...], scales[0][0] if scales else None
            if rebias:
                values, factors = pltpu.bitcast(values, jnp.float8_e4m3b11fnuz), factors * BIAS_FACTOR
            values = values if direct else values.astype(x.dtype)
            product = _product(x[...], values, factors, per_group, blocked.transposed)
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
    if scales is None:
        return _dot(x, weight, transposed)
    parts = [slice(i, i + per_group) for i in range(0, x.shape[1], per_group)]
    return sum(
        _dot(x[:, part], weight[part] if transposed else weight[:, part], transposed) * scales[i : i + 1]
        for i, part in enumerate(parts)
    )


def _dot(x: Any, weight: Any, transposed: bool) -> Any:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    if x.dtype == jnp.float32 or weight.dtype.itemsize > 1 or weight.dtype == jnp.int8:
        weight = weight.astype(x.dtype)  # float8 goes into the matrix units as it is
    return jax.lax.dot_general(
        x, weight, (((1,), (0 if transposed else 1,)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _scale(scales: Any, first: Any, block: int, group: int) -> Any:
    return scales[0, jnp.minimum(first + block, scales.shape[1] - 1), group]


def _product_of_blocks(
    x: Any, weight: Any, scale: Callable[[int, int], Any], per_group: int, transposed: bool, rebias: bool
) -> Any:
    """The same of references, and of scalars for each block of 128 outputs and `per_group` columns.

    Weights are multiplied out in x's dtype: products of a block's depth would use half of the matrix unit, and their sums more of the vector unit
    than weights of few rows do.
    """
    out, total = weight.shape[1 if transposed else 0], None
    for start in range(0, x.shape[1], CHUNK):
        columns = [
            slice(i, min(i + per_group, x.shape[1])) for i in range(start, min(start + CHUNK, x.shape[1]), per_group)
        ]
        strips = []
        for i in range(0, out, LANES):
            rows = slice(i, min(i + LANES, out))
            blocks = (
                _converted(weight[(part, rows) if transposed else (rows, part)], x.dtype, rebias)
                * (scale(i // LANES, part.start // per_group) * (BIAS_FACTOR if rebias else 1)).astype(x.dtype)
                for part in columns
            )
            strips.append(jnp.concatenate([*blocks], axis=0 if transposed else 1))
        whole = jnp.concatenate(strips, axis=1 if transposed else 0)
        product = _dot(x[:, columns[0].start : columns[-1].stop], whole, transposed)
        total = product if total is None else total + product
    return total


def _converted(weight: Any, dtype: Any, rebias: bool) -> Any:
    """In `dtype`; where `rebias`, divided by BIAS_FACTOR."""
    return (pltpu.bitcast(weight, jnp.float8_e4m3b11fnuz) if rebias else weight).astype(dtype)


@partial(jax.jit, static_argnames=("transposed", "blocks", "rebias", "direct", "config", "interpret"))
def grouped_matmul_pallas(
    x: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    scales: jax.Array | None,
    first_group: jax.Array | int = 0,
    *,
    transposed: bool = False,
    blocks: bool = False,
    rebias: bool = False,
    direct: bool = True,
    config: Config,
    interpret: Any,
) -> jax.Array:
    """As the op.

    Args:
        scales: [E, groups of columns, out], or of `blocks` of 128 outputs [E, out / 128, groups of columns].
        rebias: weights of float8_e4m3fn are read as float8_e4m3b11fnuz, which chips before tpu7x have in their matrix units, or convert in one
            instruction.
        direct: whether float8 goes into the matrix units as it is where scales are not of blocks; else it is converted.
    """
    (rows, columns), out, num_groups = x.shape, weights.shape[2 if transposed else 1], len(group_sizes)
    tile = LANES if transposed else 32 // weights.dtype.itemsize
    key = ShapeKey.of(x, weights, num_groups, transposed=transposed)
    config = config.within(key, rows, transposed=transposed)
    blocked = _Blocked(num_groups, out, config.block_rows, config.block_out, config.slots, tile, transposed)
    num_blocks = -(-rows // blocked.rows)
    padded = num_blocks * blocked.rows
    if padded > rows:
        x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    in_specs = [
        pl.BlockSpec((blocked.rows, columns), lambda j, u, groups, blocks, *_: (blocks[u], 0)),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    scales_in: ScalesIn = None if scales is None else "blocks" if blocks else "outputs"
    per_group = columns if scales is None else columns // scales.shape[2 if blocks else 1]
    if scales_in == "outputs":
        in_specs.append(pl.BlockSpec((1, scales.shape[1], blocked.out), lambda j, u, groups, *_: (groups[u], 0, j)))
    elif scales_in == "blocks":
        size = (1, *scales.shape[1:])
        in_specs.append(pl.BlockSpec(size, lambda j, u, groups, *_: (groups[u], 0, 0), memory_space=pltpu.SMEM))
    limit = key.vmem_bytes(config) + SPARE_VMEM_BYTES
    result = pl.pallas_call(
        partial(
            _body,
            scales_in=scales_in,
            rebias=rebias and weights.dtype == jnp.float8_e4m3fn,
            direct=direct,
            blocked=blocked,
            per_group=per_group,
        ),
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
