# SPDX-License-Identifier: Apache-2.0
"""Ask the planner about a matrix of models and slices, keep what it answers, and bring the table of docs/planner.md up to date.

python benchmarks/tpu_schedule/planner_matrix.py [--only TEXT]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpu_inference.tools.kernel_report.render import replace_region

HERE = Path(__file__).resolve().parent
RESULT, PAGE = HERE / "planner" / "matrix.json", HERE.parent.parent / "docs" / "planner.md"
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
GIB = 2**30


def questions() -> list[tuple[str, int, str]]:
    """(model, tensor parallel size, slice)."""
    return [(model, tp, where) for model, sizes in ASKED.items() for tp in sizes for where in SLICES[tp]] + list(
        MANY_CHIPS
    )


def config_of(model: str) -> dict[str, Any]:
    fields, sizes, tied = MODELS[model]
    config = {**fields, **dict(zip(_FIELDS, sizes, strict=True)), "tie_word_embeddings": tied}
    return config | dict(torch_dtype="bfloat16", hidden_act="silu", rms_norm_eps=1e-5, max_position_embeddings=32768)


def run_planner(
    config: Mapping[str, Any], where: str, tensor_parallel: int, *options: str
) -> tuple[int, dict[str, Any] | str]:
    """The planner's exit code and its answer for requests of up to 8,192 tokens; of code 2, what it said."""
    chip, topology = where.split(":")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        command = [sys.executable, "-m", "tpu_inference.plan", "--model", directory, "--chip", chip]
        command += ["--topology", topology, "-tp", str(tensor_parallel), "--max-model-len", "8192", "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode > 1:
        return done.returncode, (done.stderr.strip().splitlines() or ["no message"])[-1][:400]
    return done.returncode, json.loads(done.stdout)


def ask(model: str, tensor_parallel: int, where: str) -> dict[str, Any]:
    """The planner's answer on memory, its exit code and its seconds."""
    start = time.monotonic()
    code, found = run_planner(config_of(model), where, tensor_parallel, "--no-times")
    kind = "error" if code > 1 else "answer"
    return {"code": code, "seconds": round(time.monotonic() - start, 1), kind: found}


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
            memory = x["memory"]
            sizes = (memory[name] / GIB for name in ("weights", "kv_cache", "temporaries"))
            cells += ["yes" if x["code"] == 0 else "no", *(f"{size:.2f}" for size in sizes), str(x["requests"])]
        lines.append(f"| {' | '.join([*cells, str(x['seconds'])])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="questions whose name has this in it; the others' answers stay")
    args = parser.parse_args()
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    failed = 0
    for question in questions():
        name = " ".join(map(str, question))
        if args.only not in name:
            continue
        found = ask(*question)
        answer = found.pop("answer", None)
        if answer:
            memory = {key: answer["hbm_bytes_per_device"][key] for key in ("weights", "kv_cache", "temporaries")}
            found |= dict(memory=memory, requests=answer["requests_held"].get("8192", 0))
        failed += "error" in found
        print(name, found, flush=True)
        result[name] = found
        order = [" ".join(map(str, question)) for question in questions()]
        result = {key: result[key] for key in order if key in result}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(
            replace_region(PAGE.read_text(encoding="utf-8"), as_text(result), (BEGIN, END)), encoding="utf-8"
        )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
