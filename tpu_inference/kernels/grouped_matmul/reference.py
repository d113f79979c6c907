# SPDX-License-Identifier: Apache-2.0
"""The truth: every row by every weight, and then its own."""

import jax
import jax.numpy as jnp


def grouped_matmul_reference(
    x: jax.Array, weights: jax.Array, group_sizes: jax.Array, scales: jax.Array | None, first_group: jax.Array | int
) -> jax.Array:
    """As the op; `scales` [E, groups of columns, out]. Rows past the last group are zeros."""
    weights = jax.lax.dynamic_slice_in_dim(weights, first_group, len(group_sizes)).astype(jnp.float32)
    if scales is not None:
        weights = weights * jnp.repeat(scales, weights.shape[2] // scales.shape[1], axis=1).swapaxes(1, 2)
    products = jnp.einsum("mi,eoi->emo", x.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST)
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[None]
    mine = (row >= (ends - group_sizes)[:, None]) & (row < ends[:, None])
    return jnp.where(mine[..., None], products, 0).sum(0).astype(x.dtype)
