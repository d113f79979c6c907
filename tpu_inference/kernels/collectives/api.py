# SPDX-License-Identifier: Apache-2.0
"""The public ops. Each is called within `jax.shard_map` (with check_vma=False) on a named axis of n devices, by all of them."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.collectives.config import (
    GATHER,
    SCATTER,
    GatherConfig,
    ReduceScatterConfig,
    ShapeKey,
    config_for,
    misfit,
)
from tpu_inference.kernels.collectives.exchange import ragged_all_to_all_pallas
from tpu_inference.kernels.collectives.gather import all_gather_matmul_pallas
from tpu_inference.kernels.collectives.reference import (
    all_gather_matmul_reference,
    matmul_reduce_scatter_reference,
    ragged_all_to_all_reference,
)
from tpu_inference.kernels.collectives.scatter import matmul_reduce_scatter_pallas
from tpu_inference.kernels.forms import Implementation, chip_of

_INTERPRET = {"pallas": False, "pallas_interpret": pltpu.InterpretParams()}
_PLAIN = ("xla", "reference")


def all_gather_matmul(
    x: jax.Array,
    weight: jax.Array,
    *,
    axis_name: str,
    implementation: Implementation = "xla",
    config: GatherConfig | None = None,
) -> jax.Array:
    """All devices' rows times this device's part of a weight, [out, in] as checkpoints have it: [T, out / n] in x's dtype, summed in float32.

    Args:
        x: [T / n, in], bfloat16 or float32: this device's rows.
        weight: [out / n, in], in x's dtype.
        axis_name: of the mesh; the devices' order along it is that of rows, and neighbours in it should be so in the torus.
        implementation: "pallas" (TPU), "pallas_interpret", or "xla" and "reference": XLA's all-gather, then a product. See `form_of`.
        config: blocks of the kernel; None for those tuned for the shape and chip, else the heuristic's.

    Raises:
        ValueError: shapes or dtypes that do not fit, or that the kernel does not serve.
    """
    size = _check(x, weight, axis_name, implementation)
    if implementation in _PLAIN or size == 1:
        return all_gather_matmul_reference(x, weight, axis_name)
    key = ShapeKey.of(x, weight, size, gathers=True)
    _serve(key, GATHER)
    config = config or config_for(key, GATHER, chip_of(implementation))
    if size % config.shards or key.out % config.block_out:
        raise ValueError(f"{config} does not divide {size} devices and {key.out} outputs")
    if config.slots < min(2, key.out // config.block_out) or (config.alone and config.shards < 2):
        raise ValueError(f"{config} has too few slots, or a share alone that is alone anyhow")
    return all_gather_matmul_pallas(x, weight, axis_name, config=config, interpret=_INTERPRET[implementation])


def matmul_reduce_scatter(
    x: jax.Array,
    weight: jax.Array,
    *,
    axis_name: str,
    sum_dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: Implementation = "xla",
    config: ReduceScatterConfig | None = None,
) -> jax.Array:
    """This device's rows of a product whose inner dimension is cut over devices: [T / n, out] in x's dtype.

    Args:
        x: [T, in / n], bfloat16 or float32.
        weight: [out, in / n], in x's dtype.
        axis_name: as in `all_gather_matmul`.
        sum_dtype: of sums on their way between devices: float32, or bfloat16, which halves what is sent and rounds n - 1 times. Products are
            summed in float32 in any case.
        implementation: "pallas" (TPU), "pallas_interpret", or "xla" and "reference": a product, then XLA's reduce-scatter.
        config: as in `all_gather_matmul`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or that the kernel does not serve.
    """
    size = _check(x, weight, axis_name, implementation)
    if sum_dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"sum_dtype {sum_dtype} is neither float32 nor bfloat16")
    if x.shape[0] % size:
        raise ValueError(f"{x.shape[0]} rows are not a multiple of {size} devices")
    if implementation in _PLAIN or size == 1:
        return matmul_reduce_scatter_reference(x, weight, axis_name, sum_dtype)
    key = ShapeKey.of(x, weight, size)
    _serve(key, SCATTER)
    config = config or config_for(key, SCATTER, chip_of(implementation))
    if key.rows % config.block_rows or key.out % config.block_out:
        raise ValueError(f"{config} does not divide {key.rows} rows a device and {key.out} outputs")
    return matmul_reduce_scatter_pallas(
        x, weight, axis_name, sum_dtype, config=config, interpret=_INTERPRET[implementation]
    )


def ragged_all_to_all(
    x: jax.Array,
    sizes: jax.Array,
    *,
    axis_name: str,
    capacity: int | None = None,
    implementation: Implementation = "xla",
) -> tuple[jax.Array, jax.Array]:
    """Rows to the devices that they are for: tokens to experts, and back with `sizes` the second result of the way there.

    Args:
        x: [M, H], rows for device 0, then those for device 1, and so on. M > 0; rows after the last are for none.
        sizes: int32 [n], rows for each device; may be 0, and M in all at most.
        axis_name: of the mesh.
        capacity: rows of the result; None for n M, the most that can arrive. Of more than that, the last ones are dropped, on no other device's cost.
        implementation: "pallas" (TPU), "pallas_interpret", or "xla" and "reference": all rows to all devices.

    Returns:
        [capacity, H], the rows that came, by device, in the order that they had there; rows after them are unspecified, and may not be finite
        int32 [n], how many came from each device

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    size = jax.lax.axis_size(axis_name)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"x {x.shape} is not [M, H] with M > 0")
    if x.dtype.itemsize not in (2, 4):
        raise ValueError(f"x of {x.dtype} is not of 2 or 4 bytes a number")
    if sizes.shape != (size,) or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"sizes {sizes.dtype}{sizes.shape} are not an integer for each of {size} devices")
    capacity = size * x.shape[0] if capacity is None else capacity
    if capacity < 1:
        raise ValueError(f"capacity {capacity} is not positive")
    _check_implementation(implementation)
    asked = jax.lax.all_gather(sizes.astype(jnp.int32), axis_name)
    before = jnp.cumsum(asked, axis=0) - asked
    sent = jnp.clip(capacity - before, 0, asked)
    arrived = sent[:, jax.lax.axis_index(axis_name)]
    if implementation in _PLAIN:
        return ragged_all_to_all_reference(x, asked, sent, capacity, axis_name), arrived
    interpret = _INTERPRET[implementation]
    return ragged_all_to_all_pallas(x, asked, sent, capacity, axis_name, interpret=interpret), arrived


def _check_implementation(implementation: str) -> None:
    if implementation not in (*_PLAIN, *_INTERPRET):
        raise ValueError(f"implementation={implementation!r} is none of {sorted((*_PLAIN, *_INTERPRET))}")


def _check(x: jax.Array, weight: jax.Array, axis_name: str, implementation: str) -> int:
    """Devices of the axis."""
    _check_implementation(implementation)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or not x.shape[0]:
        raise ValueError(f"x {x.shape} and weight {weight.shape} are not [T, in] and [out, in]")
    if x.dtype not in (jnp.bfloat16, jnp.float32) or weight.dtype != x.dtype:
        raise ValueError(f"x of {x.dtype} and weight of {weight.dtype} are not both bfloat16 or both float32")
    return jax.lax.axis_size(axis_name)


def _serve(key: ShapeKey, part: str) -> None:
    if why := misfit(key, part):
        raise ValueError(f"{part} of {key} is not served by the kernel: {why}; take implementation='xla'")
