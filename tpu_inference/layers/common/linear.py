# SPDX-License-Identifier: Apache-2.0
"""Matrix products with weights stored as checkpoints store them, [out, in]."""

from typing import Any

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, weight: jax.Array, accumulate_dtype: Any) -> jax.Array:
    """`x` [T, in] times `weight` [out, in] transposed: [T, out] in x's dtype, summed in `accumulate_dtype`.

    float32 products are exact float32 on every platform (the MXU would otherwise round their inputs to bf16).
    """
    # XLA's CPU backend multiplies bf16 natively from two rows on; for a single one it would convert the whole weight first, and
    # a product summed as it is read is the fastest form that it has.
    if x.shape[0] == 1 and x.dtype == jnp.bfloat16 and accumulate_dtype == jnp.float32:
        return (weight.astype(jnp.float32) * x.astype(jnp.float32)).sum(1)[None].astype(x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=accumulate_dtype
    )
    return out.astype(x.dtype)


def before_split(product: jax.Array) -> jax.Array:
    """A product that is reshaped and split next.

    XLA would move the reshape to the weight, and on TPU then copy each layer's slice of stacked weights instead of multiplying by it where it lies.
    """
    return jax.lax.optimization_barrier(product)
