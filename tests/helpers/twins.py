# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501
"""Architectures that transformers has no class of, and a class of its that computes the same by other names: tiny checkpoints are made of that one's."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Twin:
    """A checkpoint of one architecture that is another's, rewritten."""

    of: str
    """Architecture of transformers, a key of `architectures.ARCHITECTURES`."""
    base: dict[str, Any] = field(default_factory=dict)
    """Fields of the config of the one that is rewritten, where they differ from those of the zoo."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields that config.json has besides, or instead."""
    names: tuple[tuple[str, str], ...] = ()
    """(pattern, replacement) of tensors' names, applied in turn."""
    fuse: Callable[[Tensors], Tensors] | None = None
    """What becomes of q, k and v of a layer, {"q.weight": ..., "k.weight": ...}; None: they stay apart."""


def _in_groups(qkv: Tensors) -> Tensors:
    """InternLM 2: of each KV head its query heads, its k and its v, one after the other."""
    kv_heads, head_dim = 2, 16
    parts = [qkv[f"{part}.weight"].unflatten(0, (kv_heads, -1, head_dim)) for part in "qkv"]
    return {"weight": torch.cat(parts, dim=1).flatten(0, 2)}


def _in_a_row(qkv: Tensors) -> Tensors:
    """ChatGLM: all of q, then k, then v."""
    return {kind: torch.cat([qkv[f"{part}.{kind}"] for part in "qkv"]) for kind in ("weight", "bias")}


_INTERNLM2 = (
    (r"embed_tokens", "tok_embeddings"), (r"lm_head", "output"), (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"), (r"self_attn\.qkv", "attention.wqkv"), (r"self_attn\.o_proj", "attention.wo"),
    (r"mlp\.gate_proj", "feed_forward.w1"), (r"mlp\.down_proj", "feed_forward.w2"), (r"mlp\.up_proj", "feed_forward.w3"),
)  # fmt: skip
_EXAONE = (
    (r"model\.embed_tokens", "transformer.wte"), (r"model\.norm", "transformer.ln_f"), (r"model\.layers", "transformer.h"),
    (r"input_layernorm", "ln_1"), (r"post_attention_layernorm", "ln_2"), (r"self_attn\.o_proj", "attn.attention.out_proj"),
    (r"self_attn", "attn.attention"), (r"mlp\.gate_proj", "mlp.c_fc_0"), (r"mlp\.up_proj", "mlp.c_fc_1"), (r"mlp\.down_proj", "mlp.c_proj"),
)  # fmt: skip
_CHATGLM = (
    (r"model\.embed_tokens", "transformer.embedding.word_embeddings"), (r"model\.norm", "transformer.encoder.final_layernorm"),
    (r"lm_head", "transformer.output_layer"), (r"model\.layers", "transformer.encoder.layers"),
    (r"self_attn\.qkv", "self_attention.query_key_value"), (r"self_attn\.o_proj", "self_attention.dense"),
    (r"mlp\.gate_up_proj", "mlp.dense_h_to_4h"), (r"mlp\.down_proj", "mlp.dense_4h_to_h"),
)  # fmt: skip
_CHATGLM_CONFIG = dict(
    model_type="chatglm", num_layers=5, padded_vocab_size=304, hidden_size=64, ffn_hidden_size=96, kv_channels=16,
    num_attention_heads=4, seq_length=256, layernorm_epsilon=1e-5, rmsnorm=True, add_qkv_bias=True, add_bias_linear=False,
    multi_query_attention=True, multi_query_group_num=2, original_rope=True, tie_word_embeddings=False,
)  # fmt: skip

TWINS: dict[str, Twin] = {
    "ChatGLMModel": Twin("GlmForCausalLM", dict(attention_bias=True, rms_norm_eps=1e-5), _CHATGLM_CONFIG, _CHATGLM, _in_a_row),
    "ExaoneForCausalLM": Twin("LlamaForCausalLM", {}, dict(activation_function="silu", layer_norm_epsilon=1e-6), _EXAONE),
    "InternLM2ForCausalLM": Twin("LlamaForCausalLM", {}, dict(bias=False), _INTERNLM2, _in_groups),
    "InternLM3ForCausalLM": Twin("Qwen2ForCausalLM", {}, dict(bias=False, qkv_bias=True)),
    "IQuestCoderForCausalLM": Twin("LlamaForCausalLM"),
    "MiniCPMForCausalLM": Twin("GraniteForCausalLM", dict(attention_multiplier=0.25, residual_multiplier=0.4, logits_scaling=2.0, embedding_multiplier=3.0), dict(scale_emb=3.0, scale_depth=0.4 * 5**0.5, dim_model_base=32, num_experts=0)),
    "OrionForCausalLM": Twin("StableLmForCausalLM", dict(partial_rotary_factor=1.0, layer_norm_eps=1e-5), dict(rms_norm_eps=1e-5)),
    "SolarForCausalLM": Twin("LlamaForCausalLM", {}, dict(bskcn_1=[], bskcn_2=[], bskcn_3=[], bskcn_4=[], bskcn_tv=[0.9, 0.8])),
    "TeleChat3ForCausalLM": Twin("LlamaForCausalLM"),
}  # fmt: skip
"""Solar is checked without its skip connections, which transformers has in no class."""


def _renamed(tensors: Tensors, twin: Twin) -> Tensors:
    if twin.fuse is not None:
        layers: dict[str, Tensors] = {}
        for name in [name for name in tensors if re.search(r"self_attn\.[qkv]_proj", name)]:
            prefix, part, kind = re.fullmatch(r"(.*self_attn\.)([qkv])_proj\.(\w+)", name).groups()
            layers.setdefault(prefix, {})[f"{part}.{kind}"] = tensors.pop(name)
        for prefix, parts in layers.items():
            tensors |= {f"{prefix}qkv.{kind}": tensor for kind, tensor in twin.fuse(parts).items()}
    for pattern, replacement in twin.names:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def rewrite(architecture: str, source: Path, target: Path) -> None:
    """Make of the checkpoint of the twin at `source` that of `architecture` at `target`."""
    from safetensors.torch import load_file, save_file

    twin = TWINS[architecture]
    target.mkdir(parents=True, exist_ok=True)
    save_file(_renamed(load_file(source / "model.safetensors"), twin), target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    kept = {} if "model_type" in twin.fields else config
    text = json.dumps({**kept, **twin.fields, "architectures": [architecture]}, indent=1)
    (target / "config.json").write_text(text)
