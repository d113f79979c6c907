# SPDX-License-Identifier: Apache-2.0
"""Logical axes and the one table that maps them to mesh axes.

Modules name what a dimension *is* ("heads", "mlp", "vocab"); this table says where it lives for the chosen parallelism. No model
file contains a mesh-axis name.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
MODEL_AXIS = "model"
MESH_AXES = (DATA_AXIS, MODEL_AXIS)

LogicalAxes = Sequence[str | None]

RULES: dict[str, str | None] = {
    "embed": None,
    "heads": MODEL_AXIS,
    "kv_heads": MODEL_AXIS,
    "head_dim": None,
    "mlp": MODEL_AXIS,
    "vocab": MODEL_AXIS,
    "experts": MODEL_AXIS,
    "layers": None,
    "tokens": None,
    "pages": None,
}


def make_mesh(devices: Sequence[jax.Device], tensor_parallel: int) -> Mesh:
    """A (data=1, model=tensor_parallel) mesh over the first `tensor_parallel` devices.

    Raises ValueError where there are fewer devices than that.
    """
    if len(devices) < tensor_parallel:
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel} needs as many devices, and JAX sees {len(devices)}. "
            "Lower --tensor-parallel-size or use a larger slice."
        )
    grid = np.asarray(devices[:tensor_parallel], dtype=object).reshape(1, tensor_parallel)
    return Mesh(grid, MESH_AXES)


def spec(axes: LogicalAxes) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions are named `axes` (None: not sharded). KeyError for an unknown name."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def named_sharding(mesh: Mesh, axes: LogicalAxes) -> NamedSharding:
    """`spec(axes)` on `mesh`."""
    return NamedSharding(mesh, spec(axes))


def sharding_where_it_divides(mesh: Mesh, axes: LogicalAxes, shape: Sequence[int]) -> NamedSharding:
    """`named_sharding(mesh, axes)`, or the whole array on every device where `shape` does not divide among them."""
    sharding = named_sharding(mesh, axes)
    parts = (1 if axis is None else mesh.shape[axis] for axis in sharding.spec)
    return named_sharding(mesh, ()) if any(size % n for size, n in zip(shape, parts, strict=True)) else sharding


def shard_bytes(array: jax.ShapeDtypeStruct | jax.Array) -> int:
    """What a sharded array takes on each device."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
