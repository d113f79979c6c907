# SPDX-License-Identifier: Apache-2.0
"""Phi-3 and Phi-4: Llama with q, k and v, and gate and up, fused in the checkpoint."""

from dataclasses import replace
from typing import Any

from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.jax.config import WeightNames, decoder_config
from tpu_inference.layers.jax.decoder import Decoder

NAMES = replace(WeightNames(), qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


class Phi3ForCausalLM(Decoder):
    """`Phi3ForCausalLM` of transformers."""

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        super().__init__(decoder_config(hf_config, ctx.max_model_len, names=NAMES), ctx)
