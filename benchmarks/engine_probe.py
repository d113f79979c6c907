# SPDX-License-Identifier: Apache-2.0
"""One engine that measures itself on request; runs under either venv, so it needs vLLM and nothing else.

Names of workloads come on stdin, one a line; results go to stdout as lines "RESULT {json}". The first, unasked, is the start.
"""

import argparse
import json
import random
import sys
import time
from typing import Any


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--decode-tokens", type=int, default=96)
    return parser.parse_args()


class Probe:
    """An `LLM` and the workloads. Prompts never repeat: prefix caching may not help."""

    def __init__(self, llm: Any, params_class: Any, args: argparse.Namespace) -> None:
        self._llm, self._params_class, self._args = llm, params_class, args
        self._random = random.Random(0)

    def seconds(self, prompts: int, length: int, tokens: int) -> float:
        """Time to generate greedily, `tokens` for each of `prompts` prompts of `length` random ids."""
        ids = [
            {"prompt_token_ids": [self._random.randrange(3, self._args.vocab_size) for _ in range(length)]}
            for _ in range(prompts)
        ]
        params = self._params_class(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = self._llm.generate(ids, params, use_tqdm=False)
        taken = time.perf_counter() - start
        assert all(len(out.outputs[0].token_ids) == tokens for out in outputs)
        return taken

    def decode(self) -> float:
        """Single stream: ms per token."""
        few, more = 8, self._args.decode_tokens
        return 1000 * (self.seconds(1, 32, few + more) - self.seconds(1, 32, few)) / more

    def throughput(self) -> float:
        """32 requests of 128 tokens in, 128 out: output tokens a second."""
        return 32 * 128 / self.seconds(32, 128, 128)

    def prefill(self) -> float:
        """One prompt of 2048 tokens to its first token: seconds."""
        return self.seconds(1, 2048, 1)


def emit(result: dict[str, float]) -> None:
    print(f"\nRESULT {json.dumps(result)}", flush=True)


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    from vllm import LLM, SamplingParams

    imports = time.perf_counter() - start
    llm = LLM(
        args.model,
        dtype="bfloat16",
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    probe = Probe(llm, SamplingParams, args)
    probe.seconds(1, 16, 1)
    emit({"imports": imports})
    for line in sys.stdin:
        name = line.strip()
        emit({name: getattr(probe, name)()})


if __name__ == "__main__":
    main()
