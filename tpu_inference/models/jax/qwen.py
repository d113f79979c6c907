# SPDX-License-Identifier: Apache-2.0
"""Qwen2 (biases on q, k and v) and Qwen3 (a norm on q and k)."""

from typing import Any

from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.jax.config import decoder_config
from tpu_inference.layers.jax.decoder import Decoder


class Qwen2ForCausalLM(Decoder):
    """`Qwen2ForCausalLM` of transformers."""

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        super().__init__(decoder_config(hf_config, ctx.max_model_len, qkv_bias=True), ctx)


class Qwen3ForCausalLM(Decoder):
    """`Qwen3ForCausalLM` of transformers."""

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        bias = bool(hf_config.attention_bias)
        super().__init__(decoder_config(hf_config, ctx.max_model_len, qkv_bias=bias, o_bias=bias, qk_norm=True), ctx)
