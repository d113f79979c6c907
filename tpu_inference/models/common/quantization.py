# SPDX-License-Identifier: Apache-2.0
"""From vLLM's reading of a checkpoint's quantization, or of --quantization, to what the layers hold."""

from collections.abc import Callable
from typing import Any

from tpu_inference.compat import quantization as compat
from tpu_inference.config import TpuConfig
from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common import mxfp4
from tpu_inference.layers.common.nvfp4 import GROUP
from tpu_inference.layers.common.quantization import Quantization, Scheme
from tpu_inference.models.common.quantization_rules import Rules, read_rules

MXFP4 = "gpt_oss_mxfp4"
"""vLLM's name of gpt-oss's checkpoints, whose experts alone are quantized."""
SERVED = (
    "fp8",
    "compressed-tensors",
    "auto_awq",
    "auto_gptq",
    "modelopt_fp4",
    "mxfp4",
    MXFP4,
    "fp8_per_channel",
    "int8_per_channel_weight_only",
    "online",
)
"""vLLM's names: the last three are asked for with --quantization and rounded at load, the others are of checkpoints."""
TABLE = (
    "fp8 checkpoints with a scale a tensor or a block; compressed-tensors of int8 (W8A8, W8A16), fp8 (W8A8, W8A16) and "
    "int4 (W4A16); AWQ of 4 bits with zero points; GPTQ of 4 and 8 bits, symmetric and without desc_act; NVFP4 of compressed-tensors and ModelOpt; "
    "MXFP4 of compressed-tensors and of gpt-oss's experts; "
    "and at load --quantization fp8_per_channel, int8_per_channel_weight_only (of experts), or online with --quantization-config "
    """'{"linear": "int8_per_channel_static"}', "moe" for experts, or "fp8_per_channel_static", or additional_config {"quantization": RULES}"""
)
_UNREAD = (
    ".input_scale",
    ".input_global_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
    ".prob_scale",
    ".weight_shape",
    ".g_idx",
    ".qzeros",
)
_FP8 = "float8_e4m3fn"


class QuantizationError(TpuInferenceError):
    """A way of quantizing that is not served."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not served by tpu_inference. Served are {TABLE}.")


def quantization_of(vllm_config: Any) -> Quantization | None:
    """What `vllm_config.quant_config` says; None for a model that is not quantized.

    Raises:
        QuantizationError: a scheme that is not served, with those that are.
    """
    config = vllm_config.quant_config
    if rules := TpuConfig.from_vllm(vllm_config).quantization:
        if config is not None:
            raise QuantizationError(
                f"additional_config quantization={rules!r} with the quantization {config.get_name()!r}"
            )
        return Quantization(read_rules(rules), vllm_config.model_config.hf_text_config.num_hidden_layers)
    if config is None:
        return None
    name = config.get_name()
    if name not in _READERS:
        raise QuantizationError(f"The quantization {name!r}")
    layers, read = vllm_config.model_config.hf_text_config.num_hidden_layers, _READERS[name]
    if read is _online:
        alone = config.args.linear is None
        return Quantization(read(config), layers, scheme_of_experts=read(config, experts=True), experts_alone=alone)
    return Quantization(read(config), layers, _UNREAD, "mxfp4" if name == MXFP4 else None)


def refuse_rules_without_effect(quantization: Quantization | None) -> None:
    """Once the model was built. Raises ConfigError."""
    if quantization is not None and isinstance(quantization.scheme_of, Rules):
        quantization.scheme_of.refuse_if_without_effect()


def _fp8(config: Any) -> Callable[[str], Scheme | None]:
    block = config.weight_block_size
    if config.store_dtype not in (None, "fp8"):
        raise QuantizationError(f"fp8 with store_dtype={config.store_dtype!r}")
    activations = _FP8 if config.activation_scheme == "dynamic" else None
    of_tensor = Scheme(_FP8, (None, None), activations=activations)
    scheme = Scheme(_FP8, tuple(block), scales_name="weight_scale_inv") if block else of_tensor
    return lambda layer: None if compat.fp8_skips(config, layer) else scheme


def _online(config: Any, *, experts: bool = False) -> Callable[[str], Scheme | None]:
    args = config.args
    asked = args.moe if experts else args.linear
    if args.targets is not None:
        raise QuantizationError("quantization_config with targets")
    if asked is None:
        return lambda layer: None
    if asked.activation is not None:
        raise QuantizationError(f"Quantization at load with activations in {asked.activation}")
    dtype = {"fp8_per_channel_static": _FP8, "int8_per_channel_static": "int8"}.get(str(asked))
    if dtype is None:
        raise QuantizationError(f"Quantization at load by {asked}")
    scheme = Scheme(dtype, at_load=True)
    return lambda layer: None if compat.online_skips(config, layer) else scheme


def _compressed_tensors(config: Any) -> Callable[[str], Scheme | None]:
    schemes = {
        target: _compressed_scheme(found["weights"], found["input_activations"], found["format"] or config.quant_format)
        for target, found in config.target_scheme_map.items()
    }

    def scheme_of(layer: str) -> Scheme | None:
        target = compat.compressed_tensors_target(config, layer)
        return None if target is None else schemes[target]

    return scheme_of


_BLOCKS: dict[str, Callable[[Any], tuple[int | None, int | None]]] = {
    "tensor": lambda weights: (None, None),
    "channel": lambda weights: (1, None),
    "group": lambda weights: (1, weights.group_size),
    "block": lambda weights: tuple(weights.block_structure),
}


def _compressed_scheme(weights: Any, activations: Any, layout: str) -> Scheme:
    kind, strategy = f"{weights.type}{weights.num_bits}", str(weights.strategy)
    if layout == "nvfp4-pack-quantized" and (kind, strategy, weights.group_size) == ("float4", "tensor_group", GROUP):
        return Scheme(
            _FP8, (1, GROUP), packed=4, layout="nvfp4", values_name="weight_packed",
            tensor_scale_name="weight_global_scale", divides=True,
        )  # fmt: skip
    if layout == "mxfp4-pack-quantized" and (kind, strategy, weights.group_size) == ("float4", "group", mxfp4.GROUP):
        return Scheme(_FP8, (1, mxfp4.GROUP), packed=4, layout="mxfp4", values_name="weight_packed")
    what = f"compressed-tensors {layout} of {kind} by {strategy}"
    dtype = {"int8": "int8", "int4": "int8", "float8": _FP8}.get(kind)
    packed = layout == "pack-quantized"
    if dtype is None or strategy not in _BLOCKS or (packed and kind == "float8") or (kind == "int4" and not packed):
        raise QuantizationError(what)
    if not weights.symmetric and (kind, strategy) != ("int4", "group"):
        raise QuantizationError(f"{what} with zero points")
    if weights.actorder not in (None, "static", "weight"):
        raise QuantizationError(f"{what} with its columns reordered (actorder)")
    if activations is not None and (kind == "int4" or (kind == "int8" and not activations.dynamic)):
        raise QuantizationError(
            f"{what} with activations of {activations.num_bits} bits"
            + ("" if activations.dynamic else " and fixed scales")
        )
    return Scheme(
        dtype,
        _BLOCKS[strategy](weights),
        activations=dtype
        if activations is not None and activations.dynamic and strategy in ("tensor", "channel")
        else None,
        packed=weights.num_bits if packed else 0,
        values_name="weight_packed" if packed else "weight",
        zeros_name=None if weights.symmetric else "weight_zero_point",
    )


def _awq(config: Any) -> Callable[[str], Scheme | None]:
    if config.weight_bits != 4 or not config.zero_point or config.lm_head_quantized:
        raise QuantizationError(
            f"AWQ of {config.weight_bits} bits, zero_point={config.zero_point}, lm_head={config.lm_head_quantized}"
        )
    scheme = Scheme(
        "int8", _group(config), packed=4, layout="awq", values_name="qweight", scales_name="scales", zeros_name="qzeros"
    )
    return lambda layer: None if compat.awq_skips(config, layer) else scheme


def _gptq(config: Any) -> Callable[[str], Scheme | None]:
    changed = {key for rule in config.dynamic.values() for key in rule}
    if config.desc_act or config.lm_head_quantized or changed:
        raise QuantizationError(
            f"GPTQ with desc_act={config.desc_act}, lm_head={config.lm_head_quantized}"
            + (f" and layers of their own {', '.join(sorted(changed))}" if changed else "")
        )
    scheme = Scheme(
        "int8", _group(config), packed=config.weight_bits, layout="gptq", values_name="qweight", scales_name="scales"
    )
    return lambda layer: None if compat.gptq_skips(config, layer) else scheme


def _nvfp4(config: Any) -> Callable[[str], Scheme | None]:
    if not config.is_checkpoint_nvfp4_serialized or config.group_size != GROUP:
        raise QuantizationError(f"ModelOpt {config.quant_method} in groups of {getattr(config, 'group_size', None)}")
    scheme = Scheme(_FP8, (1, GROUP), packed=4, layout="nvfp4", tensor_scale_name="weight_scale_2")
    return lambda layer: None if compat.modelopt_skips(config, layer) else scheme


def _group(config: Any) -> tuple[int, int | None]:
    return 1, None if config.group_size == -1 else config.group_size


_READERS: dict[str, Callable[[Any], Callable[[str], Scheme | None]]] = {
    MXFP4: lambda config: lambda layer: None,
    "fp8": _fp8,
    "auto_awq": _awq,
    "auto_gptq": _gptq,
    "online": _online,
    "modelopt_fp4": _nvfp4,
    "compressed-tensors": _compressed_tensors,
}
