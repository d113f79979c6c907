# SPDX-License-Identifier: Apache-2.0
"""Host time of a decode step outside the device's programs, at batch 1, 32 and 256: `python benchmarks/host_time.py [--profile]`.

A one-layer model, so that the host is what takes time. Of the runner's `execute_model`, `sample_tokens` and `AsyncOutput.get_output`, less the
calls of compiled programs and the wait for their result. Wall time is the median over steps; CPU time of the same code, which other load on the
machine does not add to, stands beside it.
"""

import argparse
import cProfile
import os
import pstats
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common

BARS_MS = {1: 0.5, 32: 1.0, 256: 4.0}
TOKENS = 64
PROMPT = 16
VOCAB = 1000
PARTS = ("execute_model", "sample_tokens", "get_output", "programs", "wait")


class Step:
    """Seconds (wall, CPU) that each part of one step took, programs and wait included in the first three."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.seconds = {part: [0.0, 0.0] for part in PARTS}

    def host(self, clock: int) -> float:
        inside = sum(self.seconds[part][clock] for part in ("programs", "wait"))
        return sum(self.seconds[part][clock] for part in ("execute_model", "sample_tokens", "get_output")) - inside


class Timers:
    """Wraps the runner's methods."""

    def __init__(self, runner: Any, profile: cProfile.Profile | None) -> None:
        self.steps: list[Step] = []
        self._profile = profile
        programs = runner.programs
        for name in ("forward", "sample", "sample_greedy", "logprobs"):
            setattr(programs, name, self._timed("programs", getattr(programs, name)))
        execute, sample = runner.execute_model, runner.sample_tokens

        def execute_model(output: Any) -> Any:
            self.steps.append(Step(len(output.num_scheduled_tokens) if _decodes_only(output) else 0))
            return self._timed("execute_model", execute, profiled=True)(output)

        def sample_tokens(grammar_output: Any) -> Any:
            step = self.steps[-1]
            result = self._timed("sample_tokens", sample, profiled=True)(grammar_output)
            get_output = result.get_output
            # The device's part of it first, by itself.
            wait = self._timed("wait", lambda: _wait_for(result), step)
            result.get_output = self._timed("get_output", lambda: (wait(), get_output())[1], step, profiled=True)
            return result

        runner.execute_model, runner.sample_tokens = execute_model, sample_tokens

    def _timed(self, part: str, fn: Callable, step: Step | None = None, *, profiled: bool = False) -> Callable:
        profile = self._profile if profiled else None

        def timed(*args: Any) -> Any:
            seconds = (step or self.steps[-1]).seconds[part]
            if profile is not None:
                profile.enable()
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return fn(*args)
            finally:
                seconds[0] += time.perf_counter() - wall
                seconds[1] += time.thread_time() - cpu
                if profile is not None:
                    profile.disable()

        return timed


def _wait_for(output: Any) -> None:
    output._tokens.block_until_ready()


def _decodes_only(output: Any) -> bool:
    return bool(output.num_scheduled_tokens) and max(output.num_scheduled_tokens.values()) == 1


def make_model(directory: Path) -> str:
    """A config is enough: the weights are dummies."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    ).save_pretrained(directory)  # fmt: skip
    return str(directory)


def generate(llm: Any, batch: int, **sampling: Any) -> None:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [random.randrange(3, VOCAB) for _ in range(PROMPT)]} for _ in range(batch)]
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, detokenize=False, **sampling)
    llm.generate(prompts, params, use_tqdm=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="print where the time goes; changes the times")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    with tempfile.TemporaryDirectory() as directory:
        llm = LLM(
            make_model(Path(directory)), load_format="dummy", dtype="float32", skip_tokenizer_init=True, max_model_len=2048,
            max_num_seqs=256, max_num_batched_tokens=512, num_gpu_blocks_override=4096, enable_prefix_caching=False,
            additional_config={"background_compile": False},
        )  # fmt: skip
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    profile = cProfile.Profile() if args.profile else None
    timers = Timers(runner, profile)
    rows = []
    for title, sampling in (
        ("greedy", {"temperature": 0.0}),
        ("temperature, top-p", {"temperature": 1.0, "top_p": 0.9}),
    ):
        for batch, bar in BARS_MS.items():
            timers.steps.clear()
            for _ in range(3):
                generate(llm, batch, **sampling)
            steps = [step for step in timers.steps if step.rows == batch]
            host, cpu = (1000 * median(step.host(clock) for step in steps) for clock in (0, 1))
            parts = [1000 * median(step.seconds[part][0] for step in steps) for part in PARTS]
            rows.append((title, batch, len(steps), host, cpu, bar, common.met(host, bar), *parts))
            if profile is not None:
                print(f"{title}, batch {batch}: {len(timers.steps)} steps")
                pstats.Stats(profile).sort_stats("tottime").print_stats(18)
                profile.clear()
    header = (
        "sampling",
        "batch",
        "steps",
        "host, ms",
        "host CPU, ms",
        "bar, ms",
        "met",
        *(f"{part}, ms" for part in PARTS),
    )
    title = "# Host time of a decode step outside the device's programs"
    text = "\n\n".join((title, common.machine_line(), __doc__.split("\n\n", 1)[1].strip(), common.table(header, rows)))
    if args.profile:
        print(text)
    else:
        common.write("host_time.md", text)


if __name__ == "__main__":
    main()
