# SPDX-License-Identifier: Apache-2.0
"""The form for every platform: a loop over tiles of rows of one group."""

import jax
import jax.numpy as jnp

TILE = 64
"""Rows of a product at most."""


def _of_group(weights: jax.Array, group: jax.Array) -> jax.Array:
    """`weights[group]`; of bfloat16 as float32, by integers: XLA's CPU backend would move a conversion ahead of the loop, to all groups."""
    if weights.dtype != jnp.bfloat16:
        return weights[group]
    weights, group = jax.lax.optimization_barrier((weights, group))
    bits = jax.lax.bitcast_convert_type(weights, jnp.uint16)[group]
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def grouped_matmul_xla(
    x: jax.Array, weights: jax.Array, group_sizes: jax.Array, scales: jax.Array | None, first_group: jax.Array | int
) -> jax.Array:
    """As the op; `scales` [E, groups of columns, out]. As many steps as there are tiles with rows."""
    rows, out, num_groups = x.shape[0], weights.shape[1], len(group_sizes)
    tile = max(min(TILE, -(-2 * rows // num_groups)), 2)
    sizes = group_sizes.astype(jnp.int32)
    tiles = -(-sizes // tile)
    until, starts = jnp.cumsum(tiles), jnp.cumsum(sizes) - sizes
    x = jnp.pad(x, ((0, tile), (0, 0)))

    def step(i: jax.Array, result: jax.Array) -> jax.Array:
        group = jnp.searchsorted(until, i, side="right")
        row = starts[group] + (i - (until[group] - tiles[group])) * tile
        mine, weight = jax.lax.dynamic_slice_in_dim(x, row, tile), _of_group(weights, first_group + group)
        if scales is None:
            product = _dot(mine, weight)
        else:
            parts = scales.shape[1]
            product = sum(
                _dot(a, b) * s
                for a, b, s in zip(
                    jnp.split(mine, parts, 1), jnp.split(weight, parts, 1), scales[group][:, None], strict=True
                )
            )
        # Rows of the next group are overwritten by its own tile, which comes later.
        return jax.lax.dynamic_update_slice_in_dim(result, product.astype(x.dtype), row, 0)

    return jax.lax.fori_loop(0, until[-1], step, jnp.zeros((rows + tile, out), x.dtype))[:rows]


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    dims = (((1,), (1,)), ((), ()))
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    return jax.lax.dot_general(x, weight, dims, precision=jax.lax.Precision.HIGHEST)
