# SPDX-License-Identifier: Apache-2.0
"""What the KV cache is kept in: the model's type, or e4m3 with a scale for K and one for V of each layer."""

import logging
from typing import Any

from tpu_inference.logger import init_logger, log_once

logger = init_logger(__name__)

QUANTIZED = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn"}
"""vLLM's names of --kv-cache-dtype."""


def quantized_cache_dtype(vllm_config: Any) -> str | None:
    """The type of a KV cache of one byte a number: what --kv-cache-dtype says, or with "auto" what the checkpoint has scales for; else None."""
    asked = vllm_config.cache_config.cache_dtype
    if asked == "auto" and getattr(vllm_config.quant_config, "kv_cache_scheme", None):
        asked = "fp8"
    return QUANTIZED.get(asked)


def cache_torch_dtype(vllm_config: Any) -> Any:
    """A torch type as large as a number in the cache, by which vLLM counts bytes."""
    import torch

    return vllm_config.model_config.dtype if quantized_cache_dtype(vllm_config) is None else torch.uint8


def refused_scheme(quant_config: Any) -> str | None:
    """What of a checkpoint's way of scaling the KV cache is not served."""
    scheme = getattr(quant_config, "kv_cache_scheme", None)
    if not scheme:
        return None
    kind = (scheme.get("type"), scheme.get("num_bits"), scheme.get("strategy"), bool(scheme.get("dynamic")))
    if kind == ("float", 8, "tensor", False) and scheme.get("symmetric", True):
        return None
    dynamic = "with scales made while serving" if kind[3] else "with fixed scales"
    return f"A KV cache of {kind[0]}{kind[1]} by {kind[2]} {dynamic}"


def warn_of_missing_scales(missing: int) -> None:
    """Said once, of K's and V's of all layers."""
    if missing:
        log_once(
            logger,
            logging.WARNING,
            "The checkpoint lacks %d scales of the KV cache, which are taken for 1: K and V beyond 448 are clipped.",
            missing,
        )
