# SPDX-License-Identifier: Apache-2.0
"""Mistral: Llama with a sliding window in every layer where the config gives one."""

from typing import Any

from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.jax.config import decoder_config
from tpu_inference.layers.jax.decoder import Decoder


class MistralForCausalLM(Decoder):
    """`MistralForCausalLM` of transformers."""

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        super().__init__(decoder_config(hf_config, ctx.max_model_len), ctx)
