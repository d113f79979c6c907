# SPDX-License-Identifier: Apache-2.0
"""Qwen2-MoE (a shared expert with a gate) and Qwen3-MoE (a norm on q and k): experts in all layers, or in those that the config names."""

from typing import Any

from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.moe import Routing
from tpu_inference.layers.jax.config import ExpertNames, MoEConfig, decoder_config
from tpu_inference.layers.jax.decoder import Decoder

NAMES = ExpertNames(
    shared_gate_up=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    shared_down="mlp.shared_expert.down_proj",
    shared_gate="mlp.shared_expert_gate",
)


class _QwenMoe(Decoder):
    def __init__(self, hf: Any, ctx: BuildContext, *, shared_width: int, **choices: Any) -> None:
        routing = Routing(hf.num_experts_per_tok, renormalize=bool(hf.norm_topk_prob))
        moe = MoEConfig(hf.num_experts, hf.moe_intermediate_size, routing, shared_width=shared_width, names=NAMES)
        of_layer = tuple(
            i not in hf.mlp_only_layers and hf.num_experts > 0 and (i + 1) % hf.decoder_sparse_step == 0
            for i in range(hf.num_hidden_layers)
        )
        super().__init__(decoder_config(hf, ctx.max_model_len, moe=moe, moe_of_layer=of_layer, **choices), ctx)


class Qwen2MoeForCausalLM(_QwenMoe):
    """`Qwen2MoeForCausalLM` of transformers."""

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        shared_width = hf_config.shared_expert_intermediate_size
        super().__init__(hf_config, ctx, shared_width=shared_width, qkv_bias=bool(hf_config.qkv_bias))


class Qwen3MoeForCausalLM(_QwenMoe):
    """`Qwen3MoeForCausalLM` of transformers."""

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        bias = bool(hf_config.attention_bias)
        super().__init__(hf_config, ctx, shared_width=0, qkv_bias=bias, o_bias=bias, qk_norm=True)
