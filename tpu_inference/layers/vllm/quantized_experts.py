# SPDX-License-Identifier: Apache-2.0
"""vLLM's fused experts with quantized weights: values [E, out, in] and scales [E, out, groups] of all experts of a layer."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.utils import set_weight_attrs

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.quantization import Scheme
from tpu_inference.layers.vllm.rounding import CHECKPOINT_NUMEL, group_size, repeat_then, rounded_whole

EXPERT_SCALES = ("w13_weight_scale", "w2_weight_scale")


class QuantizedExpertsMethod(FusedMoEMethodBase):
    """Allocates what the experts of one layer hold; another method computes with it."""

    def __init__(self, scheme: Scheme, layer: RoutedExperts, prefix: str, shards: int) -> None:
        """`shards`: devices that the width of each expert is divided among."""
        super().__init__(layer.moe_config)
        self.scheme, self._prefix, self._shards = scheme, prefix, shards

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """As vLLM asks it, of undivided layers. Raises TpuInferenceError where devices would have too small a part of a group of columns."""
        width, load = intermediate_size_per_partition, extra_weight_attrs["weight_loader"]
        both = width * (2 if self.moe.is_act_and_mul else 1)
        self._register(layer, "w13", (num_experts, both, hidden_size), load, 1)
        self._register(layer, "w2", (num_experts, hidden_size, width), load, self._shards)
        if self.moe.has_bias:
            for name, size in (("w13_bias", both), ("w2_bias", hidden_size)):
                bias = torch.nn.Parameter(torch.zeros(num_experts, size, dtype=params_dtype), requires_grad=False)
                set_weight_attrs(bias, {"weight_loader": load})
                layer.register_parameter(name, bias)

    def _register(
        self, layer: RoutedExperts, name: str, shape: tuple[int, int, int], load: Callable[..., Any], shards: int
    ) -> None:
        experts, rows, columns = shape
        whole = shards if columns % shards == 0 else 1
        size = group_size(self.scheme, f"{self._prefix}.{name}", columns, whole, may_cut=False)
        values = torch.nn.Parameter(torch.empty(shape, dtype=getattr(torch, self.scheme.dtype)), requires_grad=False)
        scales = torch.nn.Parameter(
            torch.empty(experts, rows, columns // size, dtype=torch.float32), requires_grad=False
        )
        set_weight_attrs(
            values, {"weight_loader": self._round_then(load, layer, size) if self.scheme.at_load else load}
        )
        parts = 1 if self.scheme.at_load else (self.scheme.block[1] or size) // size
        repeating = repeat_then(load, parts, columns // size)
        kind = FusedMoeWeightScaleSupported.GROUP.value
        set_weight_attrs(scales, {"weight_loader": repeating, "quant_method": kind})
        setattr(scales, CHECKPOINT_NUMEL, experts * rows * -(-columns // (size * parts)))
        layer.register_parameter(f"{name}_weight", values)
        layer.register_parameter(f"{name}_weight_scale", scales)

    def _round_then(self, load: Callable[..., Any], layer: RoutedExperts, group: int) -> Callable[..., Any]:
        """A loader of one expert's matrix in full."""

        def rounding(
            param: torch.nn.Parameter, loaded_weight: torch.Tensor, weight_name: str, *args: Any, **kwargs: Any
        ) -> Any:
            if loaded_weight.ndim != 2:
                raise TpuInferenceError(
                    f"{weight_name}: a tensor of all experts together is not rounded at load: use a checkpoint with a tensor for each expert."
                )
            scales, values = rounded_whole(loaded_weight, self.scheme.dtype, group)
            held = getattr(layer, f"{weight_name.rpartition('.')[2]}_scale")
            held.weight_loader(held, scales, f"{weight_name}_scale", *args, **kwargs)
            return load(param, values, weight_name, *args, **kwargs)

        return rounding

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> Any:
        return UnquantizedFusedMoEMethod.get_fused_moe_quant_config(self, layer)

    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError("another method takes this one's place before the layer computes")
