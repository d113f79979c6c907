# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear layers with quantized weights, however checkpoints store them: values and scales as `layers.common.quantization` has them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.parameter import ChannelQuantScaleParameter, GroupQuantScaleParameter, ModelWeightParameter

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.quantization import Quantization, Scheme, rounded_rows
from tpu_inference.layers.common.sharding import LogicalAxes
from tpu_inference.layers.vllm.attention import CacheScalesMethod
from tpu_inference.layers.vllm.placement import placements

VALUES, SCALES = "weight", "weight_scale"
"""Names of the parameters of every quantized layer."""


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same memory, if it is contiguous."""
    tensor = tensor.detach().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16":
        return tensor.view(torch.int16).numpy().view(name)
    if name.startswith("float8"):
        return tensor.view(torch.uint8).numpy().view(name)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The same memory, if it is contiguous and writeable."""
    array = np.ascontiguousarray(array)
    if array.dtype.name.startswith("float8"):
        return torch.from_numpy(array.view(np.uint8)).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)


class TpuQuantizationConfig(QuantizationConfig):
    """What vLLM's layers ask, while they are built, how they are quantized."""

    def __init__(
        self, quantization: Quantization, apply_mapper: Callable[[Any], None], *, cache_scales: bool = False
    ) -> None:
        """`cache_scales`: whether attention layers have scales of the KV cache.

        `quantization` answers for names as the checkpoint has them, or as vLLM's modules have them once `apply_mapper` was called."""
        super().__init__()
        self._scheme_of, self._of_experts = quantization.scheme_of, quantization.of_experts
        self._apply_mapper, self._cache_scales = apply_mapper, cache_scales

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
        """Raises TpuInferenceError for quantized experts, and for a layer made of several that are stored differently."""
        if isinstance(layer, RoutedExperts):
            if (scheme := self._of_experts(f"{prefix}.0.gate_proj")) is None:
                return None
            advice = (
                """use --quantization online with --quantization-config '{"linear": ...}' alone"""
                if scheme.at_load
                else "use a checkpoint whose experts are not quantized"
            )
            raise TpuInferenceError(
                f"{prefix} would be quantized, and experts of vLLM's PyTorch classes are served unquantized only: "
                f"{advice}, or a model with a JAX class."
            )
        if isinstance(layer, Attention):
            return CacheScalesMethod(self) if self._cache_scales else None
        if not isinstance(layer, LinearBase):
            return None
        scheme = self._scheme(prefix)
        return UnquantizedLinearMethod() if scheme is None else QuantizedLinearMethod(scheme, prefix)

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
    """One layer's values [out, in] and scales [out, groups]; `product` is set before it computes."""

    def __init__(self, scheme: Scheme, prefix: str) -> None:
        self.scheme, self._prefix = scheme, prefix
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
        """As vLLM asks it, of undivided layers. Raises TpuInferenceError where a row is no whole number of groups."""
        rows, columns, size = sum(output_partition_sizes), input_size, self.scheme.block[1]
        if size is not None and columns % size:
            raise TpuInferenceError(
                f"{self._prefix} has {columns} columns, which groups of {size} do not divide: not served."
            )
        load = extra_weight_attrs["weight_loader"]
        values = torch.empty(rows, columns, dtype=getattr(torch, self.scheme.dtype))
        scales = torch.empty(rows, groups := self.scheme.groups(columns), dtype=torch.float32)
        load_values = self._round_then(load, layer) if self.scheme.at_load else load
        layer.register_parameter(
            VALUES, ModelWeightParameter(data=values, input_dim=1, output_dim=0, weight_loader=load_values)
        )
        if groups == 1:
            parameter = ChannelQuantScaleParameter(data=scales, output_dim=0, weight_loader=load)
        else:
            parameter = GroupQuantScaleParameter(data=scales, input_dim=1, output_dim=0, weight_loader=load)
        layer.register_parameter(SCALES, parameter)

    def _round_then(self, load: Callable[..., Any], layer: torch.nn.Module) -> Callable[..., None]:
        """A loader of a weight in full."""
        dtype = self.scheme.dtype

        def rounding(parameter: torch.nn.Parameter, loaded: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            scales, values = torch.empty(loaded.shape[0], 1), torch.empty(loaded.shape, dtype=parameter.dtype)
            rows = slice(0, loaded.shape[0])
            for part, of_rows, rounded in rounded_rows(lambda part: to_numpy(loaded[part]), rows, dtype):
                scales[part], values[part] = to_torch(of_rows), to_torch(rounded)
            held = getattr(layer, SCALES)
            held.weight_loader(held, scales, *args, **kwargs)
            load(parameter, values, *args, **kwargs)

        return rounding

    def axes(self, layer: LinearBase, shards: int) -> LogicalAxes:
        """Of the values, as `placement` lays them.

        Raises:
            TpuInferenceError: a device would have a part of a group of columns.
        """
        placed = placements(layer, VALUES, layer.weight, shards)
        axes, size = placed[0].axes, self.scheme.block[1]
        if axes[1] is not None and size is not None and layer.input_size // shards % size:
            raise TpuInferenceError(
                f"{self._prefix} is quantized in groups of {size} columns, which {layer.input_size} columns on {shards} devices are not "
                "divided into: use a smaller --tensor-parallel-size."
            )
        return axes

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert self.product is not None
        return self.product(layer, x, bias)
