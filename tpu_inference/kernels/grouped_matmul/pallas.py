# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel: a walk over the (group, block of rows) pairs, for one block of outputs after the other.

Neighbouring pairs share a weight or a block of rows, and only what changes is fetched: each weight of a group with rows goes through HBM once, those of
empty groups never. Weights of the next group are in flight while those of this one are multiplied by.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.grouped_matmul.config import MIB, Config, ShapeKey
from tpu_inference.kernels.grouped_matmul.units import num_units, units

NAME = "grouped_matmul"
SPARE_VMEM_BYTES = 4 * MIB
"""For what the compiler keeps beside the blocks."""


def _body(
    groups: Any, blocks: Any, starts: Any, total: Any, x: Any, weights: Any, *rest: Any, block_rows: int, per_group: int
) -> None:
    """One pair. `rest`: the scales of the weights, where they have any; then the block of outputs."""
    *scales, out = rest
    unit = pl.program_id(1)

    @pl.when(unit < total[0])
    def _() -> None:
        group, first = groups[unit], blocks[unit] * block_rows
        product = _product(x[...], weights[0], scales[0][0] if scales else None, per_group)
        row = first + jax.lax.broadcasted_iota(jnp.int32, product.shape, 0)
        mine = (row >= starts[group]) & (row < starts[group + 1])
        # Rows of other groups were put there by earlier pairs, or will be by later ones.
        out[...] = jnp.where(mine, product.astype(out.dtype), out[...])


def _product(x: Any, weight: Any, scales: Any | None, per_group: int) -> Any:
    """[rows, in] x [out, in] -> float32 [rows, out]; scales [in / per_group, out]."""

    def dot(x: Any, weight: Any) -> Any:
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jax.lax.dot_general(
            x, weight.astype(x.dtype), (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    if scales is None:
        return dot(x, weight)
    parts = [slice(i, i + per_group) for i in range(0, x.shape[1], per_group)]
    return sum(dot(x[:, part], weight[:, part]) * scales[i : i + 1] for i, part in enumerate(parts))


@partial(jax.jit, static_argnames=("config", "interpret"))
def grouped_matmul_pallas(
    x: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    scales: jax.Array | None,
    *,
    config: Config,
    interpret: Any,
) -> jax.Array:
    """As the op; `scales` [E, groups of columns, out]."""
    (rows, columns), (num_groups, out, _) = x.shape, weights.shape
    config = config.within(rows, x.dtype)
    block_rows, block_out = config.block_rows, min(config.block_out, out)
    num_blocks = -(-rows // block_rows)
    padded = num_blocks * block_rows
    if padded > rows:
        x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    prefetched = units(group_sizes, num_blocks, block_rows)
    in_specs = [
        pl.BlockSpec((block_rows, columns), lambda j, u, groups, blocks, *_: (blocks[u], 0)),
        pl.BlockSpec((1, block_out, columns), lambda j, u, groups, *_: (groups[u], j, 0)),
    ]
    if scales is not None:
        in_specs.append(
            pl.BlockSpec((1, scales.shape[1], block_out), lambda j, u, groups, *_: (groups[u], 0, j)),
        )
    per_group = columns if scales is None else columns // scales.shape[1]
    limit = ShapeKey.of(x, weights).vmem_bytes(config) + SPARE_VMEM_BYTES
    result = pl.pallas_call(
        partial(_body, block_rows=block_rows, per_group=per_group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(-(-out // block_out), num_units(num_groups, num_blocks)),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((block_rows, block_out), lambda j, u, groups, blocks, *_: (blocks[u], j)),
        ),
        out_shape=jax.ShapeDtypeStruct((padded, out), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=max(limit, 16 * MIB)
        ),
        name=NAME,
        interpret=interpret,
    )(*prefetched, x, weights, *(() if scales is None else (scales,)))
    return result[:rows]
