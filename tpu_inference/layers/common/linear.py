# SPDX-License-Identifier: Apache-2.0
"""Matrix products with weights stored as checkpoints store them, [out, in]."""

from typing import Any

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, weight: jax.Array, accumulate_dtype: Any) -> jax.Array:
    """`x` [T, in] times `weight` [out, in] transposed: [T, out] in x's dtype, summed in `accumulate_dtype`.

    float32 products are exact float32 on every platform (the MXU would otherwise round their inputs to bf16).
    """
    rows = x.shape[0]
    # XLA's CPU backend multiplies bf16 natively from two rows on; a single row makes it convert the whole weight.
    pad = rows == 1 and x.dtype == jnp.bfloat16 and accumulate_dtype == jnp.float32
    if pad:
        x = jnp.concatenate([x, x])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=accumulate_dtype
    )
    return out[:rows].astype(x.dtype)
