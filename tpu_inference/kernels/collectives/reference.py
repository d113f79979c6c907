# SPDX-License-Identifier: Apache-2.0
"""The truth, by XLA's own collectives; also what runs where there is no TPU."""

from typing import Any

import jax
import jax.numpy as jnp


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, precision=precision, preferred_element_type=jnp.float32)


def all_gather_matmul_reference(x: jax.Array, weight: jax.Array, axis_name: str) -> jax.Array:
    """Gathers, then multiplies."""
    return _product(jax.lax.all_gather(x, axis_name, tiled=True), weight).astype(x.dtype)


def matmul_reduce_scatter_reference(x: jax.Array, weight: jax.Array, axis_name: str, sum_dtype: Any) -> jax.Array:
    """Multiplies, then sums and scatters."""
    partial = _product(x, weight).astype(sum_dtype)
    return jax.lax.psum_scatter(partial, axis_name, tiled=True).astype(x.dtype)


def ragged_all_to_all_reference(
    x: jax.Array, sizes: jax.Array, sent: jax.Array, capacity: int, axis_name: str
) -> jax.Array:
    """All rows to all devices, each of which takes its own. `sizes` int32 [n, n]: rows from each device to each, as asked for; `sent`: as served."""
    rows = jax.lax.all_gather(x, axis_name)
    me = jax.lax.axis_index(axis_name)
    ends = jnp.cumsum(sent[:, me])
    row = jnp.arange(capacity, dtype=jnp.int32)
    source = jnp.minimum(jnp.searchsorted(ends, row, side="right"), len(ends) - 1)
    first = (jnp.cumsum(sizes, axis=1) - sizes)[:, me]
    place = first[source] + row - (ends - sent[:, me])[source]
    taken = rows[source, jnp.clip(place, 0, x.shape[0] - 1)]
    return jnp.where((row < ends[-1])[:, None], taken, jnp.zeros((), x.dtype))
