# SPDX-License-Identifier: Apache-2.0
"""Thin NNX modules that declare weights and multiply by them."""

from collections.abc import Sequence

import jax
from flax import nnx

from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.linear import matmul
from tpu_inference.layers.common.weights import Piece, WeightSpec


class Linear(nnx.Module):
    """y = x W^T (+ b), W [out, in] assembled from `pieces` along `axis` (0: out, 1: in)."""

    def __init__(
        self,
        ctx: BuildContext,
        shape: tuple[int, int],
        axes: tuple[str | None, str | None],
        pieces: Sequence[Piece],
        *,
        axis: int = 0,
        bias: Sequence[Piece] | None = None,
    ) -> None:
        self.accumulate_dtype = ctx.accumulate_dtype
        self.weight = nnx.Param(WeightSpec(shape, ctx.dtype, axes, tuple(pieces), axis))
        spec = bias and WeightSpec(shape[:1], ctx.dtype, axes[:1], tuple(bias), init="zeros")
        self.bias = nnx.Param(spec) if spec else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, in] -> [T, out]."""
        y = matmul(x, self.weight[...], self.accumulate_dtype)
        return y if self.bias is None else y + self.bias[...]
