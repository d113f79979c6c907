# SPDX-License-Identifier: Apache-2.0
"""Which layers a checkpoint's quantization leaves out, as vLLM's configs say it."""

from typing import Any


def fp8_skips(config: Any, layer: str) -> bool:
    """Whether vLLM's Fp8Config leaves the linear layer of that name as it is."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    return is_layer_skipped(layer, config.ignored_layers, match_mode=config.ignored_layers_match_mode)


def awq_skips(config: Any, layer: str) -> bool:
    """Whether vLLM's AutoAWQConfig leaves the linear layer of that name as it is."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    return is_layer_skipped(layer, config.modules_to_not_convert, match_mode="substring")


def gptq_skips(config: Any, layer: str) -> bool:
    """Whether vLLM's AutoGPTQConfig leaves the linear layer of that name as it is."""
    from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override, is_layer_gptq_quantized

    left = get_dynamic_override(config, layer_name=layer) is False
    return left or not is_layer_gptq_quantized(layer, config.modules_in_block_to_quantize)


def modelopt_skips(config: Any, layer: str) -> bool:
    """Whether vLLM's ModelOpt config leaves the linear layer of that name as it is."""
    return config.is_layer_excluded(layer)


def online_skips(config: Any, layer: str) -> bool:
    """Whether vLLM's OnlineQuantizationConfig leaves the linear layer of that name as it is."""
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

    return should_ignore_layer(layer, config.ignored_layers, use_fnmatch=True)


def compressed_tensors_target(config: Any, layer: str) -> str | None:
    """The key of `config.target_scheme_map` that a linear layer of that name has; None where it is not quantized."""
    import torch
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
        find_matched_target,
        should_ignore_layer,
    )

    if should_ignore_layer(layer, config.ignore):
        return None
    return find_matched_target(layer, torch.nn.Linear(1, 1), config.target_scheme_map)
