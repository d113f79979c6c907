# SPDX-License-Identifier: Apache-2.0
"""Products with quantized weights that are divided among devices."""

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from tpu_inference.kernels.forms import implementation_for
from tpu_inference.kernels.quantized_matmul import Packed, quantized_matmul
from tpu_inference.layers.common.sharding import LogicalAxes, spec


def quantized_product(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    axes: LogicalAxes,
    mesh: Mesh,
    accumulate_dtype: Any,
    activations: str | None = None,
    zero_points: jax.Array | None = None,
    packed: Packed | None = None,
    layer: jax.Array | None = None,
) -> jax.Array:
    """`quantized_matmul` of [T, in] with weights [out, in] whose dimensions are named `axes`; parts of sums meet in `accumulate_dtype`.

    Every device multiplies what it has by itself: of int8 activations, each device rounding its own columns, neither maxima nor int32 sums
    cross the interconnect. With `layer`, an int32 scalar, arrays have those of several layers; of a slice of them a kernel would be
    given a copy.
    """
    rows, columns = spec(axes)
    multiply = partial(
        quantized_matmul,
        activations=activations,
        packed=packed,
        accumulate_dtype=accumulate_dtype,
        implementation=implementation_for(mesh.devices.flat[0]),
    )
    if mesh.size == 1:
        return multiply(x, values, scales, zero_points=zero_points, layer=layer)

    def of_shard(
        x: jax.Array, values: jax.Array, scales: jax.Array, zero_points: jax.Array | None, layer: jax.Array | None
    ) -> jax.Array:
        y = multiply(x, values, scales, zero_points=zero_points, layer=layer)
        return y if columns is None else jax.lax.psum(y.astype(accumulate_dtype), columns).astype(x.dtype)

    stacked = () if layer is None else (None,)
    of_groups = PartitionSpec(*stacked, rows, columns if scales.shape[-1] > 1 else None)
    return jax.shard_map(
        of_shard,
        mesh=mesh,
        in_specs=(
            PartitionSpec(None, columns), PartitionSpec(*stacked, rows, columns), of_groups, of_groups, PartitionSpec(),
        ),
        out_specs=PartitionSpec(None, rows),
        check_vma=False,
    )(x, values, scales, zero_points, layer)  # fmt: skip
