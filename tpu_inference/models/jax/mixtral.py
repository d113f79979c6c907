# SPDX-License-Identifier: Apache-2.0
"""Mixtral: Mistral with experts in every layer."""

from typing import Any

from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.moe import Routing
from tpu_inference.layers.jax.config import ExpertNames, MoEConfig, decoder_config
from tpu_inference.layers.jax.decoder import Decoder

_EXPERT = "block_sparse_moe.experts.{expert}"
NAMES = ExpertNames(
    router="block_sparse_moe.gate",
    gate_up=(f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight"),
    down=f"{_EXPERT}.w2.weight",
)


class MixtralForCausalLM(Decoder):
    """`MixtralForCausalLM` of transformers."""

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        moe = MoEConfig(
            hf_config.num_local_experts,
            hf_config.intermediate_size,
            Routing(hf_config.num_experts_per_tok, renormalize=True),
            names=NAMES,
        )
        everywhere = (True,) * hf_config.num_hidden_layers
        super().__init__(decoder_config(hf_config, ctx.max_model_len, moe=moe, moe_of_layer=everywhere), ctx)
