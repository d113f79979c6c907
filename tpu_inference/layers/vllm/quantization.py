# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear layers with quantized weights, however checkpoints store them: values and scales as `layers.common.quantization` has them."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, ModelWeightParameter

from tpu_inference.errors import TpuInferenceError
from tpu_inference.kernels.quantized_matmul import Packed
from tpu_inference.layers.common.four_bits import packed_values, packed_with_zero_points
from tpu_inference.layers.common.quantization import Quantization, Scheme
from tpu_inference.layers.common.sharding import LogicalAxes
from tpu_inference.layers.vllm.attention import CacheScalesMethod
from tpu_inference.layers.vllm.placement import placements
from tpu_inference.layers.vllm.quantized_experts import QuantizedExpertsMethod
from tpu_inference.layers.vllm.rounding import (
    CHECKPOINT_NUMEL,
    group_size,
    repeat_then,
    rounded_whole,
    to_numpy,
    to_torch,
)

VALUES, SCALES, ZERO_POINTS = "weight", "weight_scale", "weight_zero_point"
"""Names of the parameters of quantized layers; the last is of packed values alone."""


class TpuQuantizationConfig(QuantizationConfig):
    """What vLLM's layers ask, while they are built, how they are quantized."""

    def __init__(
        self,
        quantization: Quantization,
        apply_mapper: Callable[[Any], None],
        *,
        shards: int = 1,
        expert_parallel: bool = False,
        cache_scales: bool = False,
    ) -> None:
        """`shards`: devices that layers are divided among, experts by their widths unless `expert_parallel`.

        `cache_scales`: whether attention layers have scales of the KV cache.

        `quantization` answers for names as the checkpoint has them, or as vLLM's modules have them once `apply_mapper` was called."""
        super().__init__()
        self.quantization = quantization
        self._scheme_of, self._of_experts = quantization.scheme_of, quantization.of_experts
        self._apply_mapper, self._cache_scales = apply_mapper, cache_scales
        self._shards, self._expert_parallel = shards, expert_parallel

    def get_name(self) -> str:
        return "tpu"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QuantizationConfig":
        raise TypeError("made from vLLM's own configuration, not from a file")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self._apply_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Raises TpuInferenceError for a layer, or experts, made of several that are stored differently."""
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, Attention):
            return CacheScalesMethod(self) if self._cache_scales else None
        if not isinstance(layer, LinearBase):
            return None
        scheme = self._scheme(prefix)
        return UnquantizedLinearMethod() if scheme is None else QuantizedLinearMethod(scheme, prefix, self._shards)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizedExpertsMethod | None:
        """None for experts that are not quantized."""
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        experts = prefix.removesuffix(".routed_experts")
        schemes = {self._of_experts(f"{experts}.0.{name}") for name in names if name}
        if len(schemes) > 1:
            raise TpuInferenceError(f"Matrices of the experts {experts} are quantized in different ways: not served.")
        scheme = schemes.pop()
        shards = 1 if self._expert_parallel else self._shards
        return None if scheme is None else QuantizedExpertsMethod(scheme, layer, experts, shards)

    def _scheme(self, prefix: str) -> Scheme | None:
        base, _, name = prefix.rpartition(".")
        parts = [f"{base}.{part}" for part in self.packed_modules_mapping.get(name) or [name]]
        schemes = {self._scheme_of(part) for part in parts}
        if len(schemes) > 1:
            raise TpuInferenceError(
                f"{', '.join(parts)} make one layer, and are quantized in different ways: not served."
            )
        return schemes.pop()


@register_weight_loader_v2_supported_method
class QuantizedLinearMethod(LinearMethodBase):
    """One layer's values [out, in], or [out, in / 2] of two each, and scales [out, groups]; `product` is set before it computes."""

    def __init__(self, scheme: Scheme, prefix: str, shards: int = 1) -> None:
        self.scheme, self._prefix, self._shards = scheme, prefix, shards
        self.packed: Packed | None = None
        self.product: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """As vLLM asks it, of undivided layers. Raises TpuInferenceError where devices would have too small a part of a group of columns."""
        rows, columns, load = sum(output_partition_sizes), input_size, extra_weight_attrs["weight_loader"]
        divided = isinstance(layer, RowParallelLinear) and columns % self._shards == 0
        size = group_size(self.scheme, self._prefix, columns, self._shards if divided else 1)
        groups = columns // size
        self.packed = self.scheme.code_on(columns, self._shards if divided else 1)
        self._register_values(layer, rows, columns, self._loader_of_values(load, layer, size))
        if self.packed and self.scheme.zeros_name:
            self._register_by_group(layer, ZERO_POINTS, rows, groups, load)
        cut = groups > 1 and not self.scheme.at_load
        parts = (self.scheme.block[1] or size) // size if cut else 1
        scales = self._register_by_group(layer, SCALES, rows, groups, repeat_then(load, parts, groups))
        if groups > 1:
            setattr(scales, CHECKPOINT_NUMEL, rows * -(-columns // (size * parts)))

    def _register_values(self, layer: torch.nn.Module, rows: int, columns: int, load: Callable[..., Any]) -> None:
        dtype, width = (torch.uint8, columns // 2) if self.packed else (getattr(torch, self.scheme.held_dtype), columns)
        values = torch.empty(rows, width, dtype=dtype)
        parameter = ModelWeightParameter(data=values, input_dim=1, output_dim=0, weight_loader=load)
        setattr(parameter, CHECKPOINT_NUMEL, rows * columns)
        layer.register_parameter(VALUES, parameter)

    @staticmethod
    def _register_by_group(
        layer: torch.nn.Module, name: str, rows: int, groups: int, load: Callable[..., Any]
    ) -> torch.nn.Parameter:
        data = torch.empty(rows, groups, dtype=torch.float32)
        if groups == 1:
            parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=load)
        else:
            parameter = GroupQuantScaleParameter(data=data, input_dim=1, output_dim=0, weight_loader=load)
        layer.register_parameter(name, parameter)
        return parameter

    def _loader_of_values(self, load: Callable[..., Any], layer: torch.nn.Module, group: int) -> Callable[..., Any]:
        """Of values of a byte each, as `HeldForm` has them, or of a weight in full."""
        if self.scheme.at_load:
            return self._round_then(load, layer, group)
        return self._pack_then(load, layer, group, self.packed) if self.packed else load

    def _pack_then(
        self, load: Callable[..., Any], layer: torch.nn.Module, group: int, packed: Packed
    ) -> Callable[..., None]:
        def packing(parameter: torch.nn.Parameter, loaded: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            values = to_numpy(loaded)
            if self.scheme.zeros_name:
                two, points = packed_with_zero_points(values, values.shape[1] // group)
                held = getattr(layer, ZERO_POINTS)
                held.weight_loader(held, to_torch(points), *args, **kwargs)
            else:
                two = packed_values(values, packed)
            load(parameter, to_torch(two), *args, **kwargs)

        return packing

    def _round_then(self, load: Callable[..., Any], layer: torch.nn.Module, group: int) -> Callable[..., None]:
        """A loader of a weight in full."""

        def rounding(parameter: torch.nn.Parameter, loaded: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            scales, values = rounded_whole(loaded, self.scheme.dtype, group)
            held = getattr(layer, SCALES)
            held.weight_loader(held, scales, *args, **kwargs)
            load(
                parameter,
                to_torch(packed_values(to_numpy(values), self.packed)) if self.packed else values,
                *args,
                **kwargs,
            )

        return rounding

    def axes(self, layer: LinearBase, shards: int) -> LogicalAxes:
        """Of the values, as `placement` lays them."""
        return placements(layer, VALUES, layer.weight, shards)[0].axes

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert self.product is not None
        return self.product(layer, x, bias)
