# SPDX-License-Identifier: Apache-2.0
"""vLLM's fused experts over `layers.common.moe`."""

from typing import Any

import jax
import torch
from jax.sharding import Mesh
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from tpu_inference.compat.lowering import import_torchax
from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.moe import (
    ACTIVATIONS,
    SCORING,
    ExpertWeights,
    Routing,
    Sharding,
    experts,
    refuse_small_groups,
    refuse_uneven_experts,
    route,
)
from tpu_inference.layers.common.sharding import MODEL_AXIS
from tpu_inference.layers.vllm.quantized_experts import EXPERT_SCALES, QuantizedExpertsMethod


class TpuExpertsMethod(FusedMoEMethodBase):
    """Routing and experts of one layer."""

    is_monolithic = True
    """Routing is ours too: vLLM's routers call kernels of other platforms."""

    def __init__(self, layer: RoutedExperts, mesh: Mesh, accumulate_dtype: Any, *, expert_parallel: bool) -> None:
        """Raises TpuInferenceError for what is not served."""
        super().__init__(layer.moe_config)
        self._mesh, self._accumulate_dtype = mesh, accumulate_dtype
        self._activation = layer.activation.value
        for name, scales in layer.named_parameters(recurse=False):
            if name in EXPERT_SCALES and (groups := scales.shape[2]) > 1:
                columns = getattr(layer, name.removesuffix("_scale")).shape[2]
                refuse_small_groups(f"{layer.layer_name}.{name}", columns // groups, mesh.devices.flat[0].platform)
        shards = mesh.shape[MODEL_AXIS]
        self.sharding: Sharding = "whole"
        if shards > 1 and expert_parallel:
            refuse_uneven_experts(layer.global_num_experts, shards)
            self.sharding = "experts"
        elif shards > 1 and layer.intermediate_size_per_partition % shards == 0:
            self.sharding = "width"
        if self._activation not in ACTIVATIONS:
            raise TpuInferenceError(f"experts with the activation {self._activation!r} are not served by tpu_inference")
        if layer.scoring_func not in SCORING and layer.custom_routing_function is None:
            raise TpuInferenceError(f"experts routed by {layer.scoring_func!r} scores are not served by tpu_inference")

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("the weights are there before this method is")

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> Any:
        return UnquantizedFusedMoEMethod.get_fused_moe_quant_config(self, layer)

    def apply_monolithic(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        weights, ids = self._route(layer, x, router_logits)
        arrays = {name: tensor.jax() for name, tensor in layer.named_parameters(recurse=False)}
        out = experts(
            x.jax(), weights, ids,
            ExpertWeights(
                arrays["w13_weight"], arrays["w2_weight"], arrays.get("w13_bias"), arrays.get("w2_bias"),
                arrays.get("w13_weight_scale"), arrays.get("w2_weight_scale"),
            ),
            activation=self._activation, mesh=self._mesh, sharding=self.sharding,
            accumulate_dtype=self._accumulate_dtype, weigh_input=layer.apply_router_weight_on_input,
        )  # fmt: skip
        return import_torchax().interop.torch_view(out)

    def _route(self, layer: RoutedExperts, x: torch.Tensor, logits: torch.Tensor) -> tuple[jax.Array, jax.Array]:
        if layer.custom_routing_function is not None:
            weights, ids = layer.custom_routing_function(
                hidden_states=x, gating_output=logits, topk=layer.top_k, renormalize=layer.renormalize
            )
            return weights.jax(), ids.jax()
        groups = (layer.num_expert_group or 1, layer.topk_group or 1) if layer.use_grouped_topk else (1, 1)
        bias = layer.e_score_correction_bias
        # vLLM's router without groups and bias does not scale.
        scale = layer.routed_scaling_factor if layer.use_grouped_topk or bias is not None else 1.0
        routing = Routing(layer.top_k, layer.renormalize, layer.scoring_func, *groups, scale)
        return route(logits.jax(), routing, None if bias is None else bias.jax())


def use_expert_shells(
    model: torch.nn.Module, mesh: Mesh, accumulate_dtype: Any, *, expert_parallel: bool = False
) -> None:
    """Let the experts of `model` compute by the method above."""
    for layer in model.modules():
        if not isinstance(layer, RoutedExperts):
            continue
        if not isinstance(layer.quant_method, UnquantizedFusedMoEMethod | QuantizedExpertsMethod):
            raise TpuInferenceError(
                f"Experts quantized as {type(layer.quant_method).__name__} has them are not served with vLLM's PyTorch class: use an "
                "unquantized checkpoint, or for gpt-oss in MXFP4 the JAX class (--model-impl auto)."
            )
        method = TpuExpertsMethod(layer, mesh, accumulate_dtype, expert_parallel=expert_parallel)
        del layer.quant_method  # a module, which torch lets nothing else take the place of
        layer.quant_method = method
