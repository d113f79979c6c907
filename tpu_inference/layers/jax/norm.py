# SPDX-License-Identifier: Apache-2.0
"""RMSNorm."""

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.weights import Source, WeightSpec


class RMSNorm(nnx.Module):
    """Over the last dimension, in float32; `offset` is added to the weight (1 for Gemma)."""

    def __init__(self, ctx: BuildContext, name: str, size: int, eps: float, offset: float = 0.0) -> None:
        self.eps, self.offset = eps, offset
        source = Source(f"{name}.weight", (size,))
        init = "zeros" if offset else "ones"
        self.weight = nnx.Param(WeightSpec((size,), ctx.dtype, (None,), (source.piece(0, size),), init=init))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * (self.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)
