# SPDX-License-Identifier: Apache-2.0
"""Llama 2 and 3, and what shares their architecture."""

from typing import Any

from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.jax.config import decoder_config
from tpu_inference.layers.jax.decoder import Decoder


class LlamaForCausalLM(Decoder):
    """`LlamaForCausalLM` of transformers."""

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        bias = bool(getattr(hf_config, "attention_bias", False))
        choices = dict(qkv_bias=bias, o_bias=bias, mlp_bias=bool(getattr(hf_config, "mlp_bias", False)))
        super().__init__(decoder_config(hf_config, ctx.max_model_len, **choices), ctx)
