# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel, for float8_e4m3fn weights and few rows.

The matrix unit of v6e multiplies by float8_e5m2 as it is, while float8_e4m3fn would be converted value by value. A value of e4m3 is the sum of
two of e5m2, times 128: its bits shifted right by one are its value with the last bit of the mantissa cut off, at another exponent bias, and those of
the next greater code are it rounded up. This holds for subnormal values too; codes of NaN read as 480.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 256
"""Rows of the weight: the width of the matrix unit."""
CHUNK = 1024
"""Columns at a time."""
MOST_ROWS, MOST_COLUMNS = 128, 16384
SUM_SCALE = 128.0
_SIGN = 0x80808080 - 2**32


def serves(x: Any, values: Any, groups: int, activations: str | None) -> bool:
    """Whether the kernel takes arrays of these shapes and dtypes; the XLA form takes all."""
    few = x.shape[0] <= MOST_ROWS and x.shape[1] <= MOST_COLUMNS and x.shape[1] % 128 == 0
    return few and (values.dtype, x.dtype, groups, activations) == (jnp.float8_e4m3fn, jnp.bfloat16, 1, None)


def halves(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float8_e5m2 of the shape of `values`, float8_e4m3fn: values = 128 * (their sum)."""
    bits = pltpu.bitcast(values, jnp.int32)  # four rows in a word
    sign, rest = bits & _SIGN, bits & 0x7F7F7F7F
    down = sign | ((rest & 0x7E7E7E7E) >> 1)
    up = sign | jax.lax.shift_right_logical((rest + 0x01010101) & (0xFEFEFEFE - 2**32), 1)
    return pltpu.bitcast(down, jnp.float8_e5m2), pltpu.bitcast(up, jnp.float8_e5m2)


def _body(x_ref: Any, values_ref: Any, scales_ref: Any, out_ref: Any) -> None:
    columns, total = x_ref.shape[1], None
    for start in range(0, columns, CHUNK):
        part = slice(start, min(start + CHUNK, columns))
        x = x_ref[:, part]
        for half in halves(values_ref[:, part]):
            product = jax.lax.dot_general(x, half, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
            total = product if total is None else total + product
    out_ref[...] = (total * (scales_ref[...] * SUM_SCALE)).astype(out_ref.dtype)


def quantized_matmul_pallas(x: jax.Array, values: jax.Array, scales: jax.Array, *, interpret: Any = False) -> jax.Array:
    """See `quantized_matmul`, for what `serves`. [T, out]."""
    (rows, columns), out = x.shape, values.shape[0]
    return pl.pallas_call(
        _body,
        out_shape=jax.ShapeDtypeStruct((rows, out), x.dtype),
        grid=(-(-out // BLOCK),),
        in_specs=[
            pl.BlockSpec((rows, columns), lambda i: (0, 0)),
            pl.BlockSpec((BLOCK, columns), lambda i: (i, 0)),
            pl.BlockSpec((1, BLOCK), lambda i: (0, i)),
        ],
        out_specs=pl.BlockSpec((rows, BLOCK), lambda i: (0, i)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="quantized_matmul",
        interpret=interpret,
    )(x, values, scales.reshape(1, out))
