# SPDX-License-Identifier: Apache-2.0
"""ALiBi (Press et al., 2022) as features of queries and keys, so that no attention kernel knows it."""

import jax
import jax.numpy as jnp

FEATURES = 2
"""Head dims that ALiBi adds."""
_RADIX = 256
"""Positions are two digits of it, each a whole number that bf16 holds exactly: up to 65536 tokens."""


def with_alibi(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, slopes: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lengthen heads so that `scale * q·k` gains `slope * key position`.

    ALiBi adds `slope * (key position - query position)`; the query's part is the same for all of its keys, and softmax drops it.

    Args:
        q: [T, num_heads, head_dim].
        k, v: [T, num_kv_heads, head_dim].
        positions: int32 [T].
        slopes: float32 [num_heads].
        scale: that attention is called with.

    Returns:
        q, k and v with head_dim + FEATURES; those of v are zero.
    """
    weights = jnp.stack([slopes * (_RADIX / scale), slopes / scale], axis=-1)
    digits = jnp.stack([positions // _RADIX, positions % _RADIX], axis=-1)

    def lengthened(x: jax.Array, features: jax.Array) -> jax.Array:
        features = jnp.broadcast_to(features, (*x.shape[:2], FEATURES))
        return jnp.concatenate([x, features.astype(x.dtype)], axis=-1)

    return lengthened(q, weights[None]), lengthened(k, digits[:, None]), lengthened(v, jnp.zeros((1, 1, FEATURES)))
