# SPDX-License-Identifier: Apache-2.0
"""Thin NNX modules that declare weights and multiply by them."""

from collections.abc import Sequence

import jax
from flax import nnx

from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.linear import matmul
from tpu_inference.layers.common.quantized_linear import quantized_product
from tpu_inference.layers.common.quantized_specs import quantized
from tpu_inference.layers.common.weights import Piece, WeightSpec


class StackParam(nnx.Param):
    """A weight of which scanned layers are given all layers' with their own index, where a product of what a scan cuts out would be one of a copy."""


class Linear(nnx.Module):
    """y = x W^T (+ b), W [out, in] assembled from `pieces` along `axis` (0: out, 1: in), and quantized where the context says so."""

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
        self.accumulate_dtype, self.mesh, self.axes = ctx.accumulate_dtype, ctx.mesh, axes
        weight = WeightSpec(shape, ctx.dtype, axes, tuple(pieces), axis)
        scheme = ctx.quantization and ctx.quantization.of_weight(weight.pieces)
        held = quantized(weight, scheme, ctx.shards) if scheme else None
        self.activations = scheme.activations_on(ctx.mesh.devices.flat[0]) if scheme else None
        self.packed = held.packed if held else None
        self.weight = StackParam(held.values) if held else nnx.Param(weight)
        self.scales = StackParam(held.scales) if held else None
        self.zero_points = StackParam(held.zero_points) if held and held.zero_points else None
        spec = bias and WeightSpec(shape[:1], ctx.dtype, axes[:1], tuple(bias), init="zeros")
        self.bias = nnx.Param(spec) if spec else None

    def __call__(self, x: jax.Array, layer: jax.Array | None = None) -> jax.Array:
        """[T, in] -> [T, out]. `layer`: which of the layers of a `StackParam`; None where none are stacked."""
        if self.scales is None:
            y = matmul(x, self.weight[...], self.accumulate_dtype)
        else:
            y = quantized_product(
                x, self.weight[...], self.scales[...], axes=self.axes, mesh=self.mesh, accumulate_dtype=self.accumulate_dtype,
                activations=self.activations, packed=self.packed,
                zero_points=None if self.zero_points is None else self.zero_points[...],
                layer=layer if isinstance(self.weight, StackParam) else None,
            )  # fmt: skip
        return y if self.bias is None else y + self.bias[...]
