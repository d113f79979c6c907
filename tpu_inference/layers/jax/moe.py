# SPDX-License-Identifier: Apache-2.0
"""A layer of experts: router, experts, and the shared expert that every token goes to."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_inference.errors import TpuInferenceError
from tpu_inference.kernels.grouped_matmul import lies_across
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.linear import matmul
from tpu_inference.layers.common.moe import (
    INTERLEAVED,
    ExpertWeights,
    Sharding,
    experts,
    refuse_small_groups,
    refuse_uneven_experts,
    route,
)
from tpu_inference.layers.common.mxfp4 import Mxfp4RowsSource
from tpu_inference.layers.common.quantization import Quantization
from tpu_inference.layers.common.quantized_specs import QuantizedSpecs, quantized, quantized_by_rows
from tpu_inference.layers.common.weights import Piece, Source, TransposedSource, WeightSpec, padded
from tpu_inference.layers.jax.config import DecoderConfig
from tpu_inference.layers.jax.linear import StackParam
from tpu_inference.layers.jax.mlp import GatedMLP, in_turns


class MoE(nnx.Module):
    """The weighted sum of what a token's experts make of it, and of the shared expert where there is one.

    Experts are divided among the devices by their widths, which are padded to divide, or, with expert parallelism, so many to each.
    """

    def __init__(self, cfg: DecoderConfig, ctx: BuildContext) -> None:
        """Raises TpuInferenceError where expert parallelism does not divide the experts, or these are quantized in a way that is not served."""
        assert cfg.moe is not None
        self.hidden, self.prefix, self.moe, self.mesh = cfg.hidden_size, f"{cfg.names.layer}.", cfg.moe, ctx.mesh
        self.dtype, self.accumulate_dtype = ctx.dtype, ctx.accumulate_dtype
        moe = cfg.moe
        self.sharding: Sharding = "whole" if ctx.shards == 1 else "experts" if ctx.expert_parallel else "width"
        if self.sharding == "experts":
            refuse_uneven_experts(moe.num_experts, ctx.shards)
        self.mxfp4 = ctx.quantization is not None and ctx.quantization.experts == "mxfp4"
        self.shards = ctx.shards if self.sharding == "width" else 1
        self.width = -(-moe.width // self.shards) * self.shards
        self._declare_router()
        self._declare_experts(ctx.quantization)
        self.shared = self._shared(cfg, ctx) if moe.shared_width else None
        gate = moe.names.shared_gate if moe.shared_width else None
        self.shared_gate = self._whole(f"{gate}.weight", (1, cfg.hidden_size)) if gate else None

    def _shared(self, cfg: DecoderConfig, ctx: BuildContext) -> GatedMLP:
        names = replace(cfg.names, gate_up=self.moe.names.shared_gate_up, down=self.moe.names.shared_down)
        return GatedMLP(replace(cfg, intermediate_size=self.moe.shared_width, names=names), ctx)

    def _whole(self, name: str, shape: tuple[int, ...], **options) -> nnx.Param:
        """A weight of the layer that every device has all of."""
        piece = Source(self.prefix + name, shape).piece(0, shape[0])
        return nnx.Param(WeightSpec(shape, options.pop("dtype", self.dtype), (None,) * len(shape), (piece,), **options))

    def _declare_router(self) -> None:
        names, num_experts = self.moe.names, self.moe.num_experts
        self.router = self._whole(f"{names.router}.weight", (num_experts, self.hidden))
        has_bias, has_score_bias = self.moe.router_bias, self.moe.score_bias
        self.router_bias = self._whole(f"{names.router}.bias", (num_experts,), init="zeros") if has_bias else None
        self.score_bias = (
            self._whole(names.router_score_bias, (num_experts,), dtype=jnp.float32, init="zeros")
            if has_score_bias
            else None
        )

    def _source(self, name: str, *shape: int) -> Source:
        """An expert's tensor, or that of all; `shape` is one expert's, [out, in]."""
        if self.mxfp4 and len(shape) == 2:
            return Mxfp4RowsSource.of_experts(self.prefix + name, self.moe.num_experts, *shape)
        kind, stored = Source, shape
        if self.moe.transposed and len(shape) == 2:
            kind, stored = TransposedSource, shape[::-1]
        return kind(self.prefix + name, stored if "{expert}" in name else (self.moe.num_experts, *stored))

    def _gate_up_pieces(self, names: tuple[str, ...], *inner: int) -> tuple[Piece, ...]:
        size = self.moe.width
        if self.moe.activation in INTERLEAVED:
            return padded(self._source(names[0], 2 * size, *inner), 2 * size, 2 * self.width)
        if len(names) == 1:
            both = self._source(names[0], 2 * size, *inner)
            sources = [both, replace(both, offset=size)]
        else:
            sources = [self._source(name, size, *inner) for name in names]
        return in_turns(sources, size, self.width, self.shards)

    def _spare_experts(self) -> int:
        """One where the kernel would otherwise be given copies of the stacks (gpt-oss-120b's on eight devices: 128 of [720, 2880])."""
        if self.sharding == "experts":
            return 0
        width = self.width // self.shards
        shapes = ((2 * width, self.hidden), (self.hidden, width))
        return int(any(lies_across(self.moe.num_experts, *shape) for shape in shapes))

    def _declare_experts(self, quantization: Quantization | None) -> None:
        names, width = self.moe.names, "mlp" if self.sharding == "width" else None
        spare = self._spare_experts()
        stack: dict[str, Any] = dict(
            experts=self.moe.num_experts + spare,
            spare_experts=spare,
            experts_axis="experts" if self.sharding == "experts" else None,
        )
        down = padded(self._source(names.down, self.hidden, self.moe.width), self.moe.width, self.width)
        gate_up = self._gate_up_pieces(names.gate_up, self.hidden)
        w13 = WeightSpec((2 * self.width, self.hidden), self.dtype, (width, "embed"), gate_up, **stack)
        w2 = WeightSpec((self.hidden, self.width), self.dtype, ("embed", width), down, axis=1, **stack)
        (self.w13, self.s13), (self.w2, self.s2) = (self._quantized(spec, quantization) for spec in (w13, w2))
        biases = self._bias_specs(width, stack)
        self.b13, self.b2 = (StackParam(spec) for spec in biases) if biases else (None, None)

    def _quantized(self, spec: WeightSpec, quantization: Quantization | None) -> tuple[nnx.Param, nnx.Param | None]:
        """Values and scales, or a weight as it is and None."""
        held = quantized_by_rows(spec) if self.mxfp4 else self._by_scheme(spec, quantization)
        return (StackParam(held.values), StackParam(held.scales)) if held else (StackParam(spec), None)

    def _by_scheme(self, spec: WeightSpec, quantization: Quantization | None) -> QuantizedSpecs | None:
        scheme = quantization and quantization.of_weight(spec.pieces)
        if not scheme:
            return None
        if not all("{expert}" in name for name in spec.sources()):
            raise TpuInferenceError(
                f"{next(iter(spec.sources()))} holds the quantized weights of all experts together: served are tensors of one expert each."
            )
        held = quantized(spec, scheme, self.shards)
        if held.scales.shape[1] > 1:
            refuse_small_groups(next(iter(spec.sources())), held.group, self.mesh.devices.flat[0].platform)
        return held

    def _bias_specs(self, width: str | None, stack: dict[str, Any]) -> tuple[WeightSpec, WeightSpec] | None:
        names = self.moe.names
        if names.gate_up_bias is None or names.down_bias is None:
            return None
        down = self._source(names.down_bias, self.hidden).piece(0, self.hidden)
        gate_up = self._gate_up_pieces((names.gate_up_bias,))
        # That of down is added once, outside of what the devices divide.
        return (
            WeightSpec((2 * self.width,), self.dtype, (width,), gate_up, init="zeros", **stack),
            WeightSpec((self.hidden,), self.dtype, ("embed",), (down,), init="zeros", experts=self.moe.num_experts),
        )

    def _logits(self, x: jax.Array) -> jax.Array:
        router = self.router[...]
        if self.moe.router_float32:
            x, router = x.astype(jnp.float32), router.astype(jnp.float32)
        logits = matmul(x, router, self.accumulate_dtype)
        return logits if self.router_bias is None else logits + self.router_bias[...]

    def __call__(self, x: jax.Array, layer: jax.Array | None = None) -> jax.Array:
        """[T, hidden] -> [T, hidden]; `layer`: int32 scalar, which of the layers whose experts are stacked it is, None where none are."""
        score_bias = None if self.score_bias is None else self.score_bias[...]
        weights, ids = route(self._logits(x), self.moe.routing, score_bias)
        others = (self.b13, self.b2, self.s13, self.s2)
        held = ExpertWeights(self.w13[...], self.w2[...], *(None if other is None else other[...] for other in others))
        out = experts(
            x, weights, ids, held,
            activation=self.moe.activation, mesh=self.mesh, sharding=self.sharding,
            accumulate_dtype=self.accumulate_dtype, weigh_input=self.moe.weigh_input, layer=layer,
        )  # fmt: skip
        if self.shared is None:
            return out
        shared = self.shared(x, layer)
        if self.shared_gate is not None:
            shared = shared * jax.nn.sigmoid(matmul(x, self.shared_gate[...], self.accumulate_dtype))
        return out + shared
