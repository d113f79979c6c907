# SPDX-License-Identifier: Apache-2.0
"""vLLM's `LLM` in this process, and what tests ask of it."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

from helpers.tiny_models import MAX_LEN
from helpers.tiny_models import prompts as random_prompts

DEFAULTS: dict[str, Any] = dict(
    dtype="float32",
    max_model_len=MAX_LEN,
    max_num_seqs=20,
    max_num_batched_tokens=64,
    long_prefill_token_threshold=16,
    block_size=16,
    num_gpu_blocks_override=400,
    skip_tokenizer_init=True,
    disable_log_stats=True,
    additional_config={"scan_layers": True, "background_compile": False},
)
"""Prefills are chunked at 16 tokens. Layers are scanned and all programs compiled first, as on TPU; the loop, serving while programs
compile, and the buckets there are by default have tests of their own: each bucket of tokens costs seconds of compiling, so there are two."""


@contextmanager
def engine(path: str, **options: Any) -> Iterator[LLM]:
    """An engine that is gone afterwards. Of `additional_config`, what is given replaces its own part of the defaults."""
    options = {**DEFAULTS, **options}
    buckets = sorted({16, options["max_num_batched_tokens"]})
    additional = {"token_buckets": buckets, **DEFAULTS["additional_config"], **options.pop("additional_config")}
    llm = LLM(path, additional_config=additional, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def greedy_params(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **more)


def generate(llm: LLM, prompts: Sequence[list[int]], params: Any) -> list[Any]:
    """Request outputs in the order of `prompts`."""
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def tokens(llm: LLM, prompts: Sequence[list[int]], count: int = 64, **more: Any) -> list[list[int]]:
    """Greedy continuations."""
    return [list(out.outputs[0].token_ids) for out in generate(llm, prompts, greedy_params(count, **more))]


def of_prompts(llm):
    """The log probability of each token of the prompts, which are read in chunks of 16."""
    outputs = generate(llm, random_prompts(8), greedy_params(1, prompt_logprobs=0))
    return np.array(
        [
            entry[token].logprob
            for out in outputs
            for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)
        ]
    )


def likeness(expected, found):
    """Of log probabilities: 1 where they are alike, near 0 where they have nothing to do with each other."""
    return np.corrcoef(expected, found)[0, 1]


def scheduler(llm: LLM) -> Any:
    """vLLM's scheduler behind an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm: LLM) -> tuple[int, int]:
    """(free blocks, blocks there are besides the null block)."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    return pool.get_num_free_blocks(), pool.num_gpu_blocks - 1
