# SPDX-License-Identifier: Apache-2.0
"""The truth: every query against every key, masked. Memory grows with Tq x Tk."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def visible_keys(
    queries: jax.Array,
    num_keys: int,
    segments: tuple[jax.Array, jax.Array] | None,
    *,
    causal: bool,
    sliding_window: int | None,
) -> jax.Array:
    """bool [B or 1, len(queries), num_keys]: whom the queries at those positions see; segments are of those queries and of all keys."""
    ahead = jnp.arange(num_keys) - queries[:, None]  # of the query, the key
    visible = ahead <= 0 if causal else jnp.ones_like(ahead, bool)
    if sliding_window is not None:
        visible &= jnp.abs(ahead) < sliding_window
    if segments is None:
        return visible[None]
    return visible & (segments[0][:, :, None] == segments[1][:, None])


def flash_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    *,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """As `api.flash_attention`; `segments` are those of q and of k. float32."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.astype(jnp.float32).repeat(group, axis=1) for x in (k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q.astype(jnp.float32), k, precision=HIGHEST) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    queries = jnp.arange(q.shape[2])
    visible = visible_keys(queries, k.shape[2], segments, causal=causal, sliding_window=sliding_window)[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    # Where all are masked they weigh the same.
    return jnp.einsum("bhqk,bhkd->bhqd", jnp.where(visible, weights, 0), v, precision=HIGHEST)
