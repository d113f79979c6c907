# SPDX-License-Identifier: Apache-2.0
"""gpt-oss: attention sinks, alternating windows, biases everywhere, and experts with a clamped activation."""

from typing import Any

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.moe import Routing
from tpu_inference.layers.jax.config import ExpertNames, MoEConfig, decoder_config
from tpu_inference.layers.jax.decoder import Decoder

NAMES = ExpertNames(
    router="mlp.router",
    gate_up=("mlp.experts.gate_up_proj",),
    down="mlp.experts.down_proj",
    gate_up_bias="mlp.experts.gate_up_proj_bias",
    down_bias="mlp.experts.down_proj_bias",
)
_ALPHA, _LIMIT = 1.702, 7.0


class GptOssForCausalLM(Decoder):
    """`GptOssForCausalLM` of transformers."""

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        clamp = (getattr(hf_config, "swiglu_alpha", _ALPHA), getattr(hf_config, "swiglu_limit", _LIMIT))
        if clamp != (_ALPHA, _LIMIT):
            raise TpuInferenceError(
                f"swiglu_alpha and swiglu_limit are {clamp}: served are {(_ALPHA, _LIMIT)}, those of gpt-oss."
            )
        moe = MoEConfig(
            hf_config.num_local_experts,
            hf_config.intermediate_size,
            # The softmax of the chosen alone is that of all, made to sum to 1.
            Routing(hf_config.num_experts_per_tok, renormalize=True),
            activation="swigluoai",
            router_bias=True,
            transposed=True,
            names=NAMES,
        )
        bias = bool(hf_config.attention_bias)
        choices = dict(moe=moe, moe_of_layer=(True,) * hf_config.num_hidden_layers)
        super().__init__(
            decoder_config(hf_config, ctx.max_model_len, qkv_bias=bias, o_bias=bias, sinks=True, **choices), ctx
        )
