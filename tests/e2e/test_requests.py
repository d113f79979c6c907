# SPDX-License-Identifier: Apache-2.0
"""Bad and awkward requests: a clear error, nothing lost, and the engine serves on as a fresh one would."""

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from helpers.engines import engine, free_blocks, generate, greedy_params, scheduler, tokens
from helpers.tiny_models import MAX_LEN, VOCAB_SIZE, greedy, prompts

PROBE = prompts(1, seed=9)[0]


@pytest.fixture(scope="module")
def served(zoo):
    path = zoo("llama")
    with engine(path, enable_prefix_caching=False) as llm:
        yield llm, greedy(path, PROBE, 12)


@pytest.fixture
def llm(served):
    """After each test every block is free and the next request gets a fresh engine's tokens."""
    llm, expected = served
    yield llm
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    free, total = free_blocks(llm)
    assert free == total
    assert tokens(llm, [PROBE], 12) == [expected]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([5] * (MAX_LEN + 1), "longer than|maximum|exceeds"), ([], "empty"), ([5, VOCAB_SIZE], "vocab"), ([-1], "vocab|negative")],
)  # fmt: skip
def test_bad_prompts(llm, prompt, message):
    with pytest.raises(VLLMValidationError, match=f"(?i){message}"):
        tokens(llm, [prompt], 3)


@pytest.mark.parametrize(
    "fields", [dict(temperature=-1.0), dict(temperature=float("nan")), dict(max_tokens=0), dict(top_p=0.0)]
)
def test_bad_values(llm, fields):
    with pytest.raises(VLLMValidationError, match=next(iter(fields))):
        generate(llm, [PROBE], SamplingParams(**fields))


def test_unserved_fields_are_refused_by_name(llm):
    with pytest.raises(VLLMValidationError, match="extra_args"):
        generate(llm, [PROBE], SamplingParams(extra_args={"x": 1}))


@pytest.mark.parametrize("steps", [0, 1, 2, 8], ids=["queued", "prefilling", "prefilling further", "decoding"])
def test_abort(llm, steps):
    llm.llm_engine.add_request("gone", {"prompt_token_ids": [5] * 40}, greedy_params(100))
    for _ in range(steps):
        llm.llm_engine.step()
    llm.llm_engine.abort_request(["gone"])


def test_300_requests_with_a_cache_for_3(zoo):
    path = zoo("llama")
    batch = prompts(300, seed=10, longest=30)
    with engine(path, num_gpu_blocks_override=13, max_model_len=64) as llm:
        got = tokens(llm, batch, 8)
        assert all(got[i] == greedy(path, batch[i], 8) for i in range(0, 300, 25))
        assert {len(answer) for answer in got} == {8}
        free, total = free_blocks(llm)
        assert free == total


def test_priorities(zoo):
    """With room for one request at a time, the more urgent one that came last is answered second."""
    with engine(zoo("llama"), scheduling_policy="priority", max_num_seqs=1) as llm:
        for name, priority in (("first", 5), ("late", 9), ("urgent", 0)):
            llm.llm_engine.add_request(name, {"prompt_token_ids": PROBE}, greedy_params(6), priority=priority)
        order = []
        while llm.llm_engine.has_unfinished_requests():
            order += [out.request_id for out in llm.llm_engine.step() if out.finished]
    assert order.index("urgent") < order.index("late")


def test_seeds_reproduce_whatever_the_batch(llm):
    def seeded(seed, count=10):
        return SamplingParams(
            temperature=1.0, top_p=0.9, seed=seed, max_tokens=count, ignore_eos=True, detokenize=False
        )

    others = prompts(7, seed=11)
    alone = [list(generate(llm, [PROBE], seeded(seed))[0].outputs[0].token_ids) for seed in (1, 2)]
    mixed = generate(llm, [*others, PROBE, PROBE], [*(seeded(100 + i) for i in range(7)), seeded(1), seeded(2)])
    assert [list(out.outputs[0].token_ids) for out in mixed[-2:]] == alone
    assert alone[0] != alone[1]


@pytest.mark.parametrize("restriction", [dict(top_k=4), dict(top_p=0.5), dict(min_p=0.2)])
def test_restrictions(llm, zoo, restriction):
    from helpers import tiny_models

    probs = np.exp(tiny_models.logprobs(zoo("llama"), PROBE)[-1] / 2)
    probs /= probs.sum()
    order = np.argsort(-probs)
    allowed = {
        "top_k": set(order[:4]),
        "top_p": set(order[: int(np.searchsorted(np.cumsum(probs[order]), 0.5)) + 1]),
        "min_p": set(np.flatnonzero(probs >= 0.2 * probs.max())),
    }[next(iter(restriction))]
    params = SamplingParams(temperature=2.0, n=64, seed=1, max_tokens=1, detokenize=False, **restriction)
    drawn = {out.token_ids[0] for out in generate(llm, [PROBE], params)[0].outputs}
    assert drawn <= allowed and len(drawn) > 1


def test_stop_tokens_and_min_tokens(llm):
    free_run = tokens(llm, [PROBE], 12)[0]
    stop = free_run[3]
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[stop], detokenize=False)
    (out,) = generate(llm, [PROBE], params)
    assert list(out.outputs[0].token_ids) == free_run[: free_run.index(stop) + 1]
    assert out.outputs[0].stop_reason == stop
    params.min_tokens = 8
    (out,) = generate(llm, [PROBE], params)
    assert stop not in out.outputs[0].token_ids[:8] and len(out.outputs[0].token_ids) >= 8


def test_logprobs_zero_is_the_sampled_token(llm):
    (out,) = generate(llm, [PROBE], greedy_params(3, logprobs=0))
    assert [list(entry) for entry in out.outputs[0].logprobs] == [[t] for t in out.outputs[0].token_ids]
    assert scheduler(llm).get_num_unfinished_requests() == 0
