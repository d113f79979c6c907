# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with odd shapes, saved by transformers, and what transformers generates from them."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCAB_SIZE = 331
MAX_LEN = 256
SCALE = 16.0
"""Of the matrices: enough for greedy decoding to wander instead of repeating itself."""
_COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=96,
    intermediate_size=101,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=80,
    max_position_embeddings=MAX_LEN,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
_FULL_YARN = dict(_YARN, beta_fast=32.0, beta_slow=1.0, truncate=False)
_GEMMA = dict(num_attention_heads=4, num_key_value_heads=2, query_pre_attn_scalar=80, sliding_window=24)

_MOE = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=43)
_DEEPSEEK = dict(
    q_lora_rank=40, kv_lora_rank=24, qk_rope_head_dim=10, qk_nope_head_dim=18, v_head_dim=14, n_routed_experts=8,
    num_experts_per_tok=3, moe_intermediate_size=43, n_shared_experts=2, first_k_dense_replace=1, num_key_value_heads=None,
)  # fmt: skip
_DEEPSEEK_YARN = dict(_YARN, mscale=1.0, mscale_all_dim=0.8)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-llama3-rope-bias": ("LlamaConfig", dict(rope_parameters=_LLAMA3, attention_bias=True, mlp_bias=True)),
    "llama-yarn": ("LlamaConfig", dict(rope_parameters=_YARN)),
    "llama-linear": ("LlamaConfig", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "llama-dynamic": ("LlamaConfig", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))),
    "mistral": ("MistralConfig", dict(sliding_window=24)),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", dict(_GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "gemma3": ("Gemma3TextConfig", dict(_GEMMA, layer_types=["sliding_attention"] * 2 + ["full_attention"])),
    # Phi-3 has no head_dim of its own: hidden_size / heads.
    "phi3": ("Phi3Config", dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=2)),
    "mixtral": (
        "MixtralConfig",
        dict(num_local_experts=8, num_experts_per_tok=3, intermediate_size=43, sliding_window=24),
    ),
    # Experts in every other layer, so that layers of both kinds take turns.
    "qwen2-moe": ("Qwen2MoeConfig", dict(_MOE, decoder_sparse_step=2, shared_expert_intermediate_size=51)),
    "qwen3-moe": ("Qwen3MoeConfig", dict(_MOE, mlp_only_layers=[0], norm_topk_prob=True)),
    "gpt-oss": (
        "GptOssConfig",
        dict(
            num_local_experts=8,
            num_experts_per_tok=3,
            intermediate_size=43,
            sliding_window=24,
            rope_parameters=_FULL_YARN,
        ),
    ),
    # Chunks that prompts go past, layers without positions, and experts in every other layer.
    "llama4": (
        "Llama4TextConfig",
        dict(
            num_local_experts=8,
            num_experts_per_tok=1,
            intermediate_size=43,
            intermediate_size_mlp=101,
            interleave_moe_layer_step=2,
            no_rope_layer_interval=2,
            attention_chunk_size=16,
            floor_scale=8,
            rope_parameters=_LLAMA3,
        ),
    ),
    # Queries of the hidden state itself, as in V2-Lite, and groups, as in V2.
    "deepseek-v2": (
        "DeepseekV2Config",
        dict(
            _DEEPSEEK,
            q_lora_rank=None,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            scoring_func="softmax",
            routed_scaling_factor=1.5,
        ),
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        dict(
            _DEEPSEEK,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            rope_parameters=_DEEPSEEK_YARN,
        ),
    ),
}
"""Name -> (class of transformers' config, what differs from the common shape)."""
_EIGHT = dict(num_attention_heads=8, num_key_value_heads=2)
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "8": dict(_EIGHT, vocab_size=336),
    "8-odd": _EIGHT,
    "d128": dict(head_dim=128),
    "deep": dict(_EIGHT, num_hidden_layers=6),
    "even": dict(hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=32),
    "blocks": dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=32),
    "even-experts": dict(
        hidden_size=128,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=64,
        intermediate_size=64,
    ),
    "tied": dict(tie_word_embeddings=True),
}
"""What "NAME@VARIANT" has instead: query heads that tensor parallelism divides, as vLLM wants, and a vocabulary that it divides or not; a head dim
that the Pallas kernels serve; sizes that groups of quantized columns divide, on eight devices too; whole blocks of values of four bits;
layers enough to repeat; a head that is the embedding, as vLLM's class of Gemma 2 has it."""


def build(name: str, **changes: Any) -> torch.nn.Module:
    """A float32 model with random weights, scaled so that greedy decoding wanders; its config has `changes`."""
    import transformers

    name, _, variant = name.partition("@")
    kind, extra = FAMILIES[name]
    fields = {**_COMMON, **extra, **VARIANTS[variant], **changes}
    if variant == "deep" and "layer_types" in fields:  # the pattern once more, and the layer it begins with
        fields["layer_types"] = fields["layer_types"] * 2 + fields["layer_types"][:1]
        fields["num_hidden_layers"] = len(fields["layer_types"])
    if name.startswith("qwen2") or name == "phi3":
        fields.pop("head_dim")
    if name.startswith("deepseek"):
        fields.pop("head_dim")
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**fields), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(SCALE)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model.float().eval()


def save(name: str, directory: Path, **options: Any) -> str:
    """Save the checkpoint unless it is there; returns its directory."""
    path = directory / name
    if not (path / "config.json").exists():
        build(name).save_pretrained(path, **options)
    return str(path)


def prompts(count: int, *, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Random token ids of mixed lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB_SIZE, rng.integers(1, longest)).tolist() for _ in range(count)]


LENGTH_MATTERS = ("dynamic", "longrope")
"""Rotary embeddings whose angles are other ones in a longer sequence: what is read at once is not what was read token by token."""
torch.set_num_threads(1)  # tests run side by side


@lru_cache
def _model(path: str) -> torch.nn.Module:
    import transformers

    return (
        transformers.AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", experts_implementation="eager"
        )
        .float()
        .eval()
    )


def greedy(path: str, prompt: list[int], count: int) -> list[int]:
    """The `count` tokens that transformers continues `prompt` with."""
    with torch.no_grad():
        out = _model(path).generate(
            torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
        )
    return out[0, len(prompt) :].tolist()


def chosen(path: str, prompt: list[int], answer: list[int]) -> list[int]:
    """The token that transformers chooses at each place of `answer`, all read at once: `answer` itself where it is what `greedy` gives."""
    rope = getattr(_model(path).config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type") in LENGTH_MATTERS:
        return greedy(path, prompt, len(answer))
    return logprobs(path, prompt + answer)[len(prompt) - 1 : -1].argmax(-1).tolist()


def logprobs(path: str, tokens: list[int]) -> np.ndarray:
    """float32 [len(tokens), vocab]: transformers' log-softmax at each position."""
    with torch.no_grad():
        return torch.log_softmax(_model(path)(torch.tensor([tokens])).logits[0], dim=-1).numpy()
