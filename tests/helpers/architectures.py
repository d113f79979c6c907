# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501
"""A tiny checkpoint of every architecture that transformers can make and vLLM's registry of text generation knows: what its config is, as data."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from helpers.twins import TWINS, rewrite

VOCAB_SIZE = 304
LAYERS = 5
_DENSE: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    pad_token_id=0,
)  # fmt: skip
_GPT2: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE, n_positions=256, n_embd=64, n_layer=LAYERS, n_head=4, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=True, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip
_MOE: dict[str, Any] = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)
_DEEPSEEK: dict[str, Any] = dict(
    q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=1, first_k_dense_replace=1, num_key_value_heads=4,
    norm_topk_prob=True,
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny one."""

    config: str
    """Class of transformers' config."""
    fields: dict[str, Any] = field(default_factory=dict)
    """What differs from a small Llama; None takes a field away."""
    base: dict[str, Any] = field(default_factory=lambda: _DENSE)
    scale: float = 12.0
    """Of the matrices: enough for greedy decoding to wander instead of repeating itself."""
    differs: str = ""
    """Why vLLM's class computes something else than transformers, where it does."""


_A = Architecture
ARCHITECTURES: dict[str, Architecture] = {
    "ApertusForCausalLM": _A("ApertusConfig"),
    "ArceeForCausalLM": _A("ArceeConfig"),
    "BloomForCausalLM": _A("BloomConfig", base=dict(vocab_size=VOCAB_SIZE, hidden_size=64, n_layer=LAYERS, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)),
    "CohereForCausalLM": _A("CohereConfig", dict(tie_word_embeddings=True, use_qk_norm=False, logit_scale=0.25)),
    "Cohere2ForCausalLM": _A("Cohere2Config", dict(tie_word_embeddings=True, sliding_window=256, logit_scale=0.25)),
    "CwmForCausalLM": _A("CwmConfig", dict(sliding_window=32)),
    "DbrxForCausalLM": _A("DbrxConfig", dict(attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0), ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2)), base=dict(vocab_size=VOCAB_SIZE, d_model=64, n_heads=4, n_layers=LAYERS, max_seq_len=256, tie_word_embeddings=False)),
    "DeepseekV2ForCausalLM": _A("DeepseekV2Config", dict(_DEEPSEEK, topk_method="greedy", n_group=1, topk_group=1, norm_topk_prob=False)),
    "DeepseekV3ForCausalLM": _A("DeepseekV3Config", dict(_DEEPSEEK, topk_method="noaux_tc", scoring_func="sigmoid", n_group=4, topk_group=2, num_experts_per_tok=2)),
    "Ernie4_5ForCausalLM": _A("Ernie4_5Config"),
    "Ernie4_5_MoeForCausalLM": _A("Ernie4_5_MoeConfig", dict(moe_num_experts=8, moe_k=2, moe_intermediate_size=48, moe_layer_start_index=1, moe_layer_end_index=4)),
    "Exaone4ForCausalLM": _A("Exaone4Config", dict(sliding_window=32, sliding_window_pattern=4)),
    "FalconForCausalLM": _A("FalconConfig", dict(new_decoder_architecture=True, num_kv_heads=2, bias=False, parallel_attn=True, alibi=False, num_key_value_heads=None, intermediate_size=None, tie_word_embeddings=True)),
    "FlexOlmoForCausalLM": _A("FlexOlmoConfig", dict(num_experts=8, num_experts_per_tok=2)),
    "GemmaForCausalLM": _A("GemmaConfig", dict(head_dim=16, tie_word_embeddings=True)),
    "Gemma2ForCausalLM": _A("Gemma2Config", dict(head_dim=16, tie_word_embeddings=True, sliding_window=32, query_pre_attn_scalar=16)),
    "Gemma3ForCausalLM": _A("Gemma3TextConfig", dict(head_dim=16, sliding_window=32, query_pre_attn_scalar=16, tie_word_embeddings=True)),
    "GlmForCausalLM": _A("GlmConfig", dict(head_dim=16)),
    "Glm4ForCausalLM": _A("Glm4Config", dict(head_dim=16)),
    "Glm4MoeForCausalLM": _A("Glm4MoeConfig", dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, n_shared_experts=1, first_k_dense_replace=1, head_dim=16)),
    "GPT2LMHeadModel": _A("GPT2Config", base=_GPT2),
    "GPTBigCodeForCausalLM": _A("GPTBigCodeConfig", base=_GPT2),
    "GPTJForCausalLM": _A("GPTJConfig", dict(rotary_dim=8, tie_word_embeddings=False), base=_GPT2),
    "GPTNeoXForCausalLM": _A("GPTNeoXConfig", dict(num_key_value_heads=None)),
    "GptOssForCausalLM": _A("GptOssConfig", dict(num_local_experts=8, num_experts_per_tok=2, head_dim=16, sliding_window=32)),
    "GraniteForCausalLM": _A("GraniteConfig", dict(attention_multiplier=0.25, residual_multiplier=0.5, logits_scaling=2.0, embedding_multiplier=3.0)),
    "GraniteMoeForCausalLM": _A("GraniteMoeConfig", dict(num_local_experts=8, num_experts_per_tok=2, attention_multiplier=0.25)),
    "GraniteMoeSharedForCausalLM": _A("GraniteMoeSharedConfig", dict(num_local_experts=8, num_experts_per_tok=2, attention_multiplier=0.25, shared_intermediate_size=48)),
    "GraniteMoeSWAForCausalLM": _A("GraniteMoeSWAConfig", dict(num_local_experts=8, num_experts_per_tok=2, attention_multiplier=0.25, shared_intermediate_size=48, sliding_window=32)),
    "GraniteSWAForCausalLM": _A("GraniteSWAConfig", dict(attention_multiplier=0.25, residual_multiplier=0.5, sliding_window=32)),
    "HunYuanDenseV1ForCausalLM": _A("HunYuanDenseV1Config", dict(head_dim=16)),
    "HunYuanMoEV1ForCausalLM": _A("HunYuanMoEV1Config", dict(head_dim=16, num_experts=8, moe_topk=2)),
    "HyperCLOVAXForCausalLM": _A("HyperCLOVAXConfig"),
    "Jais2ForCausalLM": _A("Jais2Config", dict(head_dim=16)),
    "LlamaForCausalLM": _A("LlamaConfig"),
    "MellumForCausalLM": _A("MellumConfig", dict(_MOE, head_dim=16)),
    "MiniCPM3ForCausalLM": _A("MiniCPM3Config", dict(q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4)),
    "Ministral3ForCausalLM": _A("Ministral3Config", dict(head_dim=16)),
    "MistralForCausalLM": _A("MistralConfig", dict(sliding_window=32)),
    "MixtralForCausalLM": _A("MixtralConfig", dict(num_local_experts=8, num_experts_per_tok=2)),
    "NemotronForCausalLM": _A("NemotronConfig"),
    "OlmoForCausalLM": _A("OlmoConfig"),
    "Olmo2ForCausalLM": _A("Olmo2Config"),
    "Olmo3ForCausalLM": _A("Olmo3Config", dict(sliding_window=32)),
    "OlmoeForCausalLM": _A("OlmoeConfig", dict(num_experts=8, num_experts_per_tok=2)),
    "OPTForCausalLM": _A("OPTConfig", dict(ffn_dim=96, word_embed_proj_dim=64, dropout=0.0, num_key_value_heads=None, intermediate_size=None)),
    "PhiForCausalLM": _A("PhiConfig"),
    "Phi3ForCausalLM": _A("Phi3Config"),
    "PhiMoEForCausalLM": _A("PhimoeConfig", dict(attention_bias=True, lm_head_bias=True, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.01), differs="vLLM's class leaves the bias of lm_head out"),
    "Qwen2ForCausalLM": _A("Qwen2Config"),
    "Qwen2MoeForCausalLM": _A("Qwen2MoeConfig", dict(_MOE, shared_expert_intermediate_size=48)),
    "Qwen3ForCausalLM": _A("Qwen3Config", dict(head_dim=16)),
    "Qwen3MoeForCausalLM": _A("Qwen3MoeConfig", dict(_MOE, head_dim=16)),
    "SeedOssForCausalLM": _A("SeedOssConfig", dict(head_dim=16)),
    "SmolLM3ForCausalLM": _A("SmolLM3Config"),
    "StableLmForCausalLM": _A("StableLmConfig"),
    "Starcoder2ForCausalLM": _A("Starcoder2Config", dict(sliding_window=32)),
    "VaultGemmaForCausalLM": _A("VaultGemmaConfig", dict(head_dim=16, tie_word_embeddings=True, sliding_window=32, query_pre_attn_scalar=16)),
}  # fmt: skip
NAMES = (*ARCHITECTURES, *TWINS)
"""All that can be saved: those of transformers' own, and those rewritten from one."""


def config(architecture: str, changes: dict[str, Any]) -> Any:
    """transformers' config of the tiny model, with `changes`; AttributeError where this transformers has no such class."""
    import transformers

    entry = ARCHITECTURES[architecture]
    fields = {k: v for k, v in {**entry.base, **entry.fields, **changes}.items() if v is not None}
    return getattr(transformers, entry.config)(architectures=[architecture], **fields)


def build(architecture: str, changes: dict[str, Any]) -> torch.nn.Module:
    """A float32 model with random weights; its config has `changes`."""
    import transformers

    torch.manual_seed(len(architecture))
    model = transformers.AutoModelForCausalLM.from_config(config(architecture, changes), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # a router of zeros chooses experts by their order
                parameter.normal_(std=0.02)
            if parameter.ndim > 1:
                parameter.mul_(ARCHITECTURES[architecture].scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def _save(architecture: str, path: Path, changes: dict[str, Any]) -> None:
    build(architecture, changes).save_pretrained(path)
    # transformers writes its own class's name, which is not always the registry's.
    text = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**text, "architectures": [architecture]}))


def save(architecture: str, directory: Path) -> str:
    """Save the checkpoint unless it is there; returns its directory."""
    path = directory / architecture
    if not (path / "config.json").exists():
        if twin := TWINS.get(architecture):
            _save(twin.of, path / "twin", twin.base)
            rewrite(architecture, path / "twin", path)
        else:
            _save(architecture, path, {})
    return str(path)


def for_transformers(path: str) -> str:
    """The checkpoint that transformers loads in the place of the one at `path`."""
    twin = Path(path) / "twin"
    return str(twin if twin.exists() else path)
