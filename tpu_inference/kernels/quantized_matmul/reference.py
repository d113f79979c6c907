# SPDX-License-Identifier: Apache-2.0
"""The readable truth."""

from typing import Any

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def dequantize(values: jax.Array, scales: jax.Array) -> jax.Array:
    """float32 [out, in]."""
    return values.astype(jnp.float32) * jnp.repeat(scales, values.shape[1] // scales.shape[1], axis=1)


def round_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 [T, in], float32 [T, 1]) whose product is about x."""
    x = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), 1e-12) / 127
    return jnp.round(x / scales).astype(jnp.int8), scales


def quantized_matmul_reference(
    x: jax.Array, values: jax.Array, scales: jax.Array, *, activations: str | None, accumulate_dtype: Any
) -> jax.Array:
    """See `quantized_matmul`; everything in float32."""
    del accumulate_dtype
    rows = x.astype(jnp.float32)
    if activations:
        rounded, row_scales = round_rows(x)
        rows = rounded.astype(jnp.float32) * row_scales
    return jnp.dot(rows, dequantize(values, scales).T, precision=HIGHEST).astype(x.dtype)
