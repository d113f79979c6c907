# SPDX-License-Identifier: Apache-2.0
"""What warm-up compiles and how long it takes, and scanned layers against looped ones: `python benchmarks/warm_up.py`.

Every measurement is a process of its own with an empty compile cache. CPU seconds are those of all threads; other load on the machine adds
to the wall time only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import common

MAX_PROGRAMS = 60
MAX_RATIO = 2.0
LAYERS = (16, 80)
WIDTHS = (64, 256)
"""Hidden sizes for scan against loop; the MLP is three times as wide."""
# vLLM's defaults for `vllm serve`: (max_num_batched_tokens, max_num_seqs) by chip; see `EngineArgs.get_batch_defaults`.
SERVER_DEFAULTS = {"cpu": (2048, 256), "v5e": (512, 256), "v5p": (256, 256), "v6e": (1024, 256), "tpu7x": (8192, 1024)}
SMALL = (8, 4)
"""Batch limits for scan against loop: only a few programs matter there."""


def measure(layers: int, width: int, scan: bool, limits: tuple[int, int]) -> dict[str, float]:
    """In a fresh process: {programs, seconds, cpu_seconds, step_ms}."""
    arguments = [str(n) for n in (layers, width, int(scan), *limits)]
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "VLLM_XLA_CACHE_PATH": cache, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        command = [sys.executable, __file__, "--worker", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{layers} layers of width {width}, {'scan' if scan else 'loop'}, limits {limits}: {result}", flush=True)
    return result


def worker(layers: int, width: int, scan: int, max_tokens: int, max_seqs: int) -> None:
    """One measurement; the last line printed is its JSON."""
    from transformers import LlamaConfig
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as directory:
        LlamaConfig(
            vocab_size=512, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
        ).save_pretrained(directory)  # fmt: skip
        llm = LLM(
            directory, load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, max_model_len=1024,
            max_num_seqs=max_seqs, max_num_batched_tokens=max_tokens, num_gpu_blocks_override=512, enforce_eager=True,
            additional_config={"scan_layers": bool(scan)},
        )  # fmt: skip
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    # vLLM's own warm-up was skipped (enforce_eager); this one is timed alone.
    wall, cpu = time.perf_counter(), time.process_time()
    report = runner.compilation.warm_up(runner.programs.cases())
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    def seconds(tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
        return time.perf_counter() - start

    step_ms = min(1000 * (seconds(68) - seconds(4)) / 64 for _ in range(4))
    print()
    print(json.dumps({"programs": report.programs, "seconds": wall, "cpu_seconds": cpu, "step_ms": step_ms}))


def planned_programs() -> list[tuple[Any, ...]]:
    """Programs at the server's defaults, by chip: counted from the plan, nothing is compiled."""
    from tpu_inference.runner.buckets import BucketPlan

    rows = []
    for chip, (tokens, seqs) in SERVER_DEFAULTS.items():
        plan = BucketPlan.build(tokens, seqs, on_tpu=chip != "cpu")
        # Forward per bucket; five kinds per row count (StepPrograms.row_cases); a table row; prompt logprobs. The CPU's row is checked by compiling.
        count = len(plan.buckets) + 5 * len(plan.row_sizes) + 2
        rows.append((chip, tokens, seqs, len(plan.buckets), count, MAX_PROGRAMS, common.met(count, MAX_PROGRAMS)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=int, nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    planned = planned_programs()
    by_layers = {layers: measure(layers, 64, True, SERVER_DEFAULTS["cpu"]) for layers in LAYERS}
    assert by_layers[LAYERS[0]]["programs"] == planned[0][4], "the plan and the engine disagree"
    few, many = (by_layers[layers] for layers in LAYERS)
    ratio, cpu_ratio = (many[key] / few[key] for key in ("seconds", "cpu_seconds"))
    scan_rows = []
    for width in WIDTHS:
        scan, loop = (measure(16, width, scan, SMALL) for scan in (True, False))
        layer_mib = 2 * (2 * width**2 + width**2 + 9 * width**2) / 2**20
        scan_rows.append((width, layer_mib, *(r[key] for key in ("cpu_seconds", "step_ms") for r in (scan, loop))))
    warm_up_rows = [(n, r["programs"], r["seconds"], r["cpu_seconds"]) for n, r in by_layers.items()]
    plan_header = ("chip", "max_num_batched_tokens", "max_num_seqs", "forward programs", "all programs", "bar", "met")
    scan_header = ("width", "MiB a layer", "compile CPU s, scan", "loop", "ms a decode step, scan", "loop")
    common.write(
        "warm_up.md",
        "\n\n".join(
            (
                "# Warm-up",
                common.machine_line(),
                __doc__.split("\n\n", 1)[1].strip(),
                "## Programs at the defaults of `vllm serve`",
                common.table(plan_header, planned),
                "## Scanned layers, CPU server defaults, width 64",
                common.table(("layers", "programs", "warm-up s", "CPU s"), warm_up_rows),
                f"{LAYERS[1]} layers take {ratio:.2f} x the time of {LAYERS[0]} ({cpu_ratio:.2f} x in CPU seconds); "
                f"bar {MAX_RATIO:g}: met: {common.met(ratio, MAX_RATIO)}.",
                f"## Scan against loop: 16 layers, at most {SMALL[0]} tokens of {SMALL[1]} requests, CPU backend",
                common.table(scan_header, scan_rows),
            )
        ),
    )


if __name__ == "__main__":
    main()
