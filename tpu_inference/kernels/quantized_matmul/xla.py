# SPDX-License-Identifier: Apache-2.0
"""By XLA, which converts weights on their way into the matrix unit: on TPU they are read from HBM as they are stored."""

from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.quantized_matmul.reference import round_rows

MOST_ROWS_BY_GROUP, LEAST_GROUP = 256, 128
"""Up to so many rows, groups of so many columns or more are multiplied one by one: cheaper on TPU than to scale the weights."""


def _dot(x: jax.Array, weight: jax.Array, dtype: Any) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype)


def quantized_matmul_xla(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    activations: str | None,
    accumulate_dtype: Any,
    layer: jax.Array | None = None,
) -> jax.Array:
    """See `quantized_matmul`."""
    if layer is None:
        values, scales, layer = values[None], scales[None], jnp.int32(0)
    scales, groups, columns = scales[layer], scales.shape[2], values.shape[2]
    if groups > 1 and x.shape[0] <= MOST_ROWS_BY_GROUP and columns // groups >= LEAST_GROUP:
        return _by_group(x, values, scales, layer).astype(x.dtype)
    values = values[layer]
    if activations:
        rounded, row_scales = round_rows(x)
        product = _dot(rounded, values, jnp.int32).astype(jnp.float32) * row_scales
    elif groups == 1 and x.shape[0] == 1 and x.dtype == jnp.bfloat16 and accumulate_dtype == jnp.float32:
        # One row on the CPU backend: summed as it is read, where a product would convert the whole weight first.
        product = (values.astype(jnp.float32) * x.astype(jnp.float32)).sum(1)[None]
    elif groups == 1:
        product = _dot(x, values.astype(x.dtype), accumulate_dtype)
    else:
        every = jnp.repeat(scales, columns // groups, axis=1)
        return _dot(x, (values.astype(jnp.float32) * every).astype(x.dtype), accumulate_dtype).astype(x.dtype)
    return (product.astype(jnp.float32) * scales[:, 0]).astype(x.dtype)


def _by_group(x: jax.Array, values: jax.Array, scales: jax.Array, layer: jax.Array) -> jax.Array:
    """float32 [T, out], group by group, each read where it lies in the stack."""
    (_, out, columns), groups = values.shape, scales.shape[1]
    size = columns // groups
    total = jnp.zeros((x.shape[0], out), jnp.float32)
    for group in range(groups):
        start = group * size
        weight = jax.lax.dynamic_slice(values, (layer, 0, start), (1, out, size))[0]
        total += _dot(x[:, start : start + size], weight.astype(x.dtype), jnp.float32) * scales[:, group]
    return total
