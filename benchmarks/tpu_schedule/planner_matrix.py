# SPDX-License-Identifier: Apache-2.0
"""Ask the planner about a matrix of models and slices, keep what it answers, and bring the table of docs/planner.md up to date.

python benchmarks/tpu_schedule/planner_matrix.py [--only TEXT]
"""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from asking import HERE, ask_all, cells_of, memory_of, run_planner

RESULT = HERE / "planner" / "matrix.json"
BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"
_LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", num_key_value_heads=8, rope_theta=5e5)
_QWEN3 = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", num_key_value_heads=8, head_dim=128)
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
MODELS: Mapping[str, tuple[Mapping[str, Any], tuple[int, ...], bool]] = {
    "llama-tiny": ({**_LLAMA, "num_key_value_heads": 2, "head_dim": 128}, (256, 512, 2, 4, 512), False),
    "llama-1b": ({**_LLAMA, "head_dim": 64}, (2048, 8192, 16, 32, 128256), True),
    "llama-8b": (_LLAMA, (4096, 14336, 32, 32, 128256), False),
    "llama-70b": (_LLAMA, (8192, 28672, 80, 64, 128256), False),
    "qwen3-tiny": ({**_QWEN3, "num_key_value_heads": 2}, (256, 512, 2, 4, 512), False),
    "qwen3-1.7b": (_QWEN3, (2048, 6144, 28, 16, 151936), True),
    "qwen3-8b": (_QWEN3, (4096, 12288, 36, 32, 151936), False),
    "qwen3-32b": (_QWEN3, (5120, 25600, 64, 64, 151936), False),
}
"""Fields of config.json, those of `_FIELDS`, and whether embeddings are tied."""
SLICES = {
    1: ("v5e:1x1", "v6e:1x1", "tpu7x:1x1x1"),
    4: ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"),
    8: ("v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"),
}
ASKED = {
    "llama-tiny": (1,), "llama-1b": (1, 4), "llama-8b": (1, 8), "llama-70b": (8,),
    "qwen3-tiny": (1,), "qwen3-1.7b": (1,), "qwen3-8b": (1, 8), "qwen3-32b": (8,),
}  # fmt: skip
"""Tensor parallel sizes."""
MANY_CHIPS = (("llama-70b", 64, "v6e:8x8"),)


def questions() -> list[tuple[str, int, str]]:
    """(model, tensor parallel size, slice)."""
    return [(model, tp, where) for model, sizes in ASKED.items() for tp in sizes for where in SLICES[tp]] + list(
        MANY_CHIPS
    )


def config_of(model: str) -> dict[str, Any]:
    fields, sizes, tied = MODELS[model]
    config = {**fields, **dict(zip(_FIELDS, sizes, strict=True)), "tie_word_embeddings": tied}
    return config | dict(torch_dtype="bfloat16", hidden_act="silu", rms_norm_eps=1e-5, max_position_embeddings=32768)


def ask(model: str, tensor_parallel: int, where: str) -> dict[str, Any]:
    """The planner's exit code, and its answer on memory."""
    code, found = run_planner(config_of(model), where, tensor_parallel, "--no-times")
    return {"code": code, **({"error": found} if isinstance(found, str) else memory_of(found))}


def as_text(result: Mapping[str, Any]) -> str:
    """The table."""
    lines = [
        "| Model | Slice | TP | Fits | Weights, GiB | KV cache, GiB | Temporaries, GiB | Requests of 8,192 tokens | Answered in, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, x in result.items():
        model, tensor_parallel, where = name.split(" ")
        cells = [model, where, tensor_parallel]
        if "error" in x:
            cells += [x["error"], "-", "-", "-", "-"]
        else:
            cells += ["yes" if x["code"] == 0 else "no", *cells_of(x)]
        lines.append(f"| {' | '.join([*cells, str(x['seconds'])])} |")
    return "\n".join(lines)


def main() -> int:
    asked = {" ".join(map(str, question)): partial(ask, *question) for question in questions()}
    return ask_all(__doc__, asked, RESULT, as_text, (BEGIN, END))


if __name__ == "__main__":
    sys.exit(main())
