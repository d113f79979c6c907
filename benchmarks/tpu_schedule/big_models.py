# SPDX-License-Identifier: Apache-2.0
"""Ask the planner about large models on the slices they would be served on, keep what it answers, and bring its table in docs/planner.md up to date.

python benchmarks/tpu_schedule/big_models.py [--only TEXT]
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from asking import HERE, ask_all, cells_of, memory_of, run_planner

RESULT = HERE / "planner" / "big_models.json"
BEGIN, END = "<!-- big:begin -->", "<!-- big:end -->"
FP8_BLOCKS = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])
INT8 = ("--quantization", "online", "--quantization-config")
MODELS: Mapping[str, Mapping[str, Any]] = {
    "Llama 3.1 70B": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=128256, rope_theta=5e5, max_position_embeddings=131072,
    ),
    "Mixtral 8x22B": dict(
        architectures=["MixtralForCausalLM"], model_type="mixtral", hidden_size=6144, intermediate_size=16384, num_hidden_layers=56,
        num_attention_heads=48, num_key_value_heads=8, vocab_size=32768, num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6,
        max_position_embeddings=65536,
    ),
    "Qwen3-235B-A22B": dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=4096, intermediate_size=12288, num_hidden_layers=94,
        num_attention_heads=64, num_key_value_heads=4, head_dim=128, vocab_size=151936, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=1536, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], rope_theta=1e6,
        max_position_embeddings=40960, quantization_config=FP8_BLOCKS,
    ),
    "gpt-oss-120b": dict(
        architectures=["GptOssForCausalLM"], model_type="gpt_oss", hidden_size=2880, intermediate_size=2880, num_hidden_layers=36,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, vocab_size=201088, num_local_experts=128, num_experts_per_tok=4,
        sliding_window=128, attention_bias=True, swiglu_limit=7.0, max_position_embeddings=131072,
        layer_types=["sliding_attention", "full_attention"] * 18,
        rope_parameters=dict(rope_type="yarn", rope_theta=150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                             original_max_position_embeddings=4096),
        quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=[
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]),
    ),
    "DeepSeek V3": dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
        num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, first_k_dense_replace=3,
        moe_layer_freq=1, n_group=8, topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True,
        routed_scaling_factor=2.5, num_nextn_predict_layers=1, attention_bias=False, vocab_size=129280, rope_theta=10000,
        max_position_embeddings=163840, quantization_config=FP8_BLOCKS,
        rope_scaling=dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0,
                          original_max_position_embeddings=4096),
    ),
}  # fmt: skip
"""Fields of the published config.json files that shapes follow from."""
QUESTIONS: Sequence[tuple[str, str, str, int, tuple[str, ...]]] = (
    ("Llama 3.1 70B", "int8", "v6e:2x4", 8, (*INT8, '{"linear": "int8_per_channel_static"}')),
    ("Llama 3.1 70B", "int4, groups of 128", "v6e:2x2", 4, ("--additional-config", '{"quantization": "int4_weights"}')),
    ("Qwen3-235B-A22B", "fp8 blocks", "v6e:4x4", 16, ("--enable-expert-parallel",)),
    ("DeepSeek V3", "fp8 blocks", "v6e:8x8", 64, ("--enable-expert-parallel",)),
    ("DeepSeek V3", "fp8 blocks", "tpu7x:2x2x4", 32, ("--enable-expert-parallel",)),
    ("gpt-oss-120b", "MXFP4, held as fp8", "tpu7x:2x2x1", 8, ()),
    ("gpt-oss-120b", "MXFP4, held as fp8", "v6e:2x4", 8, ()),
    ("Mixtral 8x22B", "int8", "v5e:4x4", 16,
     (*INT8, '{"linear": "int8_per_channel_static", "moe": "int8_per_channel_static"}')),
)  # fmt: skip
"""(model, weights, slice, tensor parallel size, further options)."""
COMMON = dict(torch_dtype="bfloat16", hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=False)


def as_text(result: Mapping[str, Any]) -> str:
    """The table: memory, then the step of 64 decoding requests."""
    lines = [
        "| Model | Weights | Slice | TP | Fits | Weights, GiB | KV cache, GiB | Temporaries, GiB | Requests of 8,192 tokens "
        "| Attention, ms | Matmul | Norm and elementwise | Copies | Schedule | ICI | Step | Tokens/s |",
        "|" + " --- |" * 17,
    ]
    for x in result.values():
        cells = [x["model"], x["weights"], x["slice"], str(x["tensor_parallel"])]
        if "error" in x:
            lines.append(f"| {' | '.join([*cells, x['error'], *['-'] * 12])} |")
            continue
        cells += ["yes" if x["fits"] else "no", *cells_of(x)]
        lines.append(f"| {' | '.join(cells + _step(x.get('step')))} |")
    return "\n".join(lines)


def _step(step: Mapping[str, Any] | None) -> list[str]:
    if step is None:
        return ["-"] * 8
    kinds, floor = step["schedule_us_by_kind"], "≥" if step["not_followed"] else ""
    ranges = [[us / 1000 for us in step[name]] for name in ("schedule_us", "ici_us", "step_us")]
    cells = [f"{kinds[kind] / 1000:.1f}" for kind in ("attention", "matmul", "norm and elementwise", "copies")]
    cells += [f"{floor if i != 1 else ''}{low:.1f}-{high:.1f}" for i, (low, high) in enumerate(ranges)]
    return [*cells, "-".join(f"{rate:,}" for rate in step["tokens_per_s"])]


def ask(model: str, weights: str, where: str, tensor_parallel: int, options: Sequence[str]) -> dict[str, Any]:
    """What the planner says of memory and of 64 requests of 2,048 tokens decoding."""
    asked = dict(model=model, weights=weights, slice=where, tensor_parallel=tensor_parallel, options=options)
    _, found = run_planner({**COMMON, **MODELS[model]}, where, tensor_parallel, *options)
    if isinstance(found, str):
        return {**asked, "error": found}
    steps = [
        s for s in found["steps"] if s["step"] == "decode" and (s["decoding_requests"], s["context"]) == (64, 2048)
    ]
    return {**asked, "fits": found["fits"], **memory_of(found), **({"step": steps[0]} if steps else {})}


def main() -> int:
    asked = {f"{question[0]} {question[2]}": partial(ask, *question) for question in QUESTIONS}
    return ask_all(__doc__, asked, RESULT, as_text, (BEGIN, END))


if __name__ == "__main__":
    sys.exit(main())
