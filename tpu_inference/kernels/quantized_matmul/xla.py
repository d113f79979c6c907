# SPDX-License-Identifier: Apache-2.0
"""By XLA, which converts weights on their way into the matrix unit: on TPU they are read from HBM as they are stored."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.quantized_matmul.packing import BLOCK, HALF, ZERO, halves, nibbles, numbers
from tpu_inference.kernels.quantized_matmul.reference import HIGHEST, round_rows

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
    packed: str | None = None,
    zero_points: jax.Array | None = None,
) -> jax.Array:
    """See `quantized_matmul`."""
    if layer is None:
        values, scales, layer = values[None], scales[None], jnp.int32(0)
        zero_points = None if zero_points is None else zero_points[None]
    if packed:
        corrections = None if zero_points is None else (zero_points[layer] - ZERO) * scales[layer]
        return _packed(x, values, scales[layer], corrections, layer, packed, accumulate_dtype)
    scales, groups, columns = scales[layer], scales.shape[2], values.shape[2]
    if groups > 1 and x.shape[0] <= MOST_ROWS_BY_GROUP and columns // groups >= LEAST_GROUP:
        return _by_group(x, values, scales, layer).astype(x.dtype)
    values = values[layer]
    if activations:
        rounded, row_scales = round_rows(x, activations)
        whole = jnp.int32 if activations == "int8" else jnp.float32
        product = _dot(rounded, values, whole).astype(jnp.float32) * row_scales
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


def _packed(
    x: jax.Array, values: jax.Array, scales: jax.Array, corrections: jax.Array | None, layer: jax.Array, packed: str, accumulate_dtype: Any,
) -> jax.Array:  # fmt: skip
    """Of values of four bits: number * scale - correction.

    The two nibbles of a byte meet their columns of x in products of their own: XLA would write down a weight that is put together of both.
    """
    groups, columns = scales.shape[1], x.shape[1]
    size = columns // groups
    if x.shape[0] == 1 and x.dtype == jnp.bfloat16 and accumulate_dtype == jnp.float32:
        # As above: summed as it is read.
        weights = _scaled(values[layer], scales, corrections, packed)
        pairs = zip(halves(x.astype(jnp.float32)), weights, strict=True)
        return sum(half * weight for half, weight in pairs).sum(1)[None].astype(x.dtype)
    if groups == 1:
        pairs = zip(halves(x), nibbles(values[layer]), strict=True)
        product = sum(_dot(half, numbers(codes, packed).astype(x.dtype), accumulate_dtype) for half, codes in pairs)
        product = product.astype(jnp.float32) * scales[:, 0]
    elif x.shape[0] <= MOST_ROWS_BY_GROUP and (size == HALF or size % BLOCK == 0):
        product = _packed_by_group(x, values, scales, layer, packed)
    else:
        weights = _scaled(values[layer], scales, corrections, packed)
        products = (
            _dot(half, weight.astype(x.dtype), accumulate_dtype)
            for half, weight in zip(halves(x), weights, strict=True)
        )
        return sum(products).astype(x.dtype)
    if corrections is not None:
        sums = x.astype(jnp.float32).reshape(-1, groups, size).sum(2)
        product -= jnp.dot(sums, corrections.T, precision=HIGHEST)
    return product.astype(x.dtype)


def _scaled(values: jax.Array, scales: jax.Array, corrections: jax.Array | None, packed: str) -> Iterator[jax.Array]:
    """float32 [out, in / 2], the weights of each nibble."""
    columns = 2 * values.shape[1]
    less = (0, 0) if corrections is None else _of_halves(corrections, columns)
    for codes, scale, correction in zip(nibbles(values), _of_halves(scales, columns), less, strict=True):
        yield numbers(codes, packed) * scale - correction


def _of_halves(of_groups: jax.Array, columns: int) -> tuple[jax.Array, jax.Array]:
    """[out, in / 2] each, for `halves` of the columns, of [out, groups]: moved before they are repeated, since XLA writes down what it moves."""
    size = columns // of_groups.shape[1]
    if HALF % size == 0:
        blocks = of_groups.reshape(of_groups.shape[0], -1, 2, HALF // size)
        low, high = (jnp.repeat(blocks[:, :, i].reshape(blocks.shape[0], -1), size, axis=1) for i in range(2))
        return low, high
    if size % BLOCK == 0:
        return (jnp.repeat(of_groups, size // 2, axis=1),) * 2
    return halves(jnp.repeat(of_groups, size, axis=1))


def _packed_by_group(x: jax.Array, values: jax.Array, scales: jax.Array, layer: jax.Array, packed: str) -> jax.Array:
    """float32 [T, out]. As `_by_group`; a group is one nibble of some bytes, or both."""
    (_, out, _), groups = values.shape, scales.shape[1]
    size = x.shape[1] // groups
    width, total = max(size // 2, HALF), jnp.zeros((x.shape[0], out), jnp.float32)
    for group in range(groups):
        codes = nibbles(
            jax.lax.dynamic_slice(values, (layer, 0, group * size // (2 * width) * width), (1, out, width))[0]
        )
        columns = x[:, group * size : (group + 1) * size]
        pairs = [(columns, codes[group % 2])] if size == HALF else zip(halves(columns), codes, strict=True)
        for half, nibble in pairs:
            total += _dot(half, numbers(nibble, packed).astype(x.dtype), jnp.float32) * scales[:, group]
    return total
