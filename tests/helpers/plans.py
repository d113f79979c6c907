# SPDX-License-Identifier: Apache-2.0
"""Configs of known sizes to plan with, and an answer made by hand."""

from pathlib import Path
from typing import Any

from tpu_inference.plan.answer import Answer, Settings, StepEstimate
from tpu_inference.plan.ici import IciCost
from tpu_inference.plan.jobs import SamplerCost
from tpu_inference.plan.memory import Compiled, MemoryPlan
from tpu_inference.plan.slices import parse_slice
from tpu_inference.plan.steps import KINDS, Load, StepCost
from tpu_inference.worker.memory import DeviceMemory

GIB = 2**30
_LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)  # fmt: skip
_LLAMA = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, rope_parameters=_LLAMA3)
_QWEN3 = dict(vocab_size=151936, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("LlamaConfig", dict(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, max_position_embeddings=1024,
    )),
    "tiny-gemma": ("Gemma3TextConfig", dict(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, max_position_embeddings=1024, sliding_window=256, query_pre_attn_scalar=128,
        layer_types=["sliding_attention"] * 2 + ["full_attention"],
    )),
    "llama-1b": ("LlamaConfig", dict(
        _LLAMA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64, tie_word_embeddings=True
    )),
    "llama-8b": ("LlamaConfig", dict(
        _LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, tie_word_embeddings=False
    )),
    "llama-70b": ("LlamaConfig", dict(
        _LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, tie_word_embeddings=False
    )),
    "qwen3-8b": ("Qwen3Config", dict(
        _QWEN3, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, tie_word_embeddings=False
    )),
    "tiny-moe": ("Qwen3MoeConfig", dict(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, max_position_embeddings=1024, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, mlp_only_layers=[0],
    )),
    "qwen3-30b-a3b": ("Qwen3MoeConfig", dict(
        _QWEN3, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, tie_word_embeddings=False,
    )),
    "mixtral-8x7b": ("MixtralConfig", dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=32768, rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=False,
    )),
    "gpt-oss-120b": ("GptOssConfig", {}),
}  # fmt: skip


def save_config(name: str, directory: Path, **changes: Any) -> str:
    """A directory that has a config.json and nothing else."""
    import transformers

    kind, fields = CONFIGS[name]
    config = getattr(transformers, kind)(**{**fields, **changes})
    config.architectures = [kind.replace("TextConfig", "Config").replace("Config", "ForCausalLM")]
    config.dtype = "bfloat16"
    config.save_pretrained(directory)
    return str(directory)


def made_up_step(batch: int, context: int, fast: float, slow: float, **changes: Any) -> StepEstimate:
    """A decode step of so many microseconds."""
    kinds = dict.fromkeys(KINDS, fast / 10)
    cost = StepCost(
        Load("decode", batch, 0, context), f"{batch}x{batch}", kinds, fast / 2, slow / 2, IciCost(1000, 3, 1.0, 2.0), ""
    )
    return StepEstimate(cost, **{**dict(sampling=10.0, sampling_is_floor=False, fast=fast, slow=slow), **changes})


def made_up_answer(where: str = "v6e:2x4", *, fits: bool = True, steps: tuple[StepEstimate, ...] = ()) -> Answer:
    """An 8-device answer with 20 of 32 GiB for the cache."""
    device = DeviceMemory(limit=32 * GIB, share=0.9, weights=4 * GIB, used=4 * GIB, temporaries=GIB)
    plan = (
        MemoryPlan(device, "", 19 * GIB, 128, 1000, 20 * GIB, {1024: 124, 8192: 15}, 27, notes=("One note.",))
        if fits
        else MemoryPlan(device, device.does_not_fit(), -3 * GIB)
    )
    settings = Settings(8, 8192, 256, 1024, "bfloat16", 128, 0.9)
    compiled = (Compiled("forward[1024x256]", 12.3, GIB), Compiled("sample[256]", 3.4, GIB // 2))
    samplers = (SamplerCost("sample[256]", 100.0, 200.0, True),)
    return Answer("a-model", parse_slice(where), settings, plan, compiled, steps, samplers)
