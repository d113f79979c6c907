# SPDX-License-Identifier: Apache-2.0
"""The layout of KV cache pages, and how a step's keys and values are written into them."""

from typing import Any

import jax
import jax.numpy as jnp

KV_PAGES_AXES = ("pages", None, "kv_heads", None, "head_dim")
"""Logical axes of the pages: [pages, planes, num_kv_heads, page_size, width]."""
LANES = 128
"""A TPU pads the last dimension of an array to a multiple of this."""


def kv_pages_shape(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, platform: str
) -> tuple[int, int, int, int, int]:
    """Shape of an array of pages on a platform.

    K and V are two planes of `head_dim`. On a TPU, where planes of a head_dim that is no multiple of 128 would be padded (64: to twice the bytes),
    they are one: a token's K, then its V, then zeros up to a multiple of 128.
    """
    if platform == "tpu" and head_dim % LANES:
        return (num_pages, 1, num_kv_heads, page_size, -(-2 * head_dim // LANES) * LANES)
    return (num_pages, 2, num_kv_heads, page_size, head_dim)


def to_planes(k: jax.Array, v: jax.Array, pages: jax.Array) -> tuple[jax.Array, ...]:
    """`k` and `v` [..., head_dim] as what each plane of `pages` holds of them, [..., width]."""
    if pages.shape[1] == 2:
        return k, v
    padding = jnp.zeros((*k.shape[:-1], pages.shape[-1] - k.shape[-1] - v.shape[-1]), k.dtype)
    return (jnp.concatenate([k, v, padding], axis=-1),)


def from_planes(kv: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """K and V [..., head_dim] of `kv` [planes, ..., width]."""
    if kv.shape[0] == 2:
        return kv[0], kv[1]
    return kv[0, ..., :head_dim], kv[0, ..., head_dim : 2 * head_dim]


_BITS = {jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.uint16), jnp.dtype(jnp.float8_e4m3fn): jnp.dtype(jnp.uint8)}
_FLOATS = {bits: dtype for dtype, bits in _BITS.items()}
_E4M3B11 = jnp.dtype(jnp.float8_e4m3b11fnuz)
_KNOWS_E4M3FN = ("TPU7x",)


def storage_dtype(dtype: Any, device: jax.Device) -> Any:
    """What pages of `dtype` are stored as on a device.

    XLA's CPU backend updates arrays of short floats by converting all of them to float32 and back, so there their bits are kept as integers.
    TPUs before the seventh generation read the format of e4m3fn with another bias in one instruction, and e4m3fn itself in many.
    """
    dtype = jnp.dtype(dtype)
    if device.platform == "cpu":
        return _BITS.get(dtype, dtype)
    if dtype == jnp.float8_e4m3fn and not device.device_kind.startswith(_KNOWS_E4M3FN):
        return _E4M3B11
    return dtype


def stored_scale(storage: Any) -> float:
    """What numbers are divided by on their way into pages, on top of their scale: the difference of the two biases."""
    return 16.0 if storage == _E4M3B11 else 1.0


def encode(x: jax.Array, storage: Any) -> jax.Array:
    """`x` as pages of `storage` dtype hold it."""
    if storage in _FLOATS:
        return jax.lax.bitcast_convert_type(x.astype(_FLOATS[storage]), storage)
    return x.astype(storage)


def quantize(x: jax.Array, scale: jax.Array | float, storage: Any) -> jax.Array:
    """`x / scale` within the range of pages of `storage` dtype, in x's dtype; `encode` or a kernel rounds it."""
    scaled = x.astype(jnp.float32) / scale
    if storage == jnp.int8:
        return jnp.clip(jnp.round(scaled), -128, 127).astype(x.dtype)
    limit = float(jnp.finfo(jnp.float8_e4m3fn).max) / stored_scale(storage)
    return jnp.clip(scaled, -limit, limit).astype(x.dtype)


def decode(stored: jax.Array) -> jax.Array:
    """float32 of what `encode` made."""
    if stored.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
    if stored.dtype in _FLOATS:
        return jax.lax.bitcast_convert_type(stored, _FLOATS[stored.dtype]).astype(jnp.float32)
    return stored.astype(jnp.float32)


def token_rows(query_start_loc: jax.Array, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """For each token its row (int32 [T]) and whether it is not padding (bool [T])."""
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    rows = jnp.searchsorted(query_start_loc, tokens, side="right").astype(jnp.int32) - 1
    num_rows = query_start_loc.shape[0] - 1
    return jnp.minimum(rows, num_rows - 1), tokens < query_start_loc[-1]


def write_kv(
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    page_offset: int | jax.Array,
) -> jax.Array:
    """`pages` with `k` and `v` [T, num_kv_heads, head_dim] of the real tokens written. Shapes as in `ragged_paged_attention`."""
    num_tokens, page_size = k.shape[0], pages.shape[3]
    rows, real = token_rows(query_start_loc, num_tokens)
    positions = seq_lens[rows] - query_start_loc[rows + 1] + jnp.arange(num_tokens, dtype=jnp.int32)
    page = block_tables[rows, jnp.where(real, positions, 0) // page_size] + page_offset
    slot = positions % page_size
    kv = encode(jnp.stack(to_planes(k, v, pages), axis=1), pages.dtype)

    def at_once(pages: jax.Array) -> jax.Array:
        out_of_range = jnp.where(real, page, pages.shape[0])
        return pages.at[out_of_range, :, :, slot, :].set(kv, mode="drop")

    def one_by_one(pages: jax.Array) -> jax.Array:
        """XLA scatters into a transposed copy of all pages on TPU; this stays in place."""

        def write(token: jax.Array, pages: jax.Array) -> jax.Array:
            new = jax.lax.dynamic_index_in_dim(kv, token)[:, :, :, None]
            return jax.lax.dynamic_update_slice(pages, new, (page[token], 0, 0, slot[token], 0))

        return jax.lax.fori_loop(0, query_start_loc[-1], write, pages)

    return jax.lax.platform_dependent(pages, tpu=one_by_one, default=at_once)
