# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens and logprobs equal transformers' on the same float32 weights, whatever happens to the request on the way."""

import numpy as np
import pytest

from helpers import tiny_models
from helpers.engines import engine, free_blocks, generate, greedy_params, scheduler, tokens
from helpers.tiny_models import FAMILIES, chosen, prompts

COUNT = 64
ON_EIGHT_DEVICES, ON_ONE = ("mixtral", "qwen3-moe", "deepseek-v2"), ("qwen2-moe", "gpt-oss", "llama4", "deepseek-v3")
"""Families with experts take the longest, so each is in one of these tests; tests/models/test_moe_models.py runs all of them step by step."""
SLOW = {name for name in FAMILIES if name not in ("llama", "gemma3", "phi3")}


def families(*names: str):
    return [
        pytest.param(n, marks=pytest.mark.slow if n in SLOW else ())
        for n in names or FAMILIES
        if n not in ON_EIGHT_DEVICES
    ]


def check(path, batch, got):
    for prompt, answer in zip(batch, got, strict=True):
        assert answer == chosen(path, prompt, answer)
    varied = sum(len(set(answer)) >= 20 for answer in got)
    assert varied >= 0.75 * len(got), "these tokens prove little: they repeat"


@pytest.mark.parametrize("name", families())
def test_alone_in_a_batch_chunked_and_prefix_cached(zoo, name):
    path = zoo(name)
    batch = prompts(17)
    assert max(map(len, batch)) > 48 and min(map(len, batch)) < 8
    # The buckets of 16 and 20 requests are no family's own.
    with engine(path, max_num_seqs=20 if name == "llama" else 8) as llm:
        alone = batch[-1]
        (answer,) = tokens(llm, [alone], COUNT)
        assert answer == chosen(path, alone, answer)
        together = tokens(llm, batch, COUNT)
        check(path, batch, together)
        longest = max(batch, key=len)
        (again,) = generate(llm, [longest], greedy_params(COUNT))
        assert again.num_cached_tokens >= 16
        assert list(again.outputs[0].token_ids) == together[batch.index(longest)]
        free, total = free_blocks(llm)
        assert free == total


@pytest.mark.parametrize("name", families("llama", "gemma3", "mistral"))
def test_after_preemption(zoo, name):
    path = zoo(name)
    batch = prompts(8, seed=1)
    blocks = 30 if name == "gemma3" else 16  # two groups of layers draw on one pool
    with engine(path, num_gpu_blocks_override=blocks, enable_prefix_caching=False, max_model_len=128) as llm:
        preempted = []
        original = scheduler(llm)._preempt_request

        def spy(request, *args, **kwargs):
            preempted.append(request.request_id)
            return original(request, *args, **kwargs)

        scheduler(llm)._preempt_request = spy
        check(path, batch, tokens(llm, batch, COUNT))
        assert preempted, "the cache was large enough: nothing was tested"
        free, total = free_blocks(llm)
        assert free == total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("llama@8-odd", 2),
        ("gemma3@8-odd", 2),
        *((f"{name}@8", 8) for name in FAMILIES if not name.startswith("llama-") and name not in ON_ONE),
    ],
)
def test_tensor_parallel(zoo, name, tp):
    path = zoo(name)
    batch = prompts(5, seed=2)
    with engine(path, tensor_parallel_size=tp, max_num_seqs=8, max_num_batched_tokens=16) as llm:
        check(path, batch, tokens(llm, batch, COUNT))


@pytest.mark.parametrize(
    "options",
    [
        dict(async_scheduling=False),
        dict(additional_config={"scan_layers": False, "token_buckets": None}),
        dict(additional_config={"background_compile": True}),
    ],
)
def test_other_ways_to_run(zoo, options):
    path = zoo("gemma3")
    batch = prompts(5, seed=3)
    with engine(path, **options) as llm:
        check(path, batch, tokens(llm, batch, COUNT))


def test_logprobs(zoo):
    path = zoo("llama")
    batch = prompts(3, seed=4, longest=40)
    with engine(path) as llm:
        outputs = generate(llm, batch, greedy_params(10, logprobs=5, prompt_logprobs=3))
    for prompt, output in zip(batch, outputs, strict=True):
        expected = tiny_models.logprobs(path, prompt + list(output.outputs[0].token_ids))
        assert output.prompt_logprobs[0] is None
        for position, found in enumerate(output.prompt_logprobs[1:], start=1):
            compare(found, expected[position - 1], 3, prompt[position])
        for i, found in enumerate(output.outputs[0].logprobs):
            compare(found, expected[len(prompt) - 1 + i], 5, output.outputs[0].token_ids[i])


def compare(found, expected, k, token):
    """`found` has the k likeliest tokens and `token`, with their logprobs and ranks."""
    order = np.argsort(-expected)
    assert set(found) == {*order[:k].tolist(), token}
    for token_id, logprob in found.items():
        assert logprob.logprob == pytest.approx(expected[token_id], abs=1e-4)
        assert order[logprob.rank - 1] == token_id


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["auto", "vllm"])
def test_float16(zoo, monkeypatch, implementation):
    """On the CPU backend. Weights and activations of 11 bits: log-probabilities near transformers' in float32."""
    monkeypatch.setenv("MODEL_IMPL_TYPE", implementation)
    path, (prompt, *_) = zoo("llama"), prompts(1, seed=3)
    with engine(path, dtype="float16", max_logprobs=-1) as llm:
        (out,) = generate(llm, [prompt], greedy_params(8, logprobs=-1))
        answer = list(out.outputs[0].token_ids)
        got = np.array([[row[i].logprob for i in range(tiny_models.VOCAB_SIZE)] for row in out.outputs[0].logprobs])
    wanted = tiny_models.logprobs(path, [*prompt, *answer])[len(prompt) - 1 : -1]
    assert np.abs(got - wanted).max() < 0.5, "these logits spread over tens"
    assert np.abs(got - wanted).mean() < 0.05
