# SPDX-License-Identifier: Apache-2.0
"""Llama 4 and Llama Guard 4, text alone: attention within chunks where positions are rotated, over everything where they are not."""

from dataclasses import replace
from typing import Any

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.moe import Routing
from tpu_inference.layers.common.rope import Rope, rope_from_config
from tpu_inference.layers.jax.config import ExpertNames, MoEConfig, WeightNames, decoder_config
from tpu_inference.layers.jax.decoder import Decoder

EXPERTS = ExpertNames(
    router="feed_forward.router",
    gate_up=("feed_forward.experts.gate_up_proj",),
    down="feed_forward.experts.down_proj",
    shared_gate_up=("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj"),
    shared_down="feed_forward.shared_expert.down_proj",
)
TEXT = WeightNames(gate_up=("feed_forward.gate_proj", "feed_forward.up_proj"), down="feed_forward.down_proj")


def _ropes(hf: Any, max_model_len: int) -> tuple[Rope, Rope]:
    """Of layers that rotate, and of those that do not: by angles of 0."""
    rotating = rope_from_config(hf, hf.head_dim, max_model_len)
    temperature = (hf.attn_scale, hf.floor_scale) if hf.attn_temperature_tuning else None
    still = Rope((0.0,) * len(rotating.inv_freq), temperature=temperature)
    return replace(rotating, normed=bool(hf.use_qk_norm)), still


class Llama4ForCausalLM(Decoder):
    """`Llama4ForCausalLM` of transformers."""

    names = TEXT

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        hf, bias = hf_config, bool(hf_config.attention_bias)
        if hf.router_jitter_noise:
            raise TpuInferenceError("router_jitter_noise is for training: remove it from config.json.")
        moe = MoEConfig(
            hf.num_local_experts,
            hf.intermediate_size,
            Routing(hf.num_experts_per_tok, renormalize=False, scoring="sigmoid"),
            shared_width=hf.intermediate_size,
            transposed=True,
            weigh_input=True,
            names=EXPERTS,
        )
        super().__init__(
            decoder_config(
                hf, ctx.max_model_len,
                names=self.names, intermediate_size=hf.intermediate_size_mlp, qkv_bias=bias, o_bias=bias,
                ropes=_ropes(hf, ctx.max_model_len), interleaved_rope=True,
                rope_of_layer=tuple(int(not rotates) for rotates in hf.no_rope_layers[: hf.num_hidden_layers]),
                moe=moe, moe_of_layer=tuple(i in hf.moe_layers for i in range(hf.num_hidden_layers)),
            ),
            ctx,
        )  # fmt: skip


class Llama4ForConditionalGeneration(Llama4ForCausalLM):
    """The text model of `Llama4ForConditionalGeneration` of transformers."""

    names = replace(
        TEXT,
        embed="language_model.model.embed_tokens",
        layer="language_model.model.layers.{layer}",
        norm="language_model.model.norm",
        lm_head="language_model.lm_head",
        unread=("vision_model.", "multi_modal_projector."),
    )
