# SPDX-License-Identifier: Apache-2.0
"""The readable truth."""

from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.quantized_matmul.packing import numbers, unpack

HIGHEST = jax.lax.Precision.HIGHEST
E4M3 = "float8_e4m3fn"


def dequantize(values: jax.Array, scales: jax.Array) -> jax.Array:
    """float32 [out, in]."""
    return values.astype(jnp.float32) * jnp.repeat(scales, values.shape[1] // scales.shape[1], axis=1)


def dequantize_packed(values: jax.Array, scales: jax.Array, packed: str, zero_points: jax.Array | None) -> jax.Array:
    """float32 [out, in] of uint8 [out, in / 2]."""
    codes = unpack(values)
    if zero_points is None:
        return dequantize(numbers(codes, packed), scales)
    return dequantize(codes - jnp.repeat(zero_points, codes.shape[1] // zero_points.shape[1], axis=1), scales)


def round_rows(x: jax.Array, dtype: str = "int8") -> tuple[jax.Array, jax.Array]:
    """([T, in] of int8 or E4M3, float32 [T, 1]) whose product is about x."""
    x = x.astype(jnp.float32)
    scales = jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), 1e-12) / (127 if dtype == "int8" else 448)
    return (jnp.round(x / scales) if dtype == "int8" else x / scales).astype(dtype), scales


def quantized_matmul_reference(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    activations: str | None,
    accumulate_dtype: Any,
    packed: str | None = None,
    zero_points: jax.Array | None = None,
) -> jax.Array:
    """See `quantized_matmul`; everything in float32."""
    del accumulate_dtype
    rows = x.astype(jnp.float32)
    if activations:
        rounded, row_scales = round_rows(x, activations)
        rows = rounded.astype(jnp.float32) * row_scales
    weight = dequantize_packed(values, scales, packed, zero_points) if packed else dequantize(values, scales)
    return jnp.dot(rows, weight.T, precision=HIGHEST).astype(x.dtype)
