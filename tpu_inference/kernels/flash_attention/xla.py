# SPDX-License-Identifier: Apache-2.0
"""The op for XLA alone: the scores of a few queries at a time, so that memory does not grow with Tq x Tk."""

import jax
import jax.numpy as jnp

from tpu_inference.kernels.flash_attention.reference import visible_keys

SCORES = 2**22
"""At a time, of all heads: 16 MiB."""


def flash_attention_xla(
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
    batch, heads, length, dim = q.shape
    chunk = min(max(SCORES // (batch * heads * k.shape[2]), 1), length)
    padding = -length % chunk
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    q = q.reshape(batch, k.shape[1], -1, (length + padding) // chunk, chunk, dim)  # [B, K, G, chunks, chunk, D]
    ids = None if segments is None else jnp.pad(segments[0], ((0, 0), (0, padding))).reshape(batch, -1, chunk)

    def attend(index: jax.Array) -> jax.Array:
        scores = jnp.einsum("bkgqd,bksd->bkgqs", q[:, :, :, index], k, preferred_element_type=jnp.float32) * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        here = None if segments is None else (ids[:, index], segments[1])
        queries = index * chunk + jnp.arange(chunk)
        visible = visible_keys(queries, k.shape[2], here, causal=causal, sliding_window=sliding_window)[:, None, None]
        top = jnp.where(visible, scores, -1e30).max(axis=-1, keepdims=True)
        weights = jnp.where(visible, jnp.exp(scores - top), 0)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bkgqs,bksd->bkgqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return out / jnp.where(total > 0, total, 1)

    out = jax.lax.map(attend, jnp.arange(q.shape[3]))  # [chunks, B, K, G, chunk, D]
    return jnp.moveaxis(out, 0, 3).reshape(batch, heads, -1, dim)[:, :, :length]
