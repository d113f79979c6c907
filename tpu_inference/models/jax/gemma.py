# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 and the text models of Gemma 3: norms around each block, scaled embeddings, soft caps, alternating windows."""

from typing import Any

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.jax.config import WeightNames, decoder_config
from tpu_inference.layers.jax.decoder import Decoder

NAMES = WeightNames(
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


class Gemma2ForCausalLM(Decoder):
    """`Gemma2ForCausalLM` of transformers."""

    qk_norm = False

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        if getattr(hf_config, "use_bidirectional_attention", None):
            raise TpuInferenceError(
                "use_bidirectional_attention is not served: this model generates with causal attention."
            )
        bias = bool(hf_config.attention_bias)
        choices = dict(
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=self.qk_norm,
            norm_offset=1.0,
            embed_scale=hf_config.hidden_size**0.5,
            scale=hf_config.query_pre_attn_scalar**-0.5,
            attention_soft_cap=hf_config.attn_logit_softcapping,
            logits_soft_cap=hf_config.final_logit_softcapping,
            names=NAMES,
        )
        super().__init__(decoder_config(hf_config, ctx.max_model_len, **choices), ctx)


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """`Gemma3ForCausalLM` of transformers."""

    qk_norm = True
