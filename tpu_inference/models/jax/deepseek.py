# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V2 and V3, and what shares their classes (R1, Kimi K2, Moonlight): latent attention, shared experts, routing by groups."""

import copy
import math
from typing import Any

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.moe import SCORING, Routing
from tpu_inference.layers.jax.config import MLAConfig, MoEConfig, decoder_config
from tpu_inference.layers.jax.decoder import Decoder

METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


def attention_scale(hf: Any) -> float:
    """Of scores: yarn's correction for long contexts goes into it, squared, as queries and keys would have it once each."""
    scale, rope = (hf.qk_nope_head_dim + hf.qk_rope_head_dim) ** -0.5, hf.rope_parameters
    factor, weight = rope.get("factor") or 1.0, rope.get("mscale_all_dim") or 0.0
    if rope.get("rope_type", "default") == "default" or factor <= 1:
        return scale
    return scale * (0.1 * weight * math.log(factor) + 1.0) ** 2


def _refuse_unserved(hf: Any, method: str, scoring: str) -> None:
    """Raises TpuInferenceError with all that is not served."""
    wrong = [
        f"{name}={value!r} ({advice})"
        for name, value, served, advice in (
            ("topk_method", method, method in METHODS, f"served are {', '.join(METHODS)}"),
            ("scoring_func", scoring, scoring in SCORING, f"served are {', '.join(SCORING)}"),
            ("hidden_act", hf.hidden_act, hf.hidden_act == "silu", "served is silu"),
            ("qk_rope_head_dim", hf.qk_rope_head_dim, hf.qk_rope_head_dim % 2 == 0, "it must be even: rotary embeddings turn pairs"),
            ("n_group", hf.n_group, not hf.n_routed_experts or hf.n_routed_experts % (hf.n_group or 1) == 0,
             f"it must divide n_routed_experts={hf.n_routed_experts}"),
            ("is_causal", getattr(hf, "is_causal", True), getattr(hf, "is_causal", True), "served is attention to what came before"),
        )
        if not served
    ]  # fmt: skip
    if wrong:
        raise TpuInferenceError(f"This config of DeepSeek has fields that are not served: {'; '.join(wrong)}.")


class DeepseekV3ForCausalLM(Decoder):
    """`DeepseekV3ForCausalLM` of transformers. Layers that predict further tokens (MTP) are not read."""

    scoring, method, renormalizes = "sigmoid", "noaux_tc", True
    """Where the config has no scoring_func, topk_method or norm_topk_prob."""

    def __init__(self, hf_config: Any, ctx: BuildContext) -> None:
        hf = copy.copy(hf_config)
        hf.head_dim = hf.qk_rope_head_dim  # what is rotated
        mla = MLAConfig(
            hf.q_lora_rank or 0, hf.kv_lora_rank, hf.qk_nope_head_dim, hf.qk_rope_head_dim, hf.v_head_dim,
            pairs=bool(getattr(hf, "rope_interleave", True)), down_bias=bool(hf.attention_bias),
        )  # fmt: skip
        frequency = getattr(hf, "moe_layer_freq", None) or 1
        choices = dict(
            mla=mla,
            scale=attention_scale(hf),
            o_bias=bool(hf.attention_bias),
            mlp_bias=bool(getattr(hf, "mlp_bias", False)),
            moe=self._experts(hf),
            moe_of_layer=tuple(
                bool(hf.n_routed_experts) and i >= hf.first_k_dense_replace and i % frequency == 0
                for i in range(hf.num_hidden_layers)
            ),
            layers_unread=getattr(hf, "num_nextn_predict_layers", None) or 0,
        )
        super().__init__(decoder_config(hf, ctx.max_model_len, **choices), ctx)

    def _experts(self, hf: Any) -> MoEConfig | None:
        method = getattr(hf, "topk_method", None) or self.method
        scoring = getattr(hf, "scoring_func", None) or self.scoring
        _refuse_unserved(hf, method, scoring)
        if not hf.n_routed_experts:
            return None
        renormalizes = getattr(hf, "norm_topk_prob", None)
        groups = dict(groups=hf.n_group or 1, top_groups=hf.topk_group or 1) if method != "greedy" else {}
        return MoEConfig(
            hf.n_routed_experts,
            hf.moe_intermediate_size,
            Routing(
                hf.num_experts_per_tok,
                renormalize=self.renormalizes if renormalizes is None else bool(renormalizes),
                scoring=scoring,
                scale=hf.routed_scaling_factor,
                **groups,
            ),
            shared_width=hf.moe_intermediate_size * (hf.n_shared_experts or 0),
            router_float32=True,
            score_bias=method == "noaux_tc",
        )


class DeepseekV2ForCausalLM(DeepseekV3ForCausalLM):
    """`DeepseekV2ForCausalLM` of transformers."""

    scoring, method, renormalizes = "softmax", "greedy", False
